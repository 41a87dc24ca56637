"""metrics.jsonl and its kin: damaged lines, a full disk, TensorBoard's event file."""

import errno
import json
import os
import struct
import subprocess
import sys

import pytest
from conftest import ROOT
from runs import one_device_environment
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from gptjax.training import files
from gptjax.training.metrics import Events, JsonLines, LogConfig, MetricWriter


class Disk:
    """A disk with room for `room` more bytes (None = plenty) for what files.py writes."""

    def __init__(self, monkeypatch, room=None):
        self.room, real = room, os.pwrite

        def pwrite(file, data, at):
            if self.room is None:
                return real(file, data, at)
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            written = real(file, bytes(data)[: self.room], at)  # as the kernel does: first a part of it
            self.room -= written
            return written

        monkeypatch.setattr(os, "pwrite", pwrite)
        monkeypatch.setattr(files, "_failing", {})


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def records(steps):
    return [{"step": step, "loss": 1 / step} for step in steps]


def filled(path, steps, **kwargs):
    lines = JsonLines(path, **kwargs)
    for record in records(steps):
        lines.write(record)
    return lines


def on_disk(path):
    """Every line of a file, by a reader that forgives nothing."""
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_bytes().decode().splitlines()]


# --- damaged files ----------------------------------------------------------------------------------------


