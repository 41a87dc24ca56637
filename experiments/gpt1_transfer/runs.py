"""The runs of the study: pre-training of the two models, and each fine-tuning."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from configs import gpt1, gpt1_finetune, lstm
from experiments.gpt1_transfer.rows import Task, train_and_dev
from experiments.gpt1_transfer.summary import VARIANTS
from gptjax.errors import InputError
from gptjax.finetune import finetune
from gptjax.model import architecture
from gptjax.model.lstm import LSTMConfig
from gptjax.model.spec import GPT1, GPTConfig
from gptjax.pretrain import pretrain

KEPT = 12  # checkpoints of a pre-training, for the zero-shot curves
VALIDATION = 0.05  # of the files where the text has no valid/; rows.py holds out the same ones of the standard library


@dataclasses.dataclass(frozen=True)
class Size:
    """How large the study is. What GPT-1's own configs say holds for the rest, but that attention's probabilities are
    not dropped, which would be a third of a step's time on a CPU.

    layers, width, context: of the Transformer, with heads of 32. vocab: tokens of the BPE. steps, batch: of
    pre-training. rows: training examples of a task, 0 = all. epochs: of fine-tuning, in batches of 32 sequences.
    """

    layers: int = 4
    width: int = 64
    context: int = 128
    vocab: int = 2048
    steps: int = 800
    batch: int = 16
    rows: int = 400
    epochs: int = 3

    @property
    def transformer(self) -> GPTConfig:
        return dataclasses.replace(
            GPT1, vocab_size=self.vocab, n_layer=self.layers, n_head=max(self.width // 32, 1), d_model=self.width,
            context_length=self.context, dropout_sites="residual",
        )  # fmt: skip

    @property
    def lstm(self) -> LSTMConfig:
        """Of about as many parameters; with the output tied to the embedding that is as many FLOPs a token too."""
        of = lambda units: LSTMConfig(self.vocab, units, units, self.context, dropout=GPT1.dropout)
        target = architecture.parameter_count(self.transformer)
        return min(map(of, range(8, 8 * self.width, 8)), key=lambda c: abs(architecture.parameter_count(c) - target))


class Stopped(Exception):
    """SIGTERM or Ctrl-C: everything is saved."""


# --- pre-training -------------------------------------------------------------------------------------------


def pretrain_config(model: str, size: Size, text: str, workdir: Path, seed: int, factor: float = 1.0):
    """GPT-1's or its LSTM's, at this size. The learning rate is GPT-1's, times the root of how much narrower the model
    is, times the factor that rates.py chooses."""
    c = gpt1.get_config() if model == "transformer" else lstm.get_config("gpt1_baseline")
    published, own = c.model.d_model if model == "transformer" else c.model.units, getattr(size, model)
    c.model.update(dataclasses.asdict(own))
    folders = [Path(text) / part for part in ("train", "valid")]
    source, valid = map(str, folders) if all(f.is_dir() for f in folders) else (text, str(VALIDATION))
    c.data.update(source=source, validation=valid, tokenizer=f"bpe:{size.vocab}", cache=str(workdir / "tokens"))
    c.steps, c.batch_size, c.seed = size.steps, size.batch, seed
    c.optimizer.learning_rate *= factor * (published / own.d_model) ** 0.5
    c.schedule.warmup_tokens = 0.1 * size.steps * size.batch * size.context
    every = -(-size.steps // KEPT)
    c.checkpoint.update(every=every, keep_every=every, keep_last=1)
    c.eval.update(every=every, batches=20)
    c.samples.prompts, c.log.tensorboard = (), False
    return c


def pretrain_both(size: Size, text: str, workdir: Path, seed: int, factors: dict[str, float]) -> dict:
    """{model: its parameters, training FLOPs and seconds, and the loss on held-out text by update}. factors: of the
    learning rate of either."""
    found = {}
    for model, factor in factors.items():
        c = pretrain_config(model, size, text, workdir, seed, factor)
        result = finished(pretrain(c, str(workdir / model)))
        lines = (workdir / model / "evaluations.jsonl").read_text().splitlines()
        found[model] = {
            "parameters": architecture.parameter_count(getattr(size, model)), "flops": result.flops,
            "learning_rate": c.optimizer.learning_rate,
            "seconds": result.seconds, "tokens": size.steps * size.batch * size.context,
            "loss": [[e["step"], e["loss"]] for e in map(json.loads, lines)],
        }  # fmt: skip
    return found


def finished(result):
    if not result.finished:
        raise Stopped
    return result


# --- fine-tuning --------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """A fine-tuning. variant: of GPT-1's Table 5, or 'layers_K', a transfer of the first K layers."""

    task: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.variant}-{self.seed}"


