"""Where figures go: metrics.jsonl first, TensorBoard always, Weights & Biases if asked."""

import dataclasses
import io
import json
import math
import os

from etils import epath

from gptjax.parallel import hosts


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """every: steps between lines of metrics.jsonl. tensorboard, wandb: further places.
    profile_start, profile_steps: trace these steps into workdir/profile (0 steps = no trace). stuck_after: seconds
    without a new step, evaluations and checkpoints included, after which the process writes the stack of each of its
    threads and ends; None = never. Of many hosts one that is stuck would keep the others waiting for good."""

    every: int = 1
    tensorboard: bool = True
    wandb: bool = False
    profile_start: int = 10
    profile_steps: int = 0
    stuck_after: float | None = None


class JsonLines:
    """An append-only file of one JSON object per step, each step once.

    Taking a run up again at `start_step` drops the lines after it, and a last line cut short by a kill. Object
    stores cannot append: there the file is written whole at each flush.
    """

    def __init__(self, path, start_step: int = 0):
        self.path = epath.Path(path)
        kept = [json.dumps(line) + "\n" for line in self.read(path) if line["step"] <= start_step]
        if self.path.exists():
            temporary = self.path.parent / f".{self.path.name}.tmp"
            temporary.write_text("".join(kept))
            temporary.replace(self.path)
        self._remote = "://" in str(self.path)
        self._file = io.StringIO("".join(kept)) if self._remote else open(self.path, "a")
        self._file.seek(0, os.SEEK_END)

    def write(self, record: dict):
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")

    def flush(self):
        if self._remote:
            self.path.write_text(self._file.getvalue())
        else:
            self._file.flush()

    def close(self):
        self.flush()
        self._file.close()

    @staticmethod
    def read(path) -> list[dict]:
        """The whole lines of a file; [] if there is none."""
        path = epath.Path(path)
        if not path.exists():
            return []
        lines = []
        for line in path.read_text().splitlines():
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break  # cut short by a kill
        return lines


def dumps(value, **options) -> str:
    """json.dumps of a result: JSON has no NaN and no infinity, which become null wherever they are."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class MetricWriter:
    """metrics.jsonl (training), evaluations.jsonl, TensorBoard and W&B, from host 0 only."""

    def __init__(self, workdir, config: LogConfig, start_step: int = 0, run_config: dict | None = None):
        self.active = hosts.first()
        workdir = epath.Path(workdir)
        self._evaluations = workdir / "evaluations.jsonl"
        if not self.active:
            return
        self._train = JsonLines(workdir / "metrics.jsonl", start_step)
        self._eval = JsonLines(self._evaluations, start_step)
        self._board = self._wandb = None
        if config.tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1, flush_secs=30)
        if config.wandb:
            import wandb

            id_file = workdir / "wandb_id"
            if not id_file.exists():
                id_file.write_text(wandb.util.generate_id())
            self._wandb = wandb.init(id=id_file.read_text(), resume="allow", config=run_config, dir=str(workdir))

    def train(self, record: dict):
        self._put(self._train if self.active else None, "train", record)

    def evaluation(self, record: dict):
        self._put(self._eval if self.active else None, "eval", record)
        self.flush()

    def _put(self, lines, prefix, record):
        if not self.active:
            return
        lines.write(record)
        scalars = {f"{prefix}/{k}": v for k, v in record.items() if isinstance(v, int | float) and k != "step"}
        if self._board is not None:
            for name, value in scalars.items():
                self._board.add_scalar(name, value, record["step"])
        if self._wandb is not None:
            self._wandb.log(scalars, step=record["step"])

    def evaluations(self) -> list[dict]:
        return hosts.from_first(lambda: JsonLines.read(self._evaluations))  # all must agree on what is still to do

    def flush(self):
        if self.active:
            self._train.flush()
            self._eval.flush()

    def close(self):
        if self.active:
            self._train.close()
            self._eval.close()
            if self._board is not None:
                self._board.close()
            if self._wandb is not None:
                self._wandb.finish()