def test_a_damaged_line_costs_no_good_one(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    good = [json.dumps(r).encode() for r in records(range(1, 7))]
    bad = [b'{"step": 3, "lo', b'{"loss": 1.5}', b"17", b"\xff\xfe", b"[" * 100_000, b'{"step": "4"}']
    path.write_bytes(b"\n".join([good[0], *bad[:3], good[1], good[2], *bad[3:], *good[3:], b'{"step": 7, "l']))
    lines = JsonLines(path, start_step=5, once=True)
    assert "6 of 12 lines are damaged and were skipped (line 2, 3, 4, 7, 8, ...)" in capsys.readouterr().err
    assert on_disk(path) == records(range(1, 6))
    lines.write(records([6])[0])
    lines.close()
    assert on_disk(path) == JsonLines.read(path) == records(range(1, 7))
    assert capsys.readouterr().err == ""


def test_a_line_cut_short_by_a_kill_is_nothing_to_warn_of(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "lo')
    assert JsonLines.read(path) == records([1]) and capsys.readouterr().err == ""


def test_a_repeated_step_is_kept_once(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    twice = [{"step": 2, "loss": 9.0}, *records([1, 2, 3]), {"step": 3, "loss": 0.25}]
    path.write_text("".join(json.dumps(line) + "\n" for line in twice))
    JsonLines(path, start_step=3, once=True).close()
    assert on_disk(path) == [*records([1, 2]), {"step": 3, "loss": 0.25}]
    assert "2 lines repeat a step" in capsys.readouterr().err


def test_nul_bytes_of_a_crashed_machine(tmp_path, capsys):
    """Blocks that were never written come back as NUL bytes, with good lines after them."""
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps(r).encode() + b"\n" for r in records(range(1, 4))]
    path.write_bytes(lines[0] + bytes(4096) + lines[1] + lines[2] + bytes(100))
    JsonLines(path, start_step=3).close()
    assert on_disk(path) == records(range(1, 4)) and capsys.readouterr().err == ""


def test_what_is_not_finite_is_null_at_any_depth(tmp_path):
    path, nan = tmp_path / "evaluations.jsonl", float("nan")
    lines = JsonLines(path)
    lines.write({"step": 1, "loss": nan, "parts": {"web": {"loss": -float("inf")}, "books": [1.0, nan]}})
    lines.close()
    assert on_disk(path) == [{"step": 1, "loss": None, "parts": {"web": {"loss": None}, "books": [1.0, None]}}]


# --- a full disk ------------------------------------------------------------------------------------------


def test_lines_wait_for_room_and_are_whole(tmp_path, disk, capsys):
    path = tmp_path / "metrics.jsonl"
    lines = filled(path, range(1, 11))
    lines.flush()
    disk.room = 40  # one line and a half
    for record in records(range(11, 500)):  # more than is collected before it is written
        lines.write(record)
        assert on_disk(path) == records(range(1, 11))
    lines.flush()
    assert on_disk(path) == records(range(1, 11))
    disk.room = None
    lines.flush()
    assert on_disk(path) == records(range(1, 500)) and lines.close() is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "No space left" in said[0] and "complete again" in said[1], said


def test_a_disk_that_stays_full_is_told_at_the_end(tmp_path, disk, capsys):
    writer = MetricWriter(tmp_path, LogConfig(tensorboard=True))
    writer.train({"step": 1, "loss": 1.0})
    writer.evaluation({"step": 1, "loss": 2.0})
    disk.room = 0
    for step in range(2, 9):
        writer.train({"step": step, "loss": 1.0})
    writer.evaluation({"step": 8, "loss": 2.0})
    writer.samples(8, [{"prompt": "a", "text": "b"}])
    assert [e["step"] for e in writer.evaluations()] == [1, 8]  # as if they had been written
    writer.close()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "metrics.jsonl cannot be written (No space left on device)" in said[0], said
    for what in ("metrics.jsonl lacks its last 7 lines, of steps 2 to 8", "evaluations.jsonl lacks its last 1 lines",
                 "samples.jsonl lacks", "TensorBoard lacks the last 8"):  # fmt: skip
        assert what in said[1]
    assert len(on_disk(tmp_path / "metrics.jsonl")) == 1 and files._failing == {}


def test_what_waits_is_bounded(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(files, "LIMIT", 1000)
    path = tmp_path / "metrics.jsonl"
    disk.room = 0
    lines = filled(path, range(1, 101))
    assert "lacks its last 100 lines, up to step 100" in lines.close()
    disk.room = None
    lines.flush()
    assert 20 < len(on_disk(path)) < 40 and on_disk(path)[-1] == records([100])[0]


def test_resuming_on_a_full_disk_needs_no_room_to_drop_lines(tmp_path, disk):
    path = tmp_path / "metrics.jsonl"
    filled(path, range(1, 21)).close()
    disk.room = 0
    lines = JsonLines(path, start_step=12)
    assert on_disk(path) == records(range(1, 13))
    lines.write(records([13])[0])
    disk.room = None
    lines.close()
    assert on_disk(path) == records(range(1, 14))


def test_a_file_that_someone_deleted_is_begun_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = filled(path, range(1, 4))
    lines.flush()
    path.unlink()
    lines.write(records([4])[0])
    lines.close()
    assert on_disk(path) == records([4])  # no NUL bytes before it


def test_other_errors_are_not_swallowed(tmp_path):
    with pytest.raises(TypeError):
        filled(tmp_path / "metrics.jsonl", []).write({"step": 1, "loss": object()})


def test_a_real_limit_of_the_file_system(tmp_path):
    """The kernel's own answer to a file that may not grow: the first part is written, then EFBIG."""
    script = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from gptjax.training.metrics import JsonLines\n"
        "path = Path(sys.argv[1]) / 'metrics.jsonl'\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))\n"
        "lines = JsonLines(path)\n"
        "for step in range(1, 1001): lines.write({'step': step})\n"
        "lines.flush()\n"
        "assert path.read_bytes().endswith(b'}\\n') and 0 < path.stat().st_size <= 10_000\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))\n"
        "assert lines.close() is None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, env=one_device_environment(), capture_output=True,
        text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and done.stderr.count("cannot be written (File too large)") == 1, done.stderr
    assert [line["step"] for line in on_disk(tmp_path / "metrics.jsonl")] == list(range(1, 1001))


# --- TensorBoard ------------------------------------------------------------------------------------------


def events(directory):
    """Every Event of the one event file, its checksums verified as TensorBoard does."""
    (path,), found, at = directory.iterdir(), [], 0
    content = path.read_bytes()
    while at < len(content):
        length, check = struct.unpack("<QI", content[at : at + 12])
        data = content[at + 12 : at + 12 + length]
        assert check == masked_crc32c(content[at : at + 8])
        assert struct.unpack("<I", content[at + 12 + length : at + 16 + length]) == (masked_crc32c(data),)
        found.append(Event.FromString(data))
        at += 16 + length
    return found


def test_tensorboard_has_every_scalar_also_of_a_time_when_the_disk_was_full(tmp_path, disk):
    board = Events(tmp_path / "tensorboard", start_step=4)
    for step in range(5, 9):
        disk.room = 10 if step in (6, 7) else None
        board.write(step, {"train/loss": 1 / step, "train/mfu": 0.5})
        board.flush()
        assert events(tmp_path / "tensorboard")
    assert board.close() is None
    first, start, *rest = events(tmp_path / "tensorboard")
    assert first.file_version == "brain.Event:2" and (start.step, start.session_log.status) == (5, 1)
    assert [e.step for e in rest] == [5, 6, 7, 8]
    values = {v.tag: v.simple_value for v in rest[1].summary.value}
    assert values == {"train/loss": pytest.approx(1 / 6), "train/mfu": 0.5}
