"""config.json: which run a workdir holds, and what may change when it is resumed."""

import dataclasses
import functools
import json
import socket

from gptjax import paths
from gptjax.config import RENAMED, to_json
from gptjax.config import defaults as defaults_of
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.json_files import write_json

# What may differ between two starts of one run: where and how fast it runs, not what it computes.
_MAY_CHANGE = (
    "mesh", "checkpoint", "eval", "log", "steps", "tokens", "epochs", "episodes", "steps_per_dispatch", "samples",
    "offload", "microbatch_size", "loss_chunk", "noise_scale", "rollout.forward_rows", "ppo.microbatch_size",
    "model.remat", "model.pipeline_microbatches", "model.pipeline_virtual_stages", "optimizer.offload", "data.cache",
    "mix.cache", "ptx.cache",
)  # fmt: skip


def claim_workdir(workdir, stage: str, config, *, kind: str = "lm", **sections) -> bool:
    """Writes config.json into a new workdir, or checks that the one there is the same run's.

    kind: of the model that the workdir holds, 'lm' or 'scalar'. sections: what takes the place of the config's own
    or is added to it (the whole model, where the config overrides a part of one). `origin`: {<field>_<what>: value} of
    the models in the workdirs that the config's fields name (trained.origin); a value left out is not compared.
    Returns whether the run is being resumed. Raises InputError listing the keys that differ. Of many hosts one
    claims it for all.
    """
    resumed = hosts.from_first(lambda: _claim(paths.local(workdir), {"stage": stage, "kind": kind}, config, sections))
    if not (paths.local(workdir) / "config.json").exists():
        raise InputError(
            f"The config.json that process 0 wrote to {workdir} is missing on {socket.gethostname()}: give a --workdir "
            "on storage that all hosts share (all of them write checkpoints)."
        )
    return resumed


def _claim(workdir, about: dict, config, sections) -> bool:
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "config.json"
    new = {**about, **to_json(config), **{name: to_json(section) for name, section in sections.items()}}
    local = _absolute_paths(new, config, workdir)
    if not path.exists():
        refuse_orphans(workdir, bool(_steps(workdir)))
        write_json(path, new)
        return False
    old = read_config(workdir)
    moved = _compare_origin(workdir, old, new, bool(_steps(workdir)))
    a, b = _flatten(old), _flatten({k: v for k, v in new.items() if k != "paths"})
    different = [k for k in sorted(a.keys() | b.keys()) if a.get(k) != b.get(k)]
    different = [k for k in different if not (k in local and a.get(k) and b.get(k) and paths.same(a[k], b[k]))]
    within = lambda k, names: any(k == n or k.startswith(f"{n}.") for n in names)
    # A key absent from the saved config came with a later version: its default value is assumed.
    defaults = _flatten(defaults_of(config)) if dataclasses.is_dataclass(config) else {}
    later = {k for k in b.keys() - a.keys() if not within(k, a) and k in defaults and b[k] == defaults[k]}
    may_change = (*_MAY_CHANGE, "origin", *moved)
    fatal = [k for k in different if k not in later and not within(k, may_change)]
    if fatal:
        lines = "\n".join(f"  {k}: saved {a.get(k)!r}, requested {b.get(k)!r}" for k in fatal)
        raise InputError(
            f"{workdir} holds another run's config:\n{lines}\n"
            "Give another --workdir, or the same config to resume that run."
        )
    for k in different:
        if k in later:
            if not within(k, _MAY_CHANGE):
                print(f"config.{k} is newer than this run, which continues with {b[k]!r}")
        elif not within(k, ("origin",)):
            print(f"config.{k} changed from {a.get(k)!r} to {b.get(k)!r} since this run began")
    write_json(path, new)
    return True


def has_checkpoints(workdir) -> bool:
    """Whether a run can resume from a checkpoint of its own; the same on all hosts."""
    return hosts.from_first(lambda: bool(_steps(workdir)))