def planned(tasks: tuple[Task, ...], seeds: list[int], layers: int, layer_seeds: int) -> list[Cell]:
    """All cells: those of Table 5, then the layers with the first seeds; seed by seed, for what is done to be whole."""
    of = lambda variants, seeds: [Cell(task.name, v, seed) for seed in seeds for task in tasks for v in variants]
    return of(VARIANTS, seeds) + of([f"layers_{k}" for k in range(layers)], seeds[:layer_seeds])


def model_of(variant: str) -> str:
    return "lstm" if variant == "lstm" else "transformer"


def finetune_config(cell: Cell, task: Task, size: Size, workdir: Path, factor: float = 1.0):
    """GPT-1's, at this size: the learning rate as in pre-training. Nothing is chosen by what is evaluated on."""
    model = model_of(cell.variant)
    published = GPT1.d_model if model == "transformer" else lstm.get_config("gpt1_baseline").model.units
    c = gpt1_finetune.get_config(task.preset)
    c.init_from = str(workdir / model)
    c.data.fields.update(task.data.get("fields", {}))
    c.data.update({k: v for k, v in task.data.items() if k != "fields"})
    c.data.train, c.data.valid = train_and_dev(task, workdir / "rows")
    c.data.max_length = min(task.max_length, size.context)
    c.batch_size //= task.choices
    c.epochs, c.seed = float(size.epochs), cell.seed
    c.optimizer.learning_rate *= factor * (published / getattr(size, model).d_model) ** 0.5
    c.eval.batches = 1  # the results are of all rows
    c.eval.every = c.checkpoint.every = 10**6
    c.checkpoint.keep_last, c.log.tensorboard = 1, False
    if cell.variant == "no_auxiliary":
        c.lm_weight = 0.0
    if cell.variant == "no_pretraining":
        c.transfer = -1
    if cell.variant.startswith("layers_"):
        c.transfer = int(cell.variant.removeprefix("layers_"))
    return c


class Results:
    """results.jsonl: a line for each cell that is done. InputError: the folder is of a study of another size."""

    def __init__(self, workdir: Path, settings: dict):
        workdir.mkdir(parents=True, exist_ok=True)
        self.path, file = workdir / "results.jsonl", workdir / "settings.json"
        if file.exists() and (before := json.loads(file.read_text())) != settings:
            changed = ", ".join(k for k in settings if before.get(k) != settings[k])
            raise InputError(f"{workdir} has the runs of another study ({changed} differ): take another --workdir.")
        file.write_text(json.dumps(settings, indent=2) + "\n")
        text = self.path.read_text() if self.path.exists() else ""
        self.cells = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        self.path.write_text("".join(json.dumps(c) + "\n" for c in self.cells))  # without a line cut short
        self.done = {Cell(c["task"], c["variant"], c["seed"]) for c in self.cells}

    def add(self, cell: Cell, value: float, metrics: dict, seconds: float):
        self.cells.append({**cell._asdict(), "value": value, "metrics": metrics, "seconds": round(seconds, 1)})
        with self.path.open("a") as file:
            file.write(json.dumps(self.cells[-1]) + "\n")
        self.done.add(cell)


def run_cell(c, task: Task, folder: Path, log: Path) -> tuple[float, dict]:
    """(the task's score on the rows that config c evaluates on, all metrics). What the run prints goes to the log."""
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        finished(finetune(c, str(folder)))
    metrics = json.loads((folder / "results.json").read_text())["validation"]
    return metrics[task.metric], metrics
