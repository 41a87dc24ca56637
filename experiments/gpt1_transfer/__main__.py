"""Does pre-training transfer? GPT-1's Table 5 and Figure 2 at the size of a laptop.

    python -m experiments.gpt1_transfer --workdir=runs/transfer --data=../shared/data/finetune \
        --text=../shared/data/lm/books_small [--choose_rates] [--seeds=0,1,2,3,4]

Pre-trains a GPT-1-type Transformer and an LSTM of as many parameters on --text, scores GPT-1's zero-shot heuristics at
each checkpoint, and fine-tunes with every seed: the whole recipe, without the auxiliary loss, without pre-training, the
LSTM, and with the first K layers transferred. Without --data the tasks, without --text the text are made of the
standard library. Larger: --layers=12 --width=768 --context=512 --vocab=40000 --steps=100000 --batch=64 --rows=0. Writes
results.jsonl (a line for each fine-tuning; those are not run again), results.json and results.png.
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

from absl import flags

from experiments.gpt1_transfer import plot, rates, rows, runs, summary
from gptjax import command_line, json_files
from gptjax.console import progress
from gptjax.evaluate import evaluate_checkpoints
from gptjax.tasks.task import load_task
from gptjax.training.checkpoint import Checkpointer


def main(_):
    began, workdir = time.perf_counter(), Path(FLAGS.workdir)
    size = runs.Size(**{field.name: FLAGS[field.name].value for field in dataclasses.fields(runs.Size)})
    settings = dataclasses.asdict(size) | {"text": FLAGS.text, "data": FLAGS.data, "choose_rates": FLAGS.choose_rates}
    results = runs.Results(workdir, settings)
    tasks = rows.prepare(FLAGS.data, workdir / "rows", size.rows)
    try:
        before = chosen("pretraining", lambda: rates.pretraining(size, FLAGS.text, workdir))
        pretrain = lambda: runs.pretrain_both(size, FLAGS.text, workdir, 0, rates.factors(before))
        pretrained = kept(workdir / "pretraining.json", pretrain)
        curves = kept(workdir / "zero_shot.json", lambda: zero_shot(tasks, workdir))
        after = chosen("finetuning", lambda: rates.finetuning(tasks, size, workdir))
        fine_tune(tasks, size, results, workdir, rates.factors(after))
    except runs.Stopped:
        raise SystemExit("stopped; the same command resumes from there") from None
    found = {
        "command": " ".join(["python -m experiments.gpt1_transfer", *sys.argv[1:]]), "settings": settings,
        "seconds": round(time.perf_counter() - began), "rates": {"pretraining": before, "finetuning": after},
        "pretraining": pretrained,
        **figures(results.cells, tasks, size), "zero_shot": curves,
    }  # fmt: skip
    json_files.write_json(workdir / "results.json", found)
    plot.picture(found, workdir / "results.png")
    say(found)
    print(f"written to {workdir / 'results.json'} and {workdir / 'results.png'}")


def kept(path: Path, make):
    """What make() gives, from the file where an earlier start has written it."""
    if not path.exists():
        json_files.write_json(path, make())
    return json.loads(path.read_text())


def chosen(stage: str, choose) -> dict:
    """The factors of a stage's learning rates (rates.py)."""
    return kept(Path(FLAGS.workdir) / f"{stage}_rates.json", choose) if FLAGS.choose_rates else rates.unchosen()


def zero_shot(tasks, workdir: Path) -> list[dict]:
    """The main metric of every heuristic at every checkpoint of either model."""
    asked, points = [(load_task(t.zero_shot), t) for t in tasks if t.zero_shot], []
    for model in ("transformer", "lstm"):
        steps = Checkpointer(workdir / model).steps()
        found = evaluate_checkpoints(
            workdir / model, steps, [(of, 0) for of, _ in asked], str(workdir / "rows"), workdir / model / "tasks"
        )
        for step, result in found:
            task = next(t for of, t in asked if of.name == result.task)
            value, error = result.metrics[result.metric]
            points.append({"model": model, "task": task.name, "metric": result.metric, "step": step, "value": value,
                           "stderr": error, "items": result.items, "chance": task.chance})  # fmt: skip
    return points


def fine_tune(tasks, size: runs.Size, results: runs.Results, workdir: Path, factors: dict[str, float]):
    cells = runs.planned(tasks, FLAGS.seeds, size.layers, FLAGS.layer_seeds)
    left, of_name = [c for c in cells if c not in results.done], {t.name: t for t in tasks}
    with progress(total=len(cells), initial=len(cells) - len(left), unit="run") as bar:
        for cell in left:
            began = time.perf_counter()
            task = of_name[cell.task]
            c = runs.finetune_config(cell, task, size, workdir, factors[runs.model_of(cell.variant)])
            value, metrics = runs.run_cell(c, task, workdir / "cells" / cell.name, workdir / "runs.log")
            results.add(cell, value, metrics, time.perf_counter() - began)
            bar.set_postfix_str(f"{cell.name} {value:.3f}", refresh=False)
            bar.update()


def figures(cells: list[dict], tasks, size: runs.Size) -> dict:
    names = [t.name for t in tasks]
    table = summary.table(cells, names, FLAGS.seeds, summary.VARIANTS)
    some = FLAGS.seeds[: FLAGS.layer_seeds]
    layers = [f"layers_{k}" for k in range(size.layers)]
    of_layers = summary.table(cells, names, some, [*layers, "full"])
    return {
        "seeds": FLAGS.seeds, "layer_seeds": some, "chance": {t.name: t.chance for t in tasks},
        "metric": {t.name: t.metric for t in tasks}, "table": table, "comparison": summary.comparison(table),
        "layers": {k: of_layers[name] for k, name in enumerate([*layers, "full"]) if name in of_layers},
    }  # fmt: skip


def say(found: dict):
    columns = [*found["chance"], "average"]
    print(f"\n{'':<16}" + "".join(f"{name:>16}" for name in columns))
    rows_of = found["table"] | {f"{k} layers": row for k, row in found["layers"].items()}
    for name, row in rows_of.items():
        print(f"{name:<16}" + "".join(f"{shown(row[c]):>16}" for c in columns))
    for variant, d in found["comparison"].items():
        print(f"{variant} - full: {shown(d)}, Table 5 {d['published']:+.1f}: {d['verdict']}")
        for task, of_task in d["tasks"].items():
            published = f", Table 5 {of_task['published']:+.1f}: {of_task['verdict']}" if "published" in of_task else ""
            print(f"  {task}: {shown(of_task)}{published}")
    print(f"95 % intervals over {len(found['seeds'])} seeds of fine-tuning; {found['seconds']:,} s")


def shown(cell: dict) -> str:
    return f"{cell['mean']:.1f}" + ("" if cell["half"] is None else f" ± {cell['half']:.1f}")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("workdir", "runs/gpt1_transfer", "Where everything goes.")
    command_line.define_path("data", None, "Folder with the tasks' folders; the standard library's tasks if not given.")
    command_line.define_path("text", "stdlib", "Text to pre-train on, a folder with train/ and valid/ or any source.")
    command_line.define_seeds("0,1,2,3,4", "of fine-tuning.")
    flags.DEFINE_integer("layer_seeds", 3, "How many of the seeds on the curve of transferred layers.", lower_bound=0)
    flags.DEFINE_bool("choose_rates", False, "Try three learning rates first, of which rates.py says the choice.")
    for field in dataclasses.fields(runs.Size):
        flags.DEFINE_integer(field.name, field.default, f"Size of the study: {field.name}.", lower_bound=0)
    command_line.run(main)
