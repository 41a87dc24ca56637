"""Checkpoints that are damaged, half-written, too many, on a full disk or wanted on another mesh."""

import contextlib
import json
import os
import shutil
import subprocess
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from gptjax import run
from gptjax.errors import InputError
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.training import checkpoint
from gptjax.training.checkpoint import CheckpointConfig, Checkpointer, digests
from gptjax.training.precision import LossScale
from gptjax.training.state import TrainState

DISK_FULL = "RESOURCE_EXHAUSTED: Error writing: No space left on device"
SPECS = {"kernel": PartitionSpec(None, "fsdp"), "wte": PartitionSpec("fsdp", "tensor"), "bias": PartitionSpec()}
SHAPES = {"kernel": (160, 64), "wte": (64, 16), "bias": (7,)}


@pytest.fixture(scope="module")
def one_device():
    return shardings(MeshConfig(data=1), jax.devices()[:1])


def shardings(config, devices=None):
    mesh = make_mesh(config, devices)
    tree = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    whole = NamedSharding(mesh, PartitionSpec())
    return TrainState(whole, tree, optax.TraceState(tree), LossScale(whole, whole))


def make_state(step, where):
    """Noise in every bit (NaN left out), so that nothing on disk is compressed away."""
    rng = np.random.default_rng(step)
    noise = lambda shape: (rng.integers(0, 2**32, shape, np.uint32) & np.uint32(0xBFFFFFFF)).view(np.float32)
    tree = lambda: {name: noise(shape) for name, shape in SHAPES.items()}
    state = TrainState(
        np.int32(step), tree(), optax.TraceState(tree()), LossScale(np.float32(2.0**step), np.int32(step))
    )
    return jax.tree.map(jax.device_put, state, where)


def abstract():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_state(0, shardings(MeshConfig())))


def assert_bitwise(a, b):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def written(tmp_path_factory, one_device):
    """A workdir with the checkpoints of steps 1 and 2, to be copied."""
    workdir = tmp_path_factory.mktemp("written")
    checkpointer = Checkpointer(workdir)
    for step in (1, 2):
        checkpointer.save(step, make_state(step, one_device), {"seconds": step / 2, "data": "these"})
    checkpointer.close()
    return workdir


@pytest.fixture
def workdir(written, tmp_path):
    shutil.copytree(written / "checkpoints", tmp_path / "checkpoints")
    return tmp_path


def restore(workdir, where):
    checkpointer = Checkpointer(workdir)
    try:
        return checkpointer.restore(abstract(), where)
    finally:
        checkpointer.close()


def damage(workdir, step=2, tree="params", name="kernel"):
    """Flips 4 bytes inside a stored array; where, is found by the array's own bytes."""
    state = make_state(step, shardings(MeshConfig(data=1), jax.devices()[:1]))
    inside = np.asarray((state.params if tree == "params" else state.opt_state.trace)[name]).tobytes()[-40:-36]
    item = "params" if tree == "params" else "training"
    for path in (workdir / "checkpoints" / str(step) / item).rglob("*"):
        content = bytearray(path.read_bytes()) if path.is_file() else b""
        at = content.find(inside)
        if at >= 0:
            content[at : at + 4] = bytes(b ^ 0xFF for b in inside)
            path.write_bytes(content)
            return
    raise AssertionError("the array's bytes are not on disk as they are: change this test")


# --- digests ----------------------------------------------------------------------------------------------


def digest(values):
    return digests({"a": jnp.asarray(values)})


arrays = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).integers(0, 2**32, (5, 8), np.uint32) & np.uint32(0xBFFFFFFF)
)


@pytest.mark.parametrize("at", [0, 1, 22, 39])
def test_any_flipped_bit_shows(at):
    bits = np.random.default_rng(at).integers(0, 2**32, (5, 8), np.uint32) & np.uint32(0xBFFFFFFF)
    assert digest(bits.view(np.float32)) == digest(bits)  # it is of the bits, whatever they mean
    for bit in range(32):
        other = bits.copy()
        other.flat[at] ^= np.uint32(1 << bit)
        assert digest(bits) != digest(other), bit


@settings(max_examples=25, deadline=None)
@given(arrays, st.integers(0, 39), st.integers(0, 39))
def test_swapped_elements_show(bits, i, j):
    other = bits.copy()
    other.flat[[i, j]] = other.flat[[j, i]]
    assert (digest(bits) == digest(other)) == np.array_equal(bits, other)


def test_values_that_differ_in_their_sign_alone_show_when_swapped():
    assert digest(np.float32([1, -1])) != digest(np.float32([-1, 1]))