def refuse_orphans(workdir, checkpoints: bool):
    """InputError: a workdir without config.json has checkpoints."""
    if checkpoints:
        raise InputError(
            f"{workdir} has checkpoints but no config.json, so it is unknown which run they are of: restore it, or "
            "give another --workdir."
        )


def _steps(workdir) -> list[str]:
    directory = paths.local(workdir) / "checkpoints"
    return [p.name for p in directory.iterdir() if p.name.isdecimal()] if directory.is_dir() else []


def _absolute_paths(new: dict, config, workdir) -> set[str]:
    """Makes the config's local paths absolute in `new` and adds its section `paths`: {dotted key: from the workdir}.
    Returns the dotted keys."""
    found = {}
    for key, names in (paths.fields(type(config)) if dataclasses.is_dataclass(config) else {}).items():
        *sections, name = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, new)
        if paths.is_path(section.get(name), names):
            section[name] = paths.absolute(section[name])
            found[key] = paths.relative(section[name], workdir)
    if found:
        new["paths"] = found
    return set(found)


_CHANGED = {"step": "is at step {} now and was at {} then", "weights": "has other weights now",
            "tokenizer": "has another tokenizer now", "bias": "has the bias {} now and had {} then"}  # fmt: skip


def _compare_origin(workdir, old: dict, new: dict, has_checkpoints: bool) -> set[str]:
    """InputError where a model that the run depends on is another one than when the run began. What is not known now
    stays as it was. Returns the fields whose workdir has the same weights, wherever it is now."""
    then, now = old.get("origin") or {}, new.get("origin") or {}
    same = {key.removesuffix("_weights") for key in now if key.endswith("_weights") and then.get(key) == now[key]}
    changed, unknown = [], set()
    for key, value in now.items():
        name, _, what = key.rpartition("_")
        where = _flatten(new).get(name)
        if key not in then:
            unknown.add(f"{name} ({where})")
        elif value != then[key] and name == "init_from" and has_checkpoints and what != "tokenizer":
            now[key] = then[key]
            if what == "weights":  # they were needed at step 0 alone
                print(f"note: The weights in {where} have changed since this run began from them. It continues from "
                      "its own checkpoint.")  # fmt: skip
        elif value != then[key]:
            changed.append(f"  {name}: {where} {_CHANGED[what].format(value, then[key])}")
    if changed:
        raise InputError(
            f"{workdir} began with other models than there are now:\n" + "\n".join(changed) + "\n"
            "Put back what was there, or start again in a new --workdir."
        )
    for name in sorted(unknown):
        print(f"note: This run was started by an earlier version, which kept no digest of {name}: it is assumed "
              "to be unchanged.")  # fmt: skip
    if then or now:
        new["origin"] = {**then, **now}
    return same


def read_config(workdir) -> dict:
    """A workdir's config.json as a dict, its paths as they are to be opened from here. Raises InputError if there is
    none or it is damaged."""
    workdir = paths.local(workdir)
    path = workdir / "config.json"
    if not path.exists():
        why = "it has no config.json" if workdir.exists() else "there is no such folder"
        raise InputError(f"{workdir} is not a workdir: {why}. Give the --workdir of a training run.")
    try:
        run = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is damaged ({error}): restore it or start a new workdir.") from error
    _upgrade(run, workdir)
    for key, relative in run.pop("paths", {}).items():
        *sections, name = key.split(".")
        section = functools.reduce(dict.__getitem__, sections, run)
        section[name] = paths.resolve(section[name], relative, workdir)
    return run


def _upgrade(run: dict, workdir):
    """Converts a config.json of an earlier version, in place, to today's keys."""
    for old, new in RENAMED.items():
        _rename(run, old.split("."), new.split(".")[-1])
    stage = run.get("stage")
    run.setdefault("kind", "scalar" if stage == "reward" else "lm")
    if stage == "convert":
        run.setdefault("without_tokenizer", not (workdir / "tokenizer").exists())


def _rename(section: dict, path: list[str], name: str):
    *sections, old = path
    for key in sections:
        section = section.get(key) or {}
    if old in section:
        section[name] = section.pop(old)


def _flatten(d, prefix=""):
    flat = {}
    for key, value in d.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
