"""What the demo shows at its end: every figure from the run itself, measured on signatures no stage has seen."""

import functools
import html
import json
from pathlib import Path

import jax
import numpy as np

from experiments.docstrings import finetuned, labeler, quiz
from experiments.docstrings.plot import COLORS, RUNS
from gptjax import json_files, report
from gptjax.data.chat import Template
from gptjax.data.corpus import pretraining_text
from gptjax.evals.lm import text_loss
from gptjax.generation.respond import respond
from gptjax.objectives.dpo import response_log_probs
from gptjax.objectives.lm import causal_lm_loss
from gptjax.objectives.ppo import best_of_n_kl
from gptjax.parallel.mesh import batch_shards
from gptjax.rlhf.best_of_n import expected_best
from gptjax.rlhf.reward_model import load_reward_model
from gptjax.trained import Model, load_model
from gptjax.training.metrics import JsonLines

SAMPLES = 4  # of each signature, to measure a policy
CONTEXT = 128  # tokens of a sequence of pre-training text, for PPO-ptx and to measure the loss on
CHUNK = 128  # time steps whose logits are held at once


def measure(workdir: Path, data: Path, *, prompt: int, response: int, best_of: int, limit: int) -> dict:
    """Gold and proxy scores of the real summaries, SFT, best-of-n and the aligned policies, the policies' KL from SFT
    and loss on pre-training text, and a table of samples."""
    rows = json_files.read_json_lines(data / "evaluation.jsonl")
    model = load_model(workdir / "sft")
    template = Template(model.tokenizer, "chat")
    rows = [r for r in rows if len(template.prompt(r["prompt"])) <= prompt][:limit]
    ids = [template.prompt(r["prompt"]) for r in rows]
    proxy = load_reward_model(workdir / "reward", mesh=model.mesh, tokenizer=model.tokenizer)

    def gold(prompts, texts):
        return np.array(labeler.gold_scores(prompts, texts))

    def sampled(model, n, what):
        """(responses, texts, gold [prompts, n], proxy [prompts, n])."""
        repeated = [p for p in ids for _ in range(n)]
        with jax.set_mesh(model.mesh):
            responses = respond(
                model.params, model.decoder, template, repeated, max_new_tokens=response, temperature=1.0, seed=7,
                progress=what,
            )  # fmt: skip
        texts = [template.decode(r) for r in responses]
        of_gold = gold([r["prompt"] for r in rows for _ in range(n)], texts)
        return responses, texts, of_gold.reshape(-1, n), proxy.score(repeated, responses).reshape(-1, n)

    _, texts, of_gold, of_proxy = sampled(model, best_of, "best-of-n")
    best = of_proxy.argmax(1)
    column = {"SFT": texts[::best_of], f"best of {best_of}": [texts[i * best_of + j] for i, j in enumerate(best)]}
    curve, n = [], 1
    while n <= best_of:
        score, true = expected_best(of_proxy, of_gold, n)
        curve.append({"n": n, "kl": float(best_of_n_kl(n)), "proxy": score, "gold": true})
        n *= 2
    real = [r["response"] for r in rows]
    of_real = proxy.score(ids, [template.response(text) for text in real])
    table = [
        {"name": "the real summaries", "gold": gold([r["prompt"] for r in rows], real).mean(), "proxy": of_real.mean()},
        {"name": "SFT", **{k: curve[0][k] for k in ("gold", "proxy", "kl")}},
        {"name": f"best of {best_of}", **{k: curve[-1][k] for k in ("gold", "proxy", "kl")}},
    ]
    table[1]["lm_loss"] = pretraining_loss(workdir, model)
    repeated = [p for p in ids for _ in range(SAMPLES)]
    for name, title in RUNS.items():
        policy = load_model(workdir / name)
        responses, texts, of_gold, of_proxy = sampled(policy, SAMPLES, title)
        column[title] = texts[::SAMPLES]
        ratio = log_probs(policy, repeated, responses) - log_probs(model, repeated, responses)
        table.append({"name": title, "gold": of_gold.mean(), "proxy": of_proxy.mean(), "kl": ratio.mean(),
                      "lm_loss": pretraining_loss(workdir, policy)})  # fmt: skip
    samples = [
        {"prompt": r["prompt"], "the real one": r["response"], **{k: v[i] for k, v in column.items()}}
        for i, r in enumerate(rows[:12])
    ]
    table = [{k: v if isinstance(v, str) or v is None else float(v) for k, v in row.items()} for row in table]
    fitted = json.loads((workdir / "reward" / "reward.json").read_text())
    return {
        "signatures": len(rows), "table": table, "best_of_n": curve, "samples": samples,
        "reward_accuracy": fitted["accuracy"], "longer_wins": fitted["longer_wins"],
    }  # fmt: skip