def test_two_flipped_signs_show():
    assert digest(np.float32([1, 2, 3, 4])) != digest(np.float32([-1, 2, -3, 4]))


def test_powers_of_two_far_apart_show_when_swapped():
    a = np.ones(513, np.float32)
    b = a.copy()
    a[0], b[512] = 2, 2
    assert digest(a) != digest(b)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_every_dtype_has_a_digest(dtype):
    a = np.array([0, 1, 0, 1, 1], dtype)
    b = a.copy()
    b[0] = 1
    assert digest(a) == digest(a.copy()) != digest(b)
    assert digest(np.zeros((), dtype)) == digest(np.zeros((), dtype))


@pytest.mark.parametrize("mesh", [dict(data=1, fsdp=8), dict(data=2, fsdp=2, tensor=2)])
def test_a_digest_does_not_depend_on_the_sharding(mesh, one_device):
    state = make_state(3, one_device)
    assert digests(state) == digests(make_state(3, shardings(MeshConfig(**mesh))))
    assert digests(state) == digests(jax.device_get(state))


# --- damage -----------------------------------------------------------------------------------------------


def test_what_was_saved_is_restored(workdir, one_device):
    state, meta = restore(workdir, one_device)
    assert_bitwise(state, make_state(2, one_device))
    assert meta == {"step": 2, "seconds": 1.0, "data": "these"}


def test_nothing_saved_is_none(tmp_path, one_device):
    assert restore(tmp_path, one_device) is None
    assert Checkpointer(tmp_path).steps() == []


@pytest.mark.parametrize("tree, name", [("params", "kernel"), ("params", "wte"), ("training", "kernel")])
def test_flipped_bytes_inside_an_array_fall_back_and_say_so(workdir, one_device, capsys, tree, name):
    """Orbax itself restores these without a word."""
    damage(workdir, tree=tree, name=name)
    state, meta = restore(workdir, one_device)
    assert_bitwise(state, make_state(1, one_device))
    assert meta["step"] == 1
    warning = capsys.readouterr().err
    assert (
        "checkpoint 2 is damaged, trying an older one" in warning and f"['{name}']" in warning and "digest" in warning
    )


def files(workdir, step=2):
    there = (workdir / "checkpoints" / str(step)).rglob("*")
    return sorted((p for p in there if p.is_file()), key=lambda p: (p.stat().st_size, str(p)))


