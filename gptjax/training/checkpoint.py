"""Checkpoints: Orbax, asynchronous and atomic, with a digest of every array.

Orbax checks its metadata but not array data: flipped bits are restored without an error. So each save stores a digest
per leaf, computed on the device and independent of how the leaf is sharded, and each restore verifies it. A checkpoint
that is damaged or incomplete is skipped with a warning, and the next older one is used. The first checkpoint that is
written after a start or resume is read back at once, before the run relies on the storage.

    checkpoints/<step>/params      what a later stage or the sampler needs
    checkpoints/<step>/training    everything else that resuming needs: optimizer state, loss scale, ...
    checkpoints/<step>/meta        step, digests, and the stage's own metadata
    checkpoints/best.json          the step with the lowest validation loss, never deleted
"""

import dataclasses
import errno
import glob
import itertools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from absl import logging
from etils.epath import gpath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from gptjax import paths
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.json_files import write_json
from gptjax.ranges import Count
from gptjax.training import files
from gptjax.training.digests import combined, digests


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints of a run.

    every: steps between saves (of PPO: iterations).
    keep_last: how many of the newest are kept.
    keep_best: keep the best evaluated one too (make eval.every a multiple of `every`).
    keep_every: checkpoints at multiples of it are never deleted (of PPO: iterations); 0 = none.
    """

    every: Count = 1000
    keep_last: Count = 2
    keep_best: bool = True
    keep_every: int = 0

    def __post_init__(self):
        if self.every < 1 or self.keep_last < 1 or self.keep_every < 0:
            raise InputError("checkpoint: every and keep_last are at least 1, keep_every at least 0.")


def check_selection(c, choices: tuple[str, ...]):
    """Raises InputError if `selection` is none of the choices, or if the best checkpoint is to be used and none would
    be both saved and evaluated. c: a config with `selection`, `checkpoint` and `eval`."""
    if c.selection not in choices:
        raise InputError(f"selection={c.selection!r}: choose {', '.join(choices[:-1])} or {choices[-1]}.")
    if c.selection != "last" and (not c.checkpoint.keep_best or c.eval.every % c.checkpoint.every):
        raise InputError(
            f"selection={c.selection!r} needs checkpoint.keep_best and checkpoints where it is evaluated: make "
            f"eval.every={c.eval.every} a multiple of checkpoint.every={c.checkpoint.every}."
        )


# --- the manager ------------------------------------------------------------------------------------------


class _LocalPath(gpath.PosixGPath):
    """A local path whose glob takes the path itself literally. etils joins path and pattern before matching, so in a
    folder named `[2026]` Orbax found none of its own files and wrote checkpoints without a manifest."""

    def glob(self, pattern: str):
        return (self / found for found in glob.glob(pattern, root_dir=self))


_READ_BACK = 2**28  # bytes of an item's arrays that are compared when the first checkpoint is read back


class _Keep(preservation_policy.PreservationPolicy):
    """The newest, the best and the milestones. Orbax's own best-N can delete the newest step."""

    def __init__(self, config: CheckpointConfig):
        self.config, self.best = config, None

    def should_preserve(self, checkpoints, *, context):
        newest = {c.step for c in checkpoints[-self.config.keep_last :]}
        every = self.config.keep_every
        return [c.step in newest or c.step == self.best or bool(every and c.step % every == 0) for c in checkpoints]


def _means_full_disk(text: str) -> bool:
    return "No space left" in text or "quota exceeded" in text.lower()


def _not_about_full_disk(record) -> bool:
    """Filter of log records: Checkpointer reports a full disk in one line, Orbax in a traceback per array."""
    error = record.exc_info[1] if record.exc_info else None
    return not _means_full_disk(f"{record.getMessage()} {error}")


_excepthook = sys.excepthook


def _without_closed_loops(kind, error, trace):
    """sys.excepthook without the errors that TensorStore prints for each array it could not write to a full disk."""
    if not (kind is RuntimeError and "Event loop is closed" in str(error)):
        _excepthook(kind, error, trace)


def _remove(directory, attempts: int = 10):
    """Retries, for Orbax's threads may still be writing into the directory. The next start removes what is left."""
    for _ in range(attempts):
        try:
            return directory.rmtree(missing_ok=True)
        except OSError:
            time.sleep(0.2)


