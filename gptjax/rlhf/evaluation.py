"""Evaluation of the policy on held-out prompts: scores, KL, sampled responses, and loss on pre-training text."""

import math

import jax
import numpy as np

from gptjax.data.chat import Template
from gptjax.data.prompts import PromptBatches
from gptjax.distributed import hosts
from gptjax.evals.base import evaluation_sums
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import batch_sharding
from gptjax.rlhf import rewards, rollout
from gptjax.rlhf.config import EvaluationConfig, PPOConfig
from gptjax.rlhf.networks import RLSpec
from gptjax.training.stage import Evaluation
from gptjax.training.step import jit_eval_step

_FIGURES = {
    "score": "objective/score", "kl": "objective/kl", "entropy": "objective/entropy", "length": "response/length",
    "eos_rate": "response/eos_rate",
}  # fmt: skip


def held_out_score(c: PPOConfig, spec: RLSpec, prompts, widths, template: Template, text, frozen_models,
                   rule: rewards.Rule | None, shuffle: int):  # fmt: skip
    """Returns evaluate(state) -> Evaluation of the policy's moving average, always with the same noise.

    Its figures: score (reward model and rules, as in training), raw_score (before `missing_eos`), gold, kl, entropy,
    length, eos_rate, and with pre-training text (`text`, rlhf/ptx.py) lm_loss; for a mixture its weighted mean and
    lm_loss/<name> of each part.
    Args:
        widths: lengths that prompts may be padded to. frozen_models: Models.frozen of rollout.collect.
        shuffle: version of lm.shuffled.
    """
    sharding = batch_sharding(spec.mesh, 0)
    multiple = math.lcm(batch_shards(spec.mesh.shape), spec.group_size)
    rows = -(-min(c.eval.prompts, len(prompts.ids)) // multiple) * multiple
    batch = PromptBatches(prompts, rows, widths, 0, template.pad_id, shuffle).at(0)
    texts = [prompts.texts[i] for i in batch["index"]]
    gold = c.eval.gold_fn and rewards.load_callable(c.eval.gold_fn)
    lm_loss = _text_loss(c.eval, spec, text)

    def evaluate(state) -> Evaluation:
        prompts_BQ, lengths_B = (hosts.place(batch[k], sharding) for k in ("tokens", "lengths"))
        models = rollout.Models(state.average, state.value, frozen_models)
        experience, metrics, score_B = rollout.collect(
            models, prompts_BQ, lengths_B, jax.random.key(c.seed), state.kl_coefficient, spec, c.rollout,
            rule=rule and rule.of(texts),
        )  # fmt: skip
        score_B = hosts.whole(score_B)
        ids, responses = rewards.split_rows(*map(hosts.whole, (experience.tokens, lengths_B, experience.mask)))
        figures = {name: float(metrics[key]) for name, key in _FIGURES.items()}
        figures["raw_score"] = float(np.mean(score_B))
        samples = [
            {"prompt": texts[i], "text": template.decode(responses[i]), "score": float(score_B[i])}
            for i in range(min(c.eval.samples, len(texts)))
        ]
        if gold:
            gold_B = rewards.call(gold, "text", template, ids, texts, responses)
            figures["gold"] = float(gold_B.mean())
            samples = [row | {"gold": float(value)} for row, value in zip(samples, gold_B, strict=False)]
        return Evaluation(figures | lm_loss(state.average), samples)

    return evaluate


def _text_loss(c: EvaluationConfig, spec: RLSpec, text):
    """policy -> {'lm_loss', ...} on pre-training validation text; {} if there is none."""
    if text is None or not c.lm_batches:
        return lambda policy: {}
    step = jit_eval_step(causal_lm_loss(spec.policy, spec.dtype, spec.loss_chunk, spec.mesh), spec.mesh)
    sharding, rows = batch_sharding(spec.mesh, 0), 8 * batch_shards(spec.mesh.shape)
    here = hosts.batch_rows(sharding, rows)
    batches = text.text.validation_batches(text.context_length, rows, c.lm_batches, here=here)

    def measure(policy) -> dict:
        sums = {k: evaluation_sums(step, policy, v, sharding) for k, v in batches.items()}
        return {f"lm_{k}": v for k, v in text.text.figures(sums).items() if k.startswith("loss")}

    return measure