def truncate(workdir):
    path = files(workdir)[-1]
    os.truncate(path, path.stat().st_size // 2)


def lose_an_item(name):
    return lambda workdir: shutil.rmtree(workdir / "checkpoints" / "2" / name)


def empty(workdir):
    shutil.rmtree(workdir / "checkpoints" / "2")
    (workdir / "checkpoints" / "2").mkdir()


def cut_json(workdir):
    path = next(p for p in (workdir / "checkpoints" / "2" / "meta").rglob("*") if b"digests" in p.read_bytes())
    path.write_bytes(path.read_bytes()[:50])


DAMAGES = {
    "truncated file": truncate, "no parameters": lose_an_item("params"), "no optimizer": lose_an_item("training"),
    "no meta": lose_an_item("meta"), "empty directory": empty, "cut meta": cut_json,
}  # fmt: skip


@pytest.mark.parametrize("harm", DAMAGES.values(), ids=DAMAGES)
def test_a_half_written_checkpoint_falls_back(workdir, one_device, capsys, harm):
    harm(workdir)
    state, _ = restore(workdir, one_device)
    assert_bitwise(state, make_state(1, one_device))
    assert "checkpoint 2 is damaged" in capsys.readouterr().err


def test_a_save_that_was_killed_is_no_checkpoint(workdir, one_device, capsys):
    killed = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    shutil.copytree(workdir / "checkpoints" / "2" / "params", killed / "params")
    state, _ = restore(workdir, one_device)
    assert int(state.step) == 2 and "damaged" not in capsys.readouterr().err


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_byte_changes_no_wrong_value_is_restored(written, tmp_path_factory, one_device, data):
    workdir = tmp_path_factory.mktemp("byte")
    shutil.copytree(written / "checkpoints", workdir / "checkpoints")
    path = data.draw(st.sampled_from(files(workdir)), label="file")
    content = bytearray(path.read_bytes())
    if content:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
    state, _ = restore(workdir, one_device)
    assert_bitwise(state, make_state(int(state.step), one_device))


def test_all_damaged_is_an_error_that_names_them(workdir, one_device):
    damage(workdir, 1)
    damage(workdir, 2)
    with pytest.raises(InputError, match=r"No checkpoint in .*tried 2, 1.*--workdir"):
        restore(workdir, one_device)


def test_parameters_alone_are_verified_too(workdir, one_device, capsys):
    damage(workdir)
    checkpointer = Checkpointer(workdir)
    params, meta = checkpointer.restore_params(abstract().params, one_device.params)
    assert meta["step"] == 1 and "damaged" in capsys.readouterr().err
    assert_bitwise(params, make_state(1, one_device).params)
    with pytest.raises(InputError, match="tried 2"):  # asked for by its number, no other will do
        checkpointer.restore_params(abstract().params, one_device.params, 2)
    checkpointer.close()


def test_after_falling_back_the_damaged_step_can_be_saved_again(workdir, one_device):
    damage(workdir)
    checkpointer = Checkpointer(workdir)
    state, _ = checkpointer.restore(abstract(), one_device)
    checkpointer.drop_after(int(state.step))
    assert checkpointer.steps() == [1]
    assert checkpointer.save(2, make_state(2, one_device))
    checkpointer.close()
    assert_bitwise(restore(workdir, one_device)[0], make_state(2, one_device))


def test_a_reader_leaves_the_save_of_a_running_training_alone(workdir, one_device):
    """`sample` and `evaluate` open a running workdir; what is being written there is not theirs to clean up."""
    being_written = workdir / "checkpoints" / "3.orbax-checkpoint-tmp"
    being_written.mkdir()
    (being_written / "file").write_text("half a checkpoint")
    reader = Checkpointer(workdir)
    reader.restore_params(abstract().params, one_device.params)
    reader.close()
    assert (being_written / "file").exists()


def test_weights_alone_can_be_saved(tmp_path, one_device):
    params = make_state(4, one_device).params
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save_params(0, params, {"from": "elsewhere"})
    got, meta = checkpointer.restore_params(abstract().params, one_device.params)
    assert_bitwise(got, params)
    assert meta == {"step": 0, "from": "elsewhere"}
    checkpointer.close()


# --- resumed ----------------------------------------------------------------------------------------------


def resume(workdir, where, **given):
    with contextlib.closing(Checkpointer(workdir, CheckpointConfig())) as checkpointer:
        of_run = {"data": "these", "changed": "The data changed.", "total": 2, "unit": "step"}
        stage = types.SimpleNamespace(abstract=abstract(), shardings=where, **{**of_run, **given})
        return run.resume(checkpointer, stage)


def test_a_run_goes_on_from_its_newest_good_checkpoint_and_puts_a_damaged_one_away(workdir, one_device, capsys):
    damage(workdir)
    state, seconds = resume(workdir, one_device, total=9, unit="iteration")
    assert (int(state.step), seconds) == (1, 0.5)
    assert "resuming from iteration 1 of 9" in capsys.readouterr().out
    assert (workdir / "checkpoints-damaged" / "2").exists() and not (workdir / "checkpoints" / "2").exists()


def test_a_new_run_has_nothing_to_take_up(tmp_path, one_device):
    assert resume(tmp_path, one_device) == (None, 0.0)


@pytest.mark.parametrize(
    "given, match",
    [
        ({"data": "others"}, "The data changed"),
        ({"total": 1}, "has done 2 steps, more than the 1 asked for: raise --config.steps"),
    ],
)
def test_other_data_and_too_few_steps_are_refused(workdir, one_device, given, match):
    with pytest.raises(InputError, match=match):
        resume(workdir, one_device, **given)


# --- another mesh -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "saved, wanted",
    [
        (dict(data=2, fsdp=2, tensor=2), dict(data=1, fsdp=8)),
        (dict(data=8), None),
    ],
)
def test_restored_onto_another_mesh_bitwise(tmp_path, one_device, saved, wanted):
    there = shardings(MeshConfig(**wanted)) if wanted else one_device
    checkpointer = Checkpointer(tmp_path)
    checkpointer.save(5, make_state(5, shardings(MeshConfig(**saved))))
    checkpointer.close()
    state, _ = restore(tmp_path, there)
    assert_bitwise(state, make_state(5, one_device))
    for got, place in zip(jax.tree.leaves(state), jax.tree.leaves(there), strict=True):
        assert got.sharding.is_equivalent_to(place, got.ndim)


# --- which are kept ---------------------------------------------------------------------------------------


def keep(workdir, config, losses, where):
    """Saves steps 1.. and reports their losses (None: not evaluated); steps on disk after each."""
    checkpointer, history = Checkpointer(workdir, config), []
    state = make_state(0, where)
    for step, loss in enumerate(losses, 1):
        checkpointer.save(step, state)
        if loss is not None:
            checkpointer.report(step, loss)
        checkpointer.wait()
        history.append(Checkpointer(workdir).steps())
    checkpointer.close()
    return history