class Checkpointer:
    """Saves and restores a state under workdir/checkpoints: a TrainState, or another dataclass that has a `step`, and
    `split` and `join` to divide it into `params` and `training`.

    config: None = read-only: never deletes temporary files, which may be those of a running training.
    """

    def __init__(self, workdir, config: CheckpointConfig | None = None):
        logging.set_verbosity(logging.ERROR)  # Orbax's progress messages would hide ours
        logging.get_absl_handler().python_handler.addFilter(_not_about_full_disk)
        if sys.excepthook is not _without_closed_loops:
            global _excepthook
            _excepthook, sys.excepthook = sys.excepthook, _without_closed_loops
        self.workdir = paths.local(workdir)
        self.directory = self.workdir.resolve() / "checkpoints"
        paths.check_workdir(self.workdir)
        if not paths.is_remote(self.directory):
            self.directory = _LocalPath(self.directory)
        self._owner = config is not None
        self._config = config or CheckpointConfig()
        self._keep = _Keep(self._config)
        self._best = self._read_best()  # {'step', 'loss'}
        self._keep.best = self._best and self._best["step"]
        self._manager = None
        self._failed: str | None = None
        self._trusted = False  # whether a checkpoint of this start has been read back
        self.best_written, self._losses = True, {}  # whether best.json is up to date; {step: loss}

    @property
    def best(self) -> int | None:
        """Step of the best evaluated checkpoint."""
        return self._keep.best

    @property
    def manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._keep,
                cleanup_tmp_directories=self._owner,
                enable_async_checkpointing=True,
            )
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def save(self, step: int, state, meta: dict | None = None) -> bool:
        """Starts writing and returns at once, except for the first checkpoint, which is waited for and read back. A
        full disk is reported and not raised: training continues and the older checkpoints are kept. Raises InputError
        if the first checkpoint cannot be restored."""
        self._write_best()
        if step in self.manager.all_steps():
            return True
        params, training = state.split()
        record = {"step": step, "digests": digests({"params": params, **training}), **(meta or {})}
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(params),
            training=ocp.args.PyTreeSave(training),
            meta=ocp.args.JsonSave(record),
        )
        started = self._guarded(step, lambda: self.manager.save(step, args=items))
        if self._trusted:
            return started
        written = hosts.all_true(started and self.wait())
        return written and self._read_back(step, {"params": params, "training": training})

    def save_params(self, step: int, params, meta: dict | None = None):
        """Saves parameters alone, without training state: of an imported or a frozen model."""
        record = {"step": step, "digests": digests({"params": params}), **(meta or {})}
        items = ocp.args.Composite(params=ocp.args.PyTreeSave(params), meta=ocp.args.JsonSave(record))
        if not (self._guarded(step, lambda: self.manager.save(step, args=items)) and self.wait()):
            raise InputError(self._failed)
        self._read_back(step, {"params": params})

    def _read_back(self, step: int, items: dict) -> bool:
        """Restores arrays of a checkpoint just written and compares their digests: the smallest of each item, up to
        _READ_BACK bytes, so that a large model takes neither much time nor memory for a second copy."""

        def chosen(tree):
            leaves, structure = jax.tree.flatten(tree)
            order = sorted(range(len(leaves)), key=lambda i: leaves[i].nbytes)
            ends = itertools.accumulate(leaves[i].nbytes for i in order)
            read = set(order[: max(1, sum(end <= _READ_BACK for end in ends))])
            shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
            return structure.unflatten([shape(x) if i in read else ... for i, x in enumerate(leaves)])

        reason = "another host cannot read it"
        try:
            self._restore_targets(step, {name: chosen(tree) for name, tree in items.items()})
            found = True
        except Exception as error:  # orbax raises many kinds
            found, reason = False, str(error).strip().split("\n")[0][:300]
        if not hosts.all_true(found):
            raise InputError(
                f"Checkpoint {step} was written to {self.directory} and cannot be read back ({reason}): no run "
                "could be resumed from here. Give a --workdir on other storage."
            )
        self._trusted = True
        return True

    def wait(self) -> bool:
        """Waits until pending writes are on disk; False if they could not be written."""
        self._write_best()
        return self._guarded(None, self.manager.wait_until_finished)

    def close(self):
        if self._manager is not None:
            self.wait()
            self._manager.close()
            self._manager = None

    def _guarded(self, step, action) -> bool:
        try:
            action()
            return True
        except (ValueError, OSError) as error:
            full = "RESOURCE_EXHAUSTED" in str(error) or _means_full_disk(str(error))
            if not full and getattr(error, "errno", 0) not in (errno.ENOSPC, errno.EDQUOT):
                raise
        if hosts.first():
            for leftover in self.directory.glob("*.orbax-checkpoint-tmp*"):
                _remove(leftover)
        good = self.steps()
        self._drop_best(good)
        self._failed = (
            f"the disk of {self.directory} is full: the checkpoint being written was dropped. "
            f"Older ones are complete ({', '.join(map(str, good)) or 'none'}). "
            "Free some space; the next checkpoint will be written as scheduled."
        )
        print(f"warning: {self._failed}", file=sys.stderr)
        return False

    # --- best -----------------------------------------------------------------------------------------

    def _read_best(self):
        path = self.directory / "best.json"
        try:
            return json.loads(path.read_text()) if path.exists() else None
        except json.JSONDecodeError:
            return None  # incomplete; the next evaluation writes a new one

    def report(self, step: int, loss: float | None):
        """Records the loss of an evaluated step; the best saved checkpoint is kept. loss: None if it was not finite.

        If best.json cannot be written (a full disk), it is retried with the next checkpoint."""
        if loss is not None:
            self._losses[step] = loss
        better = loss is not None and math.isfinite(loss) and (not self._best or loss < self._best["loss"])
        if self._config.keep_best and better and step in self.manager.all_steps():
            self._best, self._keep.best, self.best_written = {"step": step, "loss": loss}, step, False
            self._write_best()

    def _write_best(self):
        if not self.best_written:
            path = self.directory / "best.json"
            write = lambda: write_json(path, self._best) if self._best else path.unlink(missing_ok=True)
            self.best_written = not hosts.first() or files.attempt(path, write)

    def _drop_best(self, good: list[int]):
        """If the best checkpoint could not be written after all, selects the best of those that exist."""
        if self._best and self._best["step"] not in good:
            losses = {s: loss for s, loss in self._losses.items() if s in good and math.isfinite(loss)}
            step = min(losses, key=losses.get, default=None)
            self._best = None if step is None else {"step": step, "loss": losses[step]}
            self._keep.best, self.best_written = step, False
            self._write_best()

    # --- restore --------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first."""
        return sorted(self.manager.all_steps(read=True)) if self.directory.exists() else []

    def restore(self, abstract, shardings) -> tuple | None:
        """(state, meta) of the newest good checkpoint, sharded by `shardings` (any mesh); None if there is no
        checkpoint. Raises InputError if there are some and none is good."""

        def load(step):
            items, places = (dict(zip(("params", "training"), s.split(), strict=True)) for s in (abstract, shardings))
            restored, meta = self._restore_items(step, items, places)
            step = jax.device_put(jnp.int32(step), shardings.step)
            return abstract.join(step, restored["params"], restored["training"]), meta

        return self._newest_good(load)

    def restore_params(self, abstract, shardings, step: int | None = None) -> tuple[dict, dict] | None:
        """(parameters, meta) of the newest good checkpoint, or of a given step."""

        def load(step):
            restored, meta = self._restore_items(step, {"params": abstract}, {"params": shardings})
            return restored["params"], meta

        return self._newest_good(load, step)

    def weights(self, step: int) -> str:
        """Digest of a checkpoint's parameters, recorded when they were saved."""
        items = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))
        return combined(items["meta"]["digests"])

    def _restore_items(self, step, items, places):
        place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        return self._restore_targets(step, {name: jax.tree.map(place, x, places[name]) for name, x in items.items()})

    def _restore_targets(self, step, items):
        """(trees, meta) of a checkpoint, verified. items: {name: tree of shapes with shardings, and of `...` for leaves
        that are not read}."""
        arguments = {}
        for name, target in items.items():
            arguments[name] = ocp.args.PyTreeRestore(
                item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
            )
        restored = self.manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **arguments))
        trees = {name: restored[name] for name in items}
        meta = dict(restored["meta"])
        flat = {"params": trees["params"], **trees.get("training", {})}
        found, wrote = digests(jax.tree.map(lambda x: None if x is ... else x, flat)), meta.pop("digests")
        wrong = [path for path, value in found.items() if wrote.get(path) != value]
        if wrong:
            raise _Damaged(f"the digest of {', '.join(wrong[:3])} does not match what was saved")
        return trees, meta

    def _newest_good(self, load, step=None):
        steps = self.steps() if step is None else [step]
        if not steps:
            return None
        for step in reversed(steps):
            found, reason = None, "another host cannot read it"
            try:
                found = load(step)
            except Exception as error:  # orbax raises many kinds for a damaged directory
                reason = str(error).strip().split("\n")[0][:300]
            if hosts.all_true(found is not None):
                return found
            print(f"warning: checkpoint {step} is damaged, trying an older one: {reason}", file=sys.stderr)
        raise InputError(
            f"No checkpoint in {self.directory} could be restored (tried {', '.join(map(str, reversed(steps)))}). "
            "If the model's config was changed, undo that; otherwise start again in a new --workdir."
        )

    def drop_after(self, step: int):
        """Moves checkpoints newer than the restored one to checkpoints-damaged."""
        newer = hosts.from_first(lambda: [s for s in self.steps() if s > step])  # no other host lists while it moves
        hosts.only_first(lambda: [self._move_aside(s) for s in newer])
        if self._keep.best in newer:
            self._best = self._keep.best = None
        self.manager.reload()

    def _move_aside(self, step: int):
        aside = self.directory.parent / "checkpoints-damaged"
        aside.mkdir(parents=True, exist_ok=True)
        (aside / str(step)).rmtree(missing_ok=True)
        (self.directory / str(step)).rename(aside / str(step))
        print(f"warning: checkpoint {step} was moved to {aside}", file=sys.stderr)
        if self._keep.best == step:
            (self.directory / "best.json").unlink(missing_ok=True)


class _Damaged(Exception):
    pass
