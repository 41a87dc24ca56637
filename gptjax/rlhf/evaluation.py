"""What PPO's policy is worth on held-out prompts, and what it says to them."""

import dataclasses

import jax
import numpy as np

from gptjax.data.chat import Template
from gptjax.data.prompts import PromptBatches
from gptjax.distributed import hosts
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import batch_sharding
from gptjax.rlhf import rewards
from gptjax.rlhf.config import EvaluationConfig
from gptjax.rlhf.networks import Networks
from gptjax.training import loop
from gptjax.training.step import jit_eval_step


def evaluator(c: EvaluationConfig, n: Networks, prompts, widths, template: Template, text, phases, mesh, seed,
              shuffle: int):  # fmt: skip
    """state -> (record, table of samples) of the policy's moving average, always with the same noise.

    record: score (reward model and rules, as trained on), raw_score (the same before `missing_eos`), gold, kl, entropy,
    length, eos_rate, and lm_loss on pre-training text where there is some (`text`, rlhf/ptx.py), of a mixture the mean
    under its weights and lm_loss/<name> of each part. phases: ppo.py's (sample, judge, rule_score, finish). widths:
    that the prompts may be padded to (data/prompts.py). shuffle: version of lm.shuffled.
    """
    sample, judge, rule_score, finish = phases
    ways = batch_shards(mesh.shape)
    rows = -(-min(c.prompts, len(prompts.ids)) // ways) * ways
    batch = PromptBatches(prompts, rows, widths, 0, template.pad_id, shuffle).at(0)
    texts = [prompts.texts[i] for i in batch["index"]]
    gold = c.gold_fn and rewards.load_callable(c.gold_fn)
    lm_step = jit_eval_step(causal_lm_loss(n.policy, n.dtype, n.loss_chunk, mesh), mesh)
    lm_batches = {}
    if text is not None and c.lm_batches:
        here = hosts.batch_rows(batch_sharding(mesh, 0), 8 * ways)
        lm_batches = text.text.validation_batches(text.context_length, 8 * ways, c.lm_batches, here=here)

    def evaluate(state):
        averaged = dataclasses.replace(state, policy=state.average)
        tokens, lengths = (hosts.place(batch[k], batch_sharding(mesh, 0)) for k in ("tokens", "lengths"))
        tokens, mask, _ = sample(averaged.policy, tokens, lengths, jax.random.key(seed))
        judged, score = judge(averaged, tokens, lengths, mask)
        score = hosts.whole(rule_score(tokens, lengths, mask, texts, score))
        _, metrics = finish(judged, score, state.kl_coefficient)
        ids, responses = rewards.split_rows(*map(hosts.whole, (tokens, lengths, mask)))
        record = {
            "score": float(metrics["objective/score"]),
            "raw_score": float(np.mean(score)),
            "kl": float(metrics["objective/kl"]),
            "entropy": float(metrics["objective/entropy"]),
            "length": float(metrics["response/length"]),
            "eos_rate": float(metrics["response/eos_rate"]),
        }
        if gold:
            of_gold = rewards.call(gold, "text", template, ids, texts, responses)
            record["gold"] = float(of_gold.mean())
        if lm_batches:
            sharding = batch_sharding(mesh, 0)
            sums = {k: loop.evaluation_sums(lm_step, averaged.policy, v, sharding) for k, v in lm_batches.items()}
            record |= {f"lm_{k}": v for k, v in text.text.figures(sums).items() if k.startswith("loss")}
        table = [
            {"prompt": texts[i], "text": template.decode(responses[i]), "score": float(score[i])}
            | ({"gold": float(of_gold[i])} if gold else {})
            for i in range(min(c.samples, len(texts)))
        ]
        return record, table

    return evaluate