def test_the_newest_an_older_best_and_milestones_are_kept(tmp_path, one_device):
    """And a new best replaces the old one."""
    config = CheckpointConfig(keep_last=1, keep_every=3)
    history = keep(tmp_path, config, [3.0, 1.0, 2.0, 0.5, 4.0, 4.0, 4.0], one_device)
    assert history[3] == [2, 3, 4] and history[-1] == [3, 4, 6, 7]
    assert json.loads((tmp_path / "checkpoints" / "best.json").read_text()) == {"step": 4, "loss": 0.5}


def test_the_best_is_remembered_by_the_next_process(tmp_path, one_device):
    keep(tmp_path, CheckpointConfig(keep_last=1), [1.0], one_device)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep_last=1))
    for step in (2, 3):
        checkpointer.save(step, make_state(0, one_device))
        checkpointer.report(step, 2.0)
    checkpointer.close()
    assert Checkpointer(tmp_path).steps() == [1, 3]


def test_half_a_record_of_the_best_is_no_record(workdir, one_device):
    (workdir / "checkpoints" / "best.json").write_text('{"step": 1, "lo')
    checkpointer = Checkpointer(workdir)
    checkpointer.report(2, 3.0)
    assert json.loads((workdir / "checkpoints" / "best.json").read_text())["step"] == 2
    checkpointer.close()


@settings(max_examples=3, deadline=None)
@given(
    losses=st.lists(st.one_of(st.none(), st.integers(0, 4).map(float)), min_size=1, max_size=6),
    last=st.integers(1, 3), best=st.booleans(), every=st.integers(0, 3),
)  # fmt: skip
def test_the_policy_keeps_exactly_what_it_says(tmp_path_factory, one_device, losses, last, best, every):
    history = keep(tmp_path_factory.mktemp("keep"), CheckpointConfig(1, last, best, every), losses, one_device)
    for step, there in enumerate(history, 1):
        known = [(loss, s) for s, loss in enumerate(losses[: step - 1], 1) if loss is not None]  # when it was saved
        expected = set(range(max(step - last, 0) + 1, step + 1))
        expected |= {s for s in range(1, step + 1) if every and s % every == 0}
        expected |= {min(known)[1]} if known and best else set()
        assert there == sorted(expected)


@pytest.mark.parametrize("fields", [{"every": 0}, {"keep_last": 0}, {"keep_every": -1}])
def test_bad_policies(fields):
    with pytest.raises(InputError, match="checkpoint: "):
        CheckpointConfig(**fields)


# --- a full disk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "where, error",
    [("save", ValueError(DISK_FULL)), ("wait_until_finished", OSError(28, "No space left on device"))],
)
def test_a_full_disk_is_told_and_the_older_checkpoints_stay(workdir, one_device, capsys, monkeypatch, where, error):
    checkpointer = Checkpointer(workdir)
    assert checkpointer.save(3, make_state(3, one_device)) and checkpointer.wait()
    (workdir / "checkpoints" / "4.orbax-checkpoint-tmp" / "params").mkdir(parents=True)

    def full(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpointer.manager, where, full)
        ok = checkpointer.save(4, make_state(4, one_device)) if where == "save" else checkpointer.wait()
    assert ok is False
    warning = capsys.readouterr().err
    assert "is full" in warning and "2, 3" in warning and "Free some space" in warning
    assert not list((workdir / "checkpoints").glob("*tmp*"))  # what it had written is freed at once
    assert checkpointer.steps() == [2, 3]
    assert checkpointer.save(5, make_state(5, one_device)) and checkpointer.wait()
    checkpointer.close()
    assert_bitwise(restore(workdir, one_device)[0], make_state(5, one_device))


