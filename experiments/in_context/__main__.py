"""Few-shot accuracy that rises with examples and with size, as in GPT-3's figure 1.2, where the best possible is known.

    python -m experiments.in_context --workdir=runs/in_context [--arithmetic=../shared/data/fewshot/gpt3] [--seeds=0]

GPTs of four sizes are pre-trained on documents that each follow a hidden rule of their own (rules.py), and then asked,
by the few-shot harness (gptjax.tasks), about rules after K = 0 to 16 examples. No weight changes: which rule it is they
have from the prompt alone. Others learn two-digit arithmetic from documents in the exact format of GPT-3's questions
(arithmetic.py), and answer OpenAI's own file of them, none of which they were trained on: the published task's
protocol, greedy decoding. Writes results.json and in_context.png: accuracy with two standard errors against K, a curve
for each size; of the rules also the accuracy of the best possible answer, which a model exceeds only by chance.
"""

import functools
from pathlib import Path

import jax
from absl import flags

from experiments.in_context import arithmetic, gpts, picture, rules
from gptjax import command_line, json_files
from gptjax.evals import standard_errors
from gptjax.model.spec import parameter_count
from gptjax.tasks import harness
from gptjax.tasks.task import load_task
from gptjax.trained import Model

RULE_SHOTS = (0, 1, 2, 4, 8, 16)
RULE_CONTEXT, RULE_LENGTH = 72, 17  # examples of a document, each a token; four documents with their ends are a context
ARITHMETIC_SHOTS, ARITHMETIC_SIZES = (0, 1, 4), ("2x16", "2x32", "2x64")


def rules_corpus(folder: Path, steps: int) -> gpts.Corpus:
    """More documents than a run reads, so that none is seen twice."""
    n = max(2000, -(-steps * gpts.BATCH * RULE_CONTEXT * 103 // (100 * (RULE_LENGTH + 1))))
    source = folder / "documents.jsonl"
    _write(source, rules.documents(n, RULE_LENGTH, seed=0))
    return gpts.Corpus(source, rules.make_tokenizer(), RULE_CONTEXT, steps)


def arithmetic_corpus(folder: Path, task: str, data: str, steps: int) -> tuple[gpts.Corpus, dict]:
    """(Documents without the questions in `data`, how many questions they are drawn from and how many are asked.)"""
    asked = arithmetic.contexts(task, data)
    rows = arithmetic.training_rows(task, asked)
    source = folder / "documents.jsonl"
    _write(source, arithmetic.documents(rows, 60_000, seed=0))
    counts = {"learned_from": len(rows), "asked": len(asked)}
    return gpts.Corpus(source, arithmetic.make_tokenizer(), arithmetic.CONTEXT, steps), counts


def _write(path: Path, rows: list[dict]):
    text = json_files.json_lines(rows)
    if not path.exists() or path.read_text() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def measure_rules(model: Model, seed: int, *, folder: Path, items: int) -> dict:
    """{kind of rule: {K: (accuracy, standard error)}} of a trained model: one evaluation, which compiles once."""
    asked = [(name, shots) for name in rules.KINDS for shots in RULE_SHOTS]
    path = folder / f"questions-{items}-{seed}.jsonl"
    _write(path, [row for name, shots in asked for row in rules.questions(name, shots, items, 1000 + seed)])
    task = load_task(str(Path(__file__).parent / "rule.toml"))
    samples = harness.evaluate(harness.scorer(model, rows=8), task, str(path)).samples
    right = [float(sample["predicted"]["acc"] == sample["gold"]) for sample in samples]
    found = {name: {} for name in rules.KINDS}
    for i, (name, shots) in enumerate(asked):
        found[name][shots] = standard_errors.mean(right[i * items : (i + 1) * items])
    return found


def measure_arithmetic(model: Model, seed: int, *, task: str, data: str, items: int | None) -> dict:
    """{task: {K: (accuracy, standard error)}}: the share of answers that greedy decoding gives."""
    scorer, loaded = harness.scorer(model, rows=8), load_task(task)
    evaluate = functools.partial(harness.evaluate, scorer, loaded, data, limit=items, seed=seed)
    return {task: {shots: evaluate(shots=shots).metrics["acc"] for shots in ARITHMETIC_SHOTS}}


def study(corpus: gpts.Corpus, sizes, seeds, measure) -> list[dict]:
    """A record of each seed and size: {size, seed, parameters, accuracy}. measure: (model, seed) -> accuracy."""
    results = []
    for seed in seeds:
        for size in sizes:
            workdir = corpus.source.parent / f"{size}-{seed}"
            model = gpts.train(corpus, size, seed, workdir)
            accuracy = measure(model, seed)
            results.append({"size": size, "seed": seed, "parameters": parameter_count(model.config),
                            "accuracy": accuracy})  # fmt: skip
            for name, values in accuracy.items():
                print(f"{size} {name}", *(f"{k}: {value:.3f}" for k, (value, _) in values.items()), flush=True)
            jax.clear_caches()
    return results


def write(workdir: Path, of_rules: list[dict], of_tasks: dict[str, list[dict]], about: dict):
    """results.json and in_context.png of the records of `study`; the picture has the first seed."""
    best = {name: {k: kind.best(k) for k in RULE_SHOTS} for name, kind in rules.KINDS.items()}
    json_files.write_json(workdir / "results.json", {**about, "best": best, "rules": of_rules, **of_tasks})
    panels = dict.fromkeys(rules.KINDS, of_rules) | of_tasks
    panels = {name: [r for r in records if r["seed"] == records[0]["seed"]] for name, records in panels.items()}
    titles = {name: name for name in rules.KINDS} | arithmetic.TASKS
    picture.draw(panels, titles, best, workdir / "in_context.png")
    print(f"written to {workdir / 'results.json'} and {workdir / 'in_context.png'}")


def main(_):
    workdir, data, seeds = Path(FLAGS.workdir), FLAGS.arithmetic, FLAGS.seeds
    folder = workdir / "rules"
    measure = functools.partial(measure_rules, folder=folder, items=FLAGS.items)
    of_rules = study(rules_corpus(folder, FLAGS.steps), gpts.SIZES, seeds, measure)
    if data is None:
        data = str(workdir / "questions")
        arithmetic.write_questions(Path(data), seed=1)
    of_tasks, questions = {}, {}
    for task in arithmetic.TASKS:
        corpus, questions[task] = arithmetic_corpus(workdir / task, task, data, FLAGS.arithmetic_steps)
        measure = functools.partial(measure_arithmetic, task=task, data=data, items=FLAGS.arithmetic_items)
        of_tasks[task] = study(corpus, ARITHMETIC_SIZES, seeds, measure)
    about = {"steps": {"rules": FLAGS.steps, "arithmetic": FLAGS.arithmetic_steps}, "questions": questions}
    write(workdir, of_rules, of_tasks, about)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("workdir", "runs/in_context", "Where everything goes.")
    command_line.define_path(
        "arithmetic", None, "Folder with OpenAI's file of two-digit addition; questions are generated if not given.",
    )  # fmt: skip
    flags.DEFINE_integer("steps", 500, "Optimizer steps of the models of rules.", lower_bound=1)
    flags.DEFINE_integer("arithmetic_steps", 1500, "Optimizer steps of the models of arithmetic.", lower_bound=1)
    flags.DEFINE_integer("items", 500, "Questions for each kind of rule and K.", lower_bound=2)
    flags.DEFINE_integer("arithmetic_items", None, "The first so many questions of arithmetic; all if not given.",
                         lower_bound=2)  # fmt: skip
    command_line.define_seeds("0", "a run of each size for each.")
    command_line.run(main)
