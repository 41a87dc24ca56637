"""GPT-2's published scores and ours, with the public weights.

    python -m experiments.gpt2_parity --weights=DIR --data=DIR [--rows=16] [--results=FILE]
    python -m experiments.gpt2_parity --random

--weights: a directory in Hugging Face's format (config.json, model.safetensors, the tokenizer) or a workdir; the size
is read from it. --data: the tasks' files, as python -m gptjax.evaluate reads them. Every row of published.toml for this
size whose data is there is computed by gptjax's harness: ours, published, their difference in standard errors.

--random needs no weights, data or network: a small model of random weights and made-up rows go through gptjax's
published tasks and through lm-evaluation-harness's own task files and its own model class, which must agree
(requirements-peers.txt).
"""

import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple

from absl import flags

from gptjax import command_line, convert, json_files, paths
from gptjax.errors import InputError
from gptjax.tasks import harness
from gptjax.tasks.files import find_files
from gptjax.tasks.task import load_task
from gptjax.trained import Model, load_model

SIZES = {12: "124M", 24: "355M", 36: "774M", 48: "1558M"}  # by layers


class Row(NamedTuple):
    """A published score. stderr: None where none is published. task, shots, metric: gptjax's."""

    model: str
    task: str
    shots: int
    metric: str
    value: float
    protocol: str
    source: str
    stderr: float | None = None


class Comparison(NamedTuple):
    """ours, error: None where the task's data is not there. apart: ours minus the published one, in standard errors:
    the larger of the two where both are known, since the items are the same."""

    row: Row
    ours: float | None
    error: float | None

    @property
    def apart(self) -> float | None:
        if self.ours is None or not self.error:
            return None
        return (self.ours - self.row.value) / max(self.error, self.row.stderr or 0)


def published() -> list[Row]:
    file = Path(__file__).parent / "published.toml"
    return [Row(**row) for row in tomllib.loads(file.read_text(encoding="utf-8"))["row"]]


def open_model(weights: str, scratch: str) -> Model:
    """A workdir, or a directory in Hugging Face's format, which is imported to `scratch` first."""
    try:
        return load_model(weights)
    except InputError as error:
        if not (paths.local(weights) / "model.safetensors").exists():
            text = f"{weights} is neither a workdir ({error}) nor a directory with model.safetensors."
            raise InputError(text) from None
    convert.import_weights(weights, f"{scratch}/run")
    return load_model(f"{scratch}/run")


def compare(model: Model, data: str, rows: int = 16) -> list[Comparison]:
    """Each published score of a model of this size, and ours. InputError: none is of this size."""
    size = SIZES.get(model.config.n_layer)
    wanted = [row for row in published() if row.model == size]
    if not wanted:
        raise InputError(
            f"Nothing is published of a GPT-2 of {model.config.n_layer} layers: give the weights of "
            f"{', '.join(sorted({row.model for row in published()}))}."
        )
    scorer, results, found = harness.scorer(model, rows), {}, []
    for row in wanted:
        task, key = load_task(row.task), (row.task, row.shots)
        if key not in results:
            try:
                find_files(task, data, task.files)
            except InputError as error:
                print(f"{row.task}: {error}")
                results[key] = None
            else:
                results[key] = harness.evaluate(scorer, task, data, shots=row.shots).metrics
        ours = results[key] and results[key][row.metric]
        found.append(Comparison(row, *(ours or (None, None))))
    return found


def table(comparisons: list[Comparison]) -> str:
    lines = [f"{'task':<26}{'metric':<16}{'ours':>20}{'published':>12}{'apart':>8}  protocol; source"]
    for row, ours, error in comparisons:
        shown = "no data" if ours is None else f"{ours:.4f} ± {error or 0:.4f}"
        apart = Comparison(row, ours, error).apart
        apart = "" if apart is None else f"{apart:+.2f}"
        name = f"{row.task}, {row.shots} shots" if row.shots else row.task
        numbers = f"{shown:>20}{row.value:>12.4f}{apart:>8}"
        lines.append(f"{name:<26}{row.metric:<16}{numbers}  {row.protocol}; {row.source}")
    return "\n".join(lines)


def main(_):
    if FLAGS.random:
        from experiments.gpt2_parity import random_weights

        print(random_weights.table(random_weights.compare()))
        return
    if not FLAGS.weights or not FLAGS.data:
        raise InputError("Give --weights=DIR and --data=DIR, or --random.")
    with tempfile.TemporaryDirectory() as scratch:
        comparisons = compare(open_model(FLAGS.weights, scratch), FLAGS.data, FLAGS.rows)
    print(table(comparisons))
    if FLAGS.results:
        records = [{**c.row._asdict(), "ours": c.ours, "error": c.error, "apart": c.apart} for c in comparisons]
        json_files.write_json(paths.local(FLAGS.results), records)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("weights", None, "Directory in Hugging Face's format, or a workdir.")
    command_line.define_path("data", None, "Folder with the tasks' files.")
    command_line.define_path("results", None, "JSON file to write.")
    flags.DEFINE_integer("rows", 16, "Packed rows scored at a time.", lower_bound=1)
    flags.DEFINE_bool("random", False, "Random weights against transformers and lm-evaluation-harness.")
    command_line.run(main)