def pretraining_loss(workdir: Path, model: Model) -> float:
    """Loss on held-out pre-training text, nats per token: of the batches that PPO's evaluation reads."""
    text, shards = pretraining_text(workdir), batch_shards(model.mesh.shape)
    batches = text.validation_batches(CONTEXT, 8 * shards, 8)
    with jax.set_mesh(model.mesh):
        loss = causal_lm_loss(model.config, model.dtype, CHUNK, model.mesh)
        return text_loss(loss, text, batches, model.mesh)(model).figures["loss"]


def log_probs(model: Model, prompts, responses, rows: int = 128) -> np.ndarray:
    """log pi(response | prompt) of each, in nats: float32 [len(prompts)]. rows: of a forward pass."""
    texts = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    lengths_B, starts_B = (np.array(list(map(len, x)), np.int32) for x in (texts, prompts))
    tokens_BT = np.zeros((len(texts), lengths_B.max()), np.int32)
    for row, text in zip(tokens_BT, texts, strict=True):
        row[: len(text)] = text
    out = []
    with jax.set_mesh(model.mesh):
        for i in range(0, len(texts), rows):
            some = (x[i : i + rows] for x in (tokens_BT, starts_B, lengths_B))
            out.append(_log_probs(model.params, model.config, *some, dtype=model.dtype, chunk=CHUNK, mesh=model.mesh))
    return np.concatenate(out)


_log_probs = functools.partial(jax.jit, static_argnames=("config", "dtype", "chunk", "mesh"))(response_log_probs)


def say(result: dict):
    print(f"{'':<22}{'gold':>8}{'proxy':>8}{'KL':>8}{'LM loss':>9}")
    for row in result["table"]:
        cells = [f"{row[k]:.3f}" if row.get(k) is not None else "" for k in ("gold", "proxy", "kl", "lm_loss")]
        print(f"{row['name']:<22}{cells[0]:>8}{cells[1]:>8}{cells[2]:>8}{cells[3]:>9}")


def write_report(workdir: Path, result: dict) -> Path:
    """workdir/report.html: the story first, then pre-training's own curves and config."""
    own = report.write(workdir)
    page = Path(own).read_text()
    start = page.index("<h1>")
    body = (
        f"<h1>From text to an aligned model</h1>{_introduction(result)}"
        f"<h2>Where each stage stands</h2>{_table(result)}{_curves(workdir, result)}"
        f"<h2>Samples on signatures no stage has seen</h2>{_samples(result)}"
        f"<h2>Fine-tuning on a labeled task, as GPT-1</h2>{finetuned.section(workdir, result['finetuned'])}"
        f"<h2>Zero- and few-shot, and calibration before and after RLHF</h2>{quiz.section(result['quiz'])}"
        f"<h2>Time</h2>{_times(result)}<h2>The stages' own reports</h2><p>"
        + ", ".join(f"<a href='{n}/report.html'>{n}</a>" for n in (finetuned.WORKDIR, "sft", "reward", *RUNS))
        + "; below: pre-training.</p>"
    )
    Path(own).write_text(page[:start] + body + page[start:])
    return own


