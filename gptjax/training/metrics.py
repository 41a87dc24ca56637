"""Where metrics are written: metrics.jsonl, TensorBoard, and on request Weights & Biases."""

import dataclasses
import importlib.util
import json
import os
import socket
import struct
import time

from etils import epath
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import masked_crc32c

from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.json_files import dumps
from gptjax.ranges import Count, Seconds
from gptjax.training.files import AppendFile, give_up


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What a run logs.

    every: steps between lines of metrics.jsonl.
    tensorboard: write the metrics to TensorBoard files in the workdir too.
    wandb: send the metrics to Weights & Biases too.
    profile_start: first step of the trace in workdir/profile, counted from where the run starts or resumes.
    profile_steps: how many steps are traced; 0 = no trace.
    stuck_after: seconds without a new step, evaluations and checkpoints included, after which the process prints the
        stack of each of its threads and exits; None = never. With several hosts, one that hangs would keep the others
        waiting forever.
    """

    every: Count = 1
    tensorboard: bool = True
    wandb: bool = False
    profile_start: int = 10
    profile_steps: int = 0
    stuck_after: Seconds | None = None

    def __post_init__(self):
        if self.wandb and importlib.util.find_spec("wandb") is None:
            raise InputError("log.wandb=True needs the package wandb: pip install wandb, or leave it at False.")


class JsonLines:
    """A file of one JSON object per line, each with its `step`, appended to (files.AppendFile).

    Resuming a run at `start_step` drops lines of later steps, damaged lines, and with `once` earlier copies of a step.
    """

    def __init__(self, path, start_step: int = 0, once: bool = False):
        self.path = epath.Path(path)

        def keep(content: bytes) -> bytes:
            found = _parse(content, self.path, once)
            return b"".join(raw + b"\n" for raw, line in found if line["step"] <= start_step)

        self._file = AppendFile(path, keep)

    def write(self, record: dict):
        self._file.add(dumps(record).encode() + b"\n")

    def flush(self):
        self._file.flush()

    def close(self) -> str | None:
        """Writes the rest. Returns a description of what could not be written, or None."""
        if self._file.flush():
            return None
        give_up(self.path)
        steps = [json.loads(line)["step"] for line in self._file.pending]
        if not steps:
            return f"{self.path.name} still has lines after the step that this run resumed from"
        count = len(steps) + self._file.dropped
        of = f"of steps {steps[0]:,} to {steps[-1]:,}" if not self._file.dropped else f"up to step {steps[-1]:,}"
        return f"{self.path.name} lacks its last {count:,} lines, {of}"

    @staticmethod
    def read(path, once: bool = False) -> list[dict]:
        """The records of a file; [] if there is no file. Lines other than JSON objects with a step are skipped with a
        warning. once: keep only the last record of a step."""
        path = epath.Path(path)
        return [line for _, line in _parse(path.read_bytes(), path, once)] if path.exists() else []


def _parse(content: bytes, path, once: bool) -> list[tuple[bytes, dict]]:
    """(bytes, record) of each good line. A warning counts the damaged ones, except an incomplete last line, as a kill
    leaves it. A crash of the machine can leave NUL bytes; what follows them on the line is good."""
    found, damaged = [], []
    *complete, rest = content.split(b"\n")
    for number, raw in enumerate([*complete, rest], 1):
        raw = raw.strip(b"\0 \t\r")
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and type(line.get("step")) is int:
            found.append((raw, line))
        elif raw and number <= len(complete):
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        hosts.warn(f"{path}: {len(damaged)} of {len(complete)} lines are damaged and were skipped (line {shown})")
    by_step = {line["step"]: (raw, line) for raw, line in found}
    if once and len(by_step) < len(found):
        hosts.warn(f"{path}: {len(found) - len(by_step)} lines repeat a step: the last one of each step is kept")
        found = [by_step[step] for step in sorted(by_step)]
    return found


class Events:
    """TensorBoard's event file: a record of length, data and checksums for each Event of tf.summary.

    tensorboardX's own writer has a thread that a full disk ends, which then blocks training.
    """

    def __init__(self, directory, start_step: int):
        now = {"wall_time": time.time()}
        start = SessionLog(status=SessionLog.START)  # hides older records of steps after start_step
        first = [Event(file_version="brain.Event:2", **now), Event(step=start_step + 1, session_log=start, **now)]
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = AppendFile(epath.Path(directory) / name, lambda _: b"".join(map(_framed, first)))

    def write(self, step: int, scalars: dict[str, float]):
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        self._file.add(_framed(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))

    def flush(self):
        self._file.flush()

    def close(self) -> str | None:
        if self._file.flush():
            return None
        give_up(self._file.path)
        return f"TensorBoard lacks the last {len(self._file.pending) + self._file.dropped:,} records"


def _framed(event) -> bytes:
    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksum = lambda part: struct.pack("<I", masked_crc32c(part))
    return length + checksum(length) + data + checksum(data)


class MetricWriter:
    """metrics.jsonl (training), evaluations.jsonl, samples.jsonl, TensorBoard and W&B, from host 0 only.

    A full disk does not stop the run (files.py); close() reports what could not be written.
    """

    def __init__(self, workdir, config: LogConfig, start_step: int = 0, run_config: dict | None = None):
        self.active = hosts.first()
        self._workdir, self._samples, self._last = epath.Path(workdir), None, None
        if not self.active:
            return
        self._train = JsonLines(self._workdir / "metrics.jsonl", start_step, once=True)
        path = self._workdir / "evaluations.jsonl"
        self._eval = JsonLines(path, start_step, once=True)
        self._evaluations = [line for line in JsonLines.read(path, once=True) if line["step"] <= start_step]
        self._board = Events(self._workdir / "tensorboard", start_step) if config.tensorboard else None
        self._wandb = None
        if config.wandb:
            import wandb

            id_file = self._workdir / "wandb_id"
            if not id_file.exists():
                id_file.write_text(wandb.util.generate_id())
            self._wandb = wandb.init(id=id_file.read_text(), resume="allow", config=run_config, dir=str(self._workdir))

    def last(self) -> dict | None:
        """The newest record of metrics.jsonl, also if it was written before the run was resumed."""
        if self._last is None:
            read = lambda: JsonLines.read(self._workdir / "metrics.jsonl", once=True)[-1:]
            self._last = next(iter(hosts.from_first(read)), None)
        return self._last

    def train(self, record: dict):
        self._last = record
        self._put(self._train if self.active else None, "train", record)

    def evaluation(self, record: dict):
        self._put(self._eval if self.active else None, "eval", record)
        if self.active:
            self._evaluations.append(record)
        self.flush()

    def samples(self, step: int, rows: list[dict]):
        """Appends a step's rows to samples.jsonl; a resumed run drops its older rows of this step and later ones."""
        if not self.active or not rows:
            return
        if self._samples is None:
            self._samples = JsonLines(self._workdir / "samples.jsonl", step - 1)
        for row in rows:
            self._samples.write({"step": step, **row})
        self._samples.flush()

    def _put(self, lines, prefix, record):
        if not self.active:
            return
        lines.write(record)
        scalars = {f"{prefix}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._board is not None:
            self._board.write(record["step"], scalars)
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def evaluations(self) -> list[dict]:
        """All evaluations of this run, also those before it was resumed."""
        return hosts.from_first(lambda: self._evaluations)  # all hosts must agree on which are still to be done

    def _files(self) -> list:
        files = (self._train, self._eval, self._samples, self._board) if self.active else ()
        return [file for file in files if file is not None]

    def flush(self):
        for file in self._files():
            file.flush()

    def close(self):
        missing = [text for file in self._files() if (text := file.close())]
        if missing:
            hosts.warn(f"the run ends while {self._workdir} cannot be written: {'; '.join(missing)}")
        if self.active and self._wandb is not None:
            self._wandb.finish()