def test_another_error_while_saving_is_not_swallowed(workdir, one_device, monkeypatch):
    checkpointer = Checkpointer(workdir)
    monkeypatch.setattr(checkpointer.manager, "save", lambda *_, **__: (_ for _ in ()).throw(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        checkpointer.save(3, make_state(3, one_device))


@pytest.fixture
def small_disk(tmp_path):
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(where)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root and mount for a disk of 1 MiB")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_real_full_disk(small_disk, one_device, capsys):
    """Some 100 kB a checkpoint; the rest of the disk is taken away and given back."""
    config = CheckpointConfig(keep_last=9)
    checkpointer = Checkpointer(small_disk, config)
    assert checkpointer.save(1, make_state(1, one_device)) and checkpointer.wait()
    filler = small_disk / "filler"
    free = shutil.disk_usage(small_disk).free
    filler.write_bytes(b"x" * (free - 40_000))
    assert not (checkpointer.save(2, make_state(2, one_device)) and checkpointer.wait())
    assert "is full" in capsys.readouterr().err
    assert checkpointer.steps() == [1] and not list((small_disk / "checkpoints").glob("*tmp*"))
    assert_bitwise(checkpointer.restore(abstract(), one_device)[0], make_state(1, one_device))
    filler.unlink()
    assert checkpointer.save(3, make_state(3, one_device)) and checkpointer.wait()
    checkpointer.close()
    assert Checkpointer(small_disk).steps() == [1, 3]
    assert_bitwise(restore(small_disk, one_device)[0], make_state(3, one_device))


def test_a_disk_that_is_full_at_the_first_checkpoint(small_disk, one_device, capsys):
    """Training goes on, and the first one that does fit is the one that is read back."""
    checkpointer = Checkpointer(small_disk, CheckpointConfig(keep_last=9))
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 40_000))
    assert checkpointer.save(1, make_state(1, one_device)) is False
    assert "is full" in capsys.readouterr().err and not checkpointer._trusted
    filler.unlink()
    assert checkpointer.save(2, make_state(2, one_device)) is True
    assert checkpointer._trusted and checkpointer.steps() == [2]
    checkpointer.close()


def test_leftovers_that_are_still_written_into_end_nothing(monkeypatch):
    """Orbax's threads add files to a directory that is being removed: "Directory not empty"."""
    monkeypatch.setattr(checkpoint.time, "sleep", lambda seconds: None)
    for failures, calls in ((2, 3), (99, 10)):
        seen = []

        def rmtree(missing_ok, seen=seen, failures=failures):
            seen.append(missing_ok)
            if len(seen) <= failures:
                raise OSError(39, "Directory not empty")

        checkpoint._remove(types.SimpleNamespace(rmtree=rmtree))
        assert len(seen) == calls


# --- where they lie, and the first one read back ----------------------------------------------------------


@pytest.mark.parametrize("name", ["[2026] thesis/run", "st*r", "q? b#%20{c}:dü"])
def test_folders_with_characters_of_patterns_keep_their_checkpoints(tmp_path, one_device, name):
    (tmp_path / "star" / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir(parents=True)  # what st*r matches too
    checkpointer = Checkpointer(tmp_path / name, CheckpointConfig())
    assert checkpointer.save(3, make_state(3, one_device)) and checkpointer.wait()
    checkpointer._guarded(3, lambda: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    checkpointer.close()
    assert_bitwise(restore(tmp_path / name, one_device)[0], make_state(3, one_device))
    assert (tmp_path / "star" / "checkpoints" / "9.orbax-checkpoint-tmp").exists()


@pytest.mark.parametrize("name, what", [("a\\b", "backslash"), ("gs:/x", "colon"), ("\udcff", "UTF-8")])
def test_folders_that_cannot_keep_checkpoints_are_refused_before_anything_is_written(tmp_path, name, what):
    with pytest.raises(InputError, match=f"{what}.*another --workdir"):
        Checkpointer(tmp_path / name, CheckpointConfig())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("item", ["params", "training"])
def test_a_first_checkpoint_that_does_not_restore_stops_the_run(tmp_path, one_device, item, monkeypatch):
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    wait = checkpointer.manager.wait_until_finished

    def lose():
        wait()
        for manifest in (tmp_path / "checkpoints" / "1" / item).glob("manifest.ocdbt"):
            manifest.unlink()

    monkeypatch.setattr(checkpointer.manager, "wait_until_finished", lose)
    with pytest.raises(InputError, match="Checkpoint 1 was written to .* and cannot be read back"):
        checkpointer.save(1, make_state(1, one_device))


def test_only_the_first_checkpoint_is_read_back_and_of_a_large_one_the_small_arrays(tmp_path, one_device, monkeypatch):
    read, real = [], Checkpointer._restore_targets

    def restore_targets(self, step, items):
        read.append((step, sum(x is not ... for x in jax.tree.leaves(items))))
        return real(self, step, items)

    monkeypatch.setattr(Checkpointer, "_restore_targets", restore_targets)
    monkeypatch.setattr("gptjax.training.checkpoint._READ_BACK", 64 * 16 * 4 + 100)
    checkpointer = Checkpointer(tmp_path, CheckpointConfig())
    for step in (1, 2):
        assert checkpointer.save(step, make_state(step, one_device))
    checkpointer.close()
    assert read == [(1, 6)]  # all but the two kernels of 8