def _introduction(result: dict) -> str:
    return (
        "<p>The task: from a function's signature, write its docstring's summary line. <b>Gold</b> is a rule-based "
        "labeler (PEP 257, PEP 8; -2 to 2), the truth that no stage is trained on; <b>proxy</b> is the reward model, "
        "trained on its noisy rankings and 0 on average over the demonstrations. PPO, PPO-ptx (with gradients on "
        "pre-training text) and GRPO (groups of samples in place of a value network) learn from the reward model, DPO "
        "from the rankings themselves. The reward model agrees with "
        f"{result['reward_accuracy']:.3f} of the held-out pairs; the labeler's own noise allows "
        f"{result['pair_accuracy_ceiling']:.3f}, choosing the longer one {result['longer_wins']:.3f}. Gold judges "
        "form and topic, not truth: a fixed phrase about the name can score high, so read the samples too.</p>"
    )


def _table(result: dict) -> str:
    head = "".join(f"<th>{h}</th>" for h in ("", "gold", "proxy", "KL from SFT, nats", "loss on pre-training text"))
    rows = ""
    for row in result["table"]:
        cells = "".join(
            f"<td class=n>{'' if row.get(k) is None else f'{row[k]:.3f}'}</td>"
            for k in ("gold", "proxy", "kl", "lm_loss")
        )
        rows += f"<tr><th>{html.escape(row['name'])}</th>{cells}</tr>"
    return f"<table><tr>{head}</tr>{rows}</table>"


def _curves(workdir: Path, result: dict) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    best = result["best_of_n"]
    for axis, key in zip(axes, ("gold", "proxy"), strict=False):
        axis.plot(
            [b["kl"] ** 0.5 for b in best], [b[key] for b in best], "s--", ms=4, color="#2e8b57", label="best of n"
        )
    table = {row["name"]: row for row in result["table"]}
    for (name, title), color in zip(RUNS.items(), COLORS, strict=True):
        if name == "dpo":  # its own evaluations have no samples: where it ended is a point
            for axis, key in zip(axes, ("gold", "proxy"), strict=False):
                axis.plot(max(table[title]["kl"], 0.0) ** 0.5, table[title][key], "D", ms=6, color=color, label=title)
            axes[2].axhline(table[title]["lm_loss"], color=color, lw=1, ls="--", label=title)
            continue
        lines = JsonLines.read(workdir / name / "evaluations.jsonl")
        root = [max(line["kl"], 0.0) ** 0.5 for line in lines]
        axes[0].plot(root, [line["gold"] for line in lines], "o-", ms=3, color=color, label=title)
        axes[1].plot(root, [line["raw_score"] for line in lines], "o-", ms=3, color=color, label=title)
        steps, losses = [line["step"] for line in lines], [line.get("lm_loss") for line in lines]
        axes[2].plot(steps, losses, "o-", ms=3, color=color, label=title)
    titles = ("gold score", "proxy: the reward model's score", "loss on pre-training text, nats/token")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=10)
        axis.set_xlabel("iteration (DPO: at its end)" if axis is axes[2] else "√KL from the SFT model")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    return report.image(figure, "gold and proxy score against KL, and the loss on pre-training text")


def _samples(result: dict) -> str:
    names = [k for k in result["samples"][0] if k != "prompt"] if result["samples"] else []
    head = "<tr><th>signature</th>" + "".join(f"<th>{html.escape(n)}</th>" for n in names) + "</tr>"
    rows = ""
    for s in result["samples"]:
        cells = "".join(f"<td>{html.escape(s[n])}</td>" for n in names)
        rows += f"<tr><td><code>{html.escape(s['prompt'])}</code></td>{cells}</tr>"
    return f"<table>{head}{rows}</table>"


def _times(result: dict) -> str:
    rows = "".join(f"<tr><th>{k}</th><td class=n>{v:.0f} s</td></tr>" for k, v in result["seconds"].items())
    return f"<table>{rows}<tr><th>in all</th><td class=n>{sum(result['seconds'].values()):.0f} s</td></tr></table>"
