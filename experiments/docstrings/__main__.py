"""The whole story on one real task: pre-train → fine-tune → SFT → reward → PPO, PPO-ptx, GRPO, DPO → evaluate → report.

    python -m experiments.docstrings --config=configs/demo.py --workdir=runs/demo

`make demo` runs it. The pre-trained model is the workdir itself, the other stages lie in it: finetuned/ (GPT-1's
fine-tuning), sft/, reward/, ppo/ (without pre-training gradients), ppo_ptx/ (with them), grpo/ and dpo/. An interrupted
demo resumes; what is measured at its end is measured again. How long it takes is in experiments/README.md. The gold
score of a summary is labeler.py's.
--scale shortens the stages after pre-training (0.05 for a smoke test).
"""

import json
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.docstrings import finetuned, labeler, quiz, story, task
from gptjax import command_line, json_files
from gptjax.config import config_dict
from gptjax.data.chat import Template
from gptjax.dpo import DPOConfig, dpo
from gptjax.finetune import finetune
from gptjax.generation.respond import respond
from gptjax.ppo import PPOConfig, ppo
from gptjax.pretrain import pretrain
from gptjax.reward import RewardConfig, reward
from gptjax.sft import SFTConfig, sft
from gptjax.trained import load_model

CANDIDATES = 4  # K: sampled summaries of a signature, and the real one besides
NOISE = 0.25  # of the labeler: Plackett-Luce with utility gold / NOISE
PROMPT, RESPONSE = 32, 32  # tokens
BEST_OF = 16
GROUP = 8  # GRPO's samples of a signature


def main(_):
    began = time.perf_counter()
    workdir, scale = Path(FLAGS.workdir), FLAGS.scale
    seconds = {}

    def timed(name, result):
        seconds[name] = time.perf_counter() - began - sum(seconds.values())
        if result is not None and not result.finished:
            raise SystemExit("stopped; the same command resumes from there")

    heading("1. Pre-training on the standard library's text")
    timed("pre-training", pretrain(FLAGS.config, str(workdir)))
    data = workdir / "task"
    task.write(data, FLAGS.config.seed)

    heading("2. Fine-tuning on a labeled task, as GPT-1")
    timed("fine-tuning", finetune(finetuned.config(workdir, data, scale), str(workdir / finetuned.WORKDIR)))

    heading("3. Supervised fine-tuning: signature -> summary line")
    timed("SFT", sft(sft_config(workdir, data, scale), str(workdir / "sft")))

    heading("4. Rankings by the rule-based labeler, and a reward model of them")
    ceiling = write_comparisons(workdir, data, scale)
    timed("sampling and ranking", None)
    timed("reward model", reward(reward_config(workdir, data), str(workdir / "reward")))

    for name, coefficient in (("ppo", 0.0), ("ppo_ptx", 1.0)):
        heading(f"5. PPO {'with' if coefficient else 'without'} pre-training gradients")
        timed(name, ppo(ppo_config(workdir, data, scale, coefficient), str(workdir / name)))

    heading(f"6. GRPO: groups of {GROUP} samples in place of the value network")
    timed("grpo", ppo(grpo_config(workdir, data, scale), str(workdir / "grpo")))

    heading("7. DPO: from the rankings themselves, without a reward model")
    timed("dpo", dpo(dpo_config(workdir, data, scale), str(workdir / "dpo")))

    heading("8. Best-of-n and the table")
    result = story.measure(workdir, data, prompt=PROMPT, response=RESPONSE, best_of=BEST_OF, limit=FLAGS.limit)
    timed("measuring", None)

    heading("9. Zero- and few-shot, and calibration before and after RLHF")
    result |= {"finetuned": finetuned.measure(workdir, data), "quiz": quiz.measure(workdir, data, FLAGS.limit)}
    timed("quiz", None)
    result |= {"pair_accuracy_ceiling": ceiling, "seconds": seconds}
    (workdir / "story.json").write_text(json.dumps(result, indent=1) + "\n")
    for part, of in ((story, result), (finetuned, result["finetuned"]), (quiz, result["quiz"])):
        part.say(of)
    print(f"{time.perf_counter() - began:.0f} s in all; report: {story.write_report(workdir, result)}")


def heading(text: str):
    print(f"\n=== {text} ===", flush=True)


def sft_config(workdir: Path, data: Path, scale: float):
    c = config_dict(SFTConfig)
    c.init_from = str(workdir)
    c.data.update(source=str(data / "demonstrations.jsonl"), drop_long=True)
    c.epochs, c.batch_size = max(1.5 * scale, 0.05), 16
    c.optimizer.update(learning_rate=1e-3, b2=0.95)
    c.schedule.update(kind="cosine", final_fraction=0.1)
    c.mix.fraction = 0.1  # as InstructGPT's RL initialization: the model must not forget its pre-training
    c.eval.every = c.checkpoint.every = 60
    c.samples.update(count=4, max_new_tokens=RESPONSE)
    return c


