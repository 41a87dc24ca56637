"""Few-shot accuracy that rises with examples and with size, as in GPT-3's figure 1.2, where the best possible is known.

    python -m experiments.in_context --workdir=runs/in_context [--steps=1500] [--seeds=0] [--items=500]

Three GPTs are pre-trained on documents that each follow a hidden rule of their own (rules.py) and then asked, by the
few-shot harness (gptjax.tasks), about new rules after K = 0 to 16 examples. No weight changes: what the model knows of
the rule it has from its prompt. Writes results.json and in_context.png, a panel for each kind of rule: accuracy with
two standard errors against K, a curve for each size, and the accuracy of the best possible answer. The accuracy of a
model can exceed that only by chance.
"""

import json
from pathlib import Path

import jax
from absl import flags

from experiments.in_context import rules
from gptjax import command_line, json_files
from gptjax.config import config_dict
from gptjax.console import progress
from gptjax.model.spec import GPTConfig, parameter_count
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.tasks import harness
from gptjax.tasks.task import load_task
from gptjax.trained import load_model

SIZES = {"1x16": (1, 1, 16), "2x32": (2, 2, 32), "2x64": (2, 4, 64), "4x128": (4, 4, 128)}  # layers, heads, width
SHOTS = (0, 1, 2, 4, 8, 16)
CONTEXT = 128
LENGTH = 31  # examples of a document, 4 bytes each: with its end-of-text it fills most of a context


def size_config(size: str, source: Path, steps: int, seed: int):
    """The pre-training of a size, on bytes."""
    c = config_dict(PretrainConfig)
    n_layer, n_head, d_model = SIZES[size]
    c.model.update(n_layer=n_layer, n_head=n_head, d_model=d_model, context_length=CONTEXT, dropout=0.0)
    c.data.update(source=str(source), tokenizer="bpe:257", validation="0.02", isolate_documents=True)
    c.steps, c.batch_size, c.seed = steps, 32, seed
    c.schedule.warmup_tokens = 100.0 * c.batch_size * CONTEXT
    c.optimizer.update(learning_rate=3e-3 if d_model <= 64 else 1e-3, b2=0.99, weight_decay=0.1)
    c.eval.every = c.checkpoint.every = max(steps // 4, 1)
    return c


def measure(workdir: Path, folder: Path, items: int, seed: int) -> dict:
    """{kind of rule: {K: (accuracy, standard error)}} of a trained model."""
    task, found = load_task(str(Path(__file__).parent / "rule.toml")), {}
    model = load_model(workdir)
    scorer = harness.scorer(model, rows=8)
    for name in rules.KINDS:
        found[name] = {}
        for shots in SHOTS:
            path = folder / f"{name}-{shots}.jsonl"
            path.write_text("".join(json.dumps(r) + "\n" for r in rules.questions(name, shots, items, 1000 + seed)))
            found[name][shots] = harness.evaluate(scorer, task, str(path)).metrics["acc"]
    return found


def draw(results: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rules.KINDS), figsize=(4.2 * len(rules.KINDS), 3.4), layout="constrained")
    for ax, (name, kind) in zip(axes, rules.KINDS.items(), strict=True):
        ax.plot(SHOTS, [kind.best(k) for k in SHOTS], "k--", label="best possible", linewidth=1)
        for r in results:
            values = r["accuracy"][name]
            means, errors = zip(*(values[k] for k in SHOTS), strict=True)
            label = f"{r['parameters']:,} parameters"
            ax.errorbar(SHOTS, means, [2 * e for e in errors], marker="o", markersize=3, capsize=2, label=label)
        ax.set(title=name, xlabel="examples in the prompt", ylabel="accuracy", ylim=(0, 1.02))
    axes[0].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(_):
    workdir = Path(FLAGS.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    source = workdir / "rules.jsonl"
    if not source.exists():  # as many as the longest run reads, so that none is seen twice
        n = max(2000, FLAGS.steps * 32)
        made = rules.documents(n, LENGTH, seed=0)
        source.write_text("".join(json.dumps(row) + "\n" for row in progress(made, desc="writing documents")))
    results = []
    for seed in FLAGS.seeds:
        for size in SIZES:
            run = workdir / f"{size}-{seed}"
            if not pretrain(size_config(size, source, FLAGS.steps, seed), str(run)).finished:
                raise SystemExit("stopped; the same command resumes from there")
            accuracy = measure(run, workdir, FLAGS.items, seed)
            config = GPTConfig(**json.loads((run / "config.json").read_text())["model"])
            results.append({"size": size, "seed": seed, "parameters": parameter_count(config), "accuracy": accuracy})
            for name, values in accuracy.items():
                print(f"{size} {name:<6}", *(f"{values[k][0]:.3f}" for k in SHOTS), flush=True)
            jax.clear_caches()
    best = {name: {k: kind.best(k) for k in SHOTS} for name, kind in rules.KINDS.items()}
    (workdir / "results.json").write_text(json_files.dumps({"best": best, "results": results}) + "\n")
    draw([r for r in results if r["seed"] == FLAGS.seeds[0]], workdir / "in_context.png")
    print(f"written to {workdir / 'results.json'} and {workdir / 'in_context.png'}")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("workdir", "runs/in_context", "Where everything goes.")
    flags.DEFINE_integer("steps", 1500, "Optimizer steps of 32 documents.", lower_bound=1)
    flags.DEFINE_integer("items", 500, "Questions for each kind of rule and K.", lower_bound=2)
    command_line.define_seeds("0", "a run of each size for each.")
    command_line.run(main)