def reward_config(workdir: Path, data: Path):
    c = config_dict(RewardConfig)
    c.init_from = str(workdir / "sft")
    c.data.update(source=str(data / "comparisons.jsonl"), max_length=PROMPT + RESPONSE, drop_long=True)
    c.epochs, c.batch_size = 1.0, 16
    c.optimizer.update(learning_rate=3e-4, b2=0.95)
    c.schedule.update(kind="cosine", final_fraction=0.1)
    c.eval.every = c.checkpoint.every = 40
    return c


def ppo_config(workdir: Path, data: Path, scale: float, ptx_coefficient: float):
    c = config_dict(PPOConfig)
    c.policy, c.reward = str(workdir / "sft"), str(workdir / "reward")
    c.data.update(source=str(data / "prompts.jsonl"), max_length=PROMPT, drop_long=True, buckets=1)
    c.steps, c.batch_size = max(2, round(8 * scale)), 64
    c.rollout.update(max_new_tokens=RESPONSE, missing_eos=-3.0)
    c.ppo.update(epochs=2, minibatches=2, ptx_coefficient=ptx_coefficient, ema_decay=0.5)
    c.ptx.update(per_episode=0.5, context_length=story.CONTEXT)
    c.kl.coefficient = 0.02
    c.optimizer.update(learning_rate=1e-4, b2=0.95)
    c.value_optimizer.update(learning_rate=3e-4, b2=0.95)
    c.eval.update(
        every=max(2, round(4 * scale)), source=str(data / "evaluation.jsonl"), prompts=96,
        gold_fn="experiments.docstrings.labeler:gold_scores",
    )  # fmt: skip
    c.checkpoint.every = 8
    return c


def grpo_config(workdir: Path, data: Path, scale: float):
    """PPO's, with groups."""
    c = ppo_config(workdir, data, scale, 0.0)
    c.rollout.group_size = GROUP
    return c


def dpo_config(workdir: Path, data: Path, scale: float):
    c = config_dict(DPOConfig)
    c.init_from = str(workdir / "sft")
    c.data.update(source=str(data / "comparisons.jsonl"), max_length=PROMPT + RESPONSE, drop_long=True)
    c.beta = 0.1
    c.steps, c.batch_size = max(2, round(30 * scale)), 16
    c.optimizer.update(learning_rate=1e-4, b2=0.95)
    c.schedule.update(kind="cosine", final_fraction=0.1)
    c.eval.every = c.checkpoint.every = 30
    return c


def write_comparisons(workdir: Path, data: Path, scale: float) -> float | None:
    """comparisons.jsonl: CANDIDATES summaries sampled from the SFT model and the real one, ranked by the labeler.

    Returns the labeler's own expected pair accuracy: its noise is the reward model's ceiling.
    """
    path, meta = data / "comparisons.jsonl", data / "comparisons_ceiling.json"
    if path.exists() and meta.exists():
        return json.loads(meta.read_text())
    model = load_model(workdir / "sft")
    template = Template(model.tokenizer, "chat")
    rows = json_files.read_json_lines(data / "comparison_prompts.jsonl")
    rows = [r for r in rows if len(template.prompt(r["prompt"])) <= PROMPT][: max(64, round(900 * scale))]
    prompts = [template.prompt(r["prompt"]) for r in rows for _ in range(CANDIDATES)]
    with jax.set_mesh(model.mesh):
        responses = respond(
            model.params, model.decoder, template, prompts, max_new_tokens=RESPONSE, temperature=1.0, seed=1,
            progress="sampling summaries",
        )  # fmt: skip
    texts = [template.decode(ids) for ids in responses]
    rng = np.random.default_rng(0)
    scored, ranked = [], []
    for i, row in enumerate(rows):
        sampled = [t for t in texts[i * CANDIDATES : (i + 1) * CANDIDATES] if template.encodes(t)]
        candidates = [row["response"], *sampled]
        if len(candidates) < 2:
            continue
        scores = [labeler.gold_score(row["prompt"], text) for text in candidates]
        scored.append(scores)
        ranks = labeler.plackett_luce_ranks(scores, rng, NOISE)
        ranked.append({"prompt": row["prompt"], "completions": candidates, "ranks": ranks})
    json_files.write_json_lines(path, ranked)
    ceiling = labeler.pair_accuracy_ceiling(scored, NOISE)
    meta.write_text(json.dumps(ceiling))
    print(
        f"{len(scored):,} signatures of {CANDIDATES + 1} ranked summaries; "
        f"the labeler's noise allows an accuracy of {ceiling:.3f}"
    )
    return ceiling


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_flags()
    flags.DEFINE_float("scale", 1.0, "Length of the stages after pre-training.", lower_bound=0.0)
    flags.DEFINE_integer("limit", 128, "Evaluation signatures; the quiz has twice as many questions.", lower_bound=1)
    command_line.run(main)
