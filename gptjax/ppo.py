"""PPO, PPO-ptx and GRPO on a reward model, on rules, or on both (InstructGPT stage 3).

    python -m gptjax.ppo --config=configs/instructgpt/ppo.py --workdir=runs/ppo --config.policy=runs/sft \
        --config.reward=runs/reward --config.data.source=prompts.jsonl

Each row of the data is {"prompt"}. An iteration samples responses to a batch of prompts, scores them, and takes epochs
x minibatches optimizer steps on them. The same command resumes an interrupted run, bitwise identical.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from ml_collections import config_dict as mlc

from gptjax import command_line
from gptjax.data.prompts import PromptBatches, bucket_widths, longest_of
from gptjax.data.rows import LeftOut
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.objectives.ppo import adaptive_kl_coefficient
from gptjax.parallel.sharding import batch_sharding
from gptjax.rlhf import ptx, rewards, rollout
from gptjax.rlhf.clock import Clock
from gptjax.rlhf.config import PPOConfig
from gptjax.rlhf.evaluation import held_out_score
from gptjax.rlhf.memory import memory_plan, offloaded, on_device
from gptjax.rlhf.messages import describe, summary, warn_of_warmup
from gptjax.rlhf.program import make_spec, ppo_program
from gptjax.rlhf.sanity_checks import check_iteration
from gptjax.rlhf.start import initial_state, load_both_prompts, load_models
from gptjax.rlhf.state import phase_keys
from gptjax.run import Claim, require, run
from gptjax.trained import origin
from gptjax.training.precision import frozen
from gptjax.training.stage import Advance, Evaluator, RunResult, Stage


def ppo(config: mlc.ConfigDict, workdir, reward_fn: Callable | None = None) -> RunResult:
    """Runs the stage (run.run). reward_fn: a callable in place of the config's `reward_fn` (rlhf/rewards.py)."""
    return run("ppo", PPOConfig, functools.partial(build, reward_fn=reward_fn), config, workdir)


def build(c: PPOConfig, mesh, claim: Claim, reward_fn: Callable | None = None) -> Stage:
    """The Stage of this run: models, prompts, state, and an iteration for each step."""
    require(c, {
        "policy": "No policy: give --config.policy=WORKDIR of an SFT run.",
        "data.source": "No prompts: give --config.data.source=PATH (JSONL, Parquet or hf:NAME).",
        "steps,episodes": "Say how long to train: --config.episodes or --config.steps (iterations).",
    })  # fmt: skip
    reward_fn = reward_fn or (c.reward_fn and rewards.load_callable(c.reward_fn))
    if c.reward is None and reward_fn is None:
        raise InputError("No reward: give --config.reward=WORKDIR of a reward model, --config.reward_fn, or both.")
    iterations = c.steps if c.steps is not None else math.ceil(c.episodes / c.batch_size)

    # --- the models: policy and reference, reward model, value network ---
    base, template, reward_model = load_models(c, mesh)
    spec = make_spec(
        c, base.config, reward_model.config if reward_model else None, mesh, eos_id=template.eos_id,
        pad_id=template.pad_id, vocab=base.tokenizer.vocab_size,
    )  # fmt: skip
    program = ppo_program(c, spec)

    # --- prompts, and the pre-training text of PPO-ptx ---
    prompts, held_out, room = load_both_prompts(c, spec, template)
    widths = bucket_widths(longest_of(prompts), c.data.buckets, room)
    hosts.agree("The prompts", prompts.fingerprint)
    # A resumed run needs the reference and the reward model that it began with: digests of both go into config.json.
    about = origin(policy=base, reward=reward_model)
    if reward_model:
        about["reward_bias"] = float(reward_model.params["head"]["bias"])
    sections = {"model": spec.policy, "template": template.kind, "origin": about}
    claim.check(c, **sections)
    record = claim.begin(c.policy)
    claim.save(base.tokenizer)  # of ptx.source
    text = ptx.load_text(
        c.ptx, c.policy, claim.workdir, spec.policy.context_length, c.seed + 2,  # not the order of earlier stages
        needed=c.ppo.ptx_coefficient > 0, record=record, known=claim.known,
    )  # fmt: skip
    claim.make(c, base.tokenizer, text and text.text, **sections)
    left_out = prompts.left_out + (held_out.left_out if c.eval.source else LeftOut())
    hosts.only_first(lambda: left_out.write(claim.workdir))

    # --- the frozen models, and the state of a new run ---
    reference = frozen(base.params, spec.dtype)
    reward = reward_model and frozen(reward_model.params, spec.dtype)
    if c.offload:
        reference, reward = offloaded(reference), offloaded(reward)
    frozen_models = lambda: on_device((reference, reward), c.offload)

    def init():
        make = functools.partial(initial_state, c=c, spec=spec, program=program)
        return jax.jit(make, out_shardings=program.shardings)(base.params, reward_model and reward_model.params)

    rule = reward_fn and rewards.Rule(reward_fn, c.reward_on, template)
    eval_widths = sorted({*widths, *bucket_widths(longest_of(held_out), 1, room)})
    evaluate = held_out_score(
        c, spec, held_out, eval_widths, template, text, frozen_models, rule, record["shuffle"]
    )
    batches = PromptBatches(
        prompts, c.batch_size // spec.group_size, widths, c.seed, template.pad_id, record["shuffle"]
    )
    iteration = make_iteration(c, spec, program, iterations, frozen_models, rule, text, batches, prompts.texts)

    def begin(state):
        at_once = (c.batch_size, widths[-1]), (min(c.eval.prompts, len(held_out.ids)), eval_widths[-1])
        most = max(at_once, key=lambda rows_slots: rows_slots[0] * (rows_slots[1] + spec.response))
        hosts.only_first(lambda: print(memory_plan(state, reference, reward, spec, *most, c.offload)))
        describe(c, spec, prompts, widths[-1], iterations, about)
        if int(state.step) < iterations:
            warn_of_warmup(c, iterations)

    return Stage(
        config=c, total=iterations, abstract=program.abstract, shardings=program.shardings, init=init,
        data=prompts.fingerprint,
        changed=f"{c.data.source} has changed since the run began: restore it, or give another --workdir.",
        advances=lambda plan, start: (Advance(first, count, iteration) for first, count in plan),
        lines=functools.partial(lines, c), summary=summary, evaluators=(Evaluator(evaluate, c.eval.every),),
        reads_late=False, unit="iteration", begin=begin,
    )  # fmt: skip


def make_iteration(c: PPOConfig, spec, program, iterations, frozen_models, rule, text, batches, prompt_texts):
    """Returns iteration(state) -> (state, metrics): one iteration of PPO. text: of rlhf/ptx.py, or None; batches: of
    prompts."""
    sharding, compiled = batch_sharding(spec.mesh, 0), set()

    def iteration(state):
        clock, step = Clock(), int(state.step)
        batch = batches.at(int(state.prompt_position))
        tokens, lengths, index = (np.repeat(batch[k], spec.group_size, 0) for k in ("tokens", "lengths", "index"))
        if tokens.shape[1] not in compiled:
            compiled.add(tokens.shape[1])
            hosts.say(f"iteration {step + 1}: compiling for prompts padded to {tokens.shape[1]} of {batches.widest}")
        texts = [prompt_texts[i] for i in index]

        experience, metrics, _ = rollout.collect(
            rollout.Models(state.policy, state.value, frozen_models), hosts.place(tokens, sharding),
            hosts.place(lengths, sharding), phase_keys(state)[1], state.kl_coefficient, spec, c.rollout,
            rule=rule and rule.of(texts), lap=clock.lap,
        )  # fmt: skip
        fraction = c.rate.fraction(step, iterations)
        rates = tuple(np.float32(fraction * o.learning_rate) for o in (c.optimizer, c.value_optimizer))
        state, more = program.update(state, experience, pretraining_batch(c, spec, text, state), rates)
        if c.kl.target is not None:
            state = steer_kl(state, metrics["objective/kl"], c)
        clock.lap("update", state.policy)

        timing = clock.figures(experience.mask, experience.tokens)
        return state, metrics | more | timing | {"learning_rate": rates[0], "prompt/width": tokens.shape[1]}

    return iteration


def pretraining_batch(c: PPOConfig, spec, text, state):
    """The sequences whose gradient PPO-ptx adds; None for plain PPO."""
    if not c.ppo.ptx_coefficient:
        return None
    rows = c.batch_size // c.ppo.minibatches
    shape = ptx.batch_shape(c.ptx, c.ppo.minibatches, rows, c.ppo.microbatch_size, spec.mesh)
    return text.batch(int(state.ptx_position), shape, ptx.sequences(c.ptx, rows), spec.mesh)


def steer_kl(state, kl, c: PPOConfig):
    """Adapts the KL coefficient, once per iteration."""
    coefficient = adaptive_kl_coefficient(state.kl_coefficient, kl, c.batch_size, c.kl.target, c.kl.horizon)
    return dataclasses.replace(state, kl_coefficient=jax.device_put(coefficient, state.kl_coefficient.sharding))


def lines(c: PPOConfig, first: int, count: int, metrics, seconds: float):
    """The iteration's line of metrics.jsonl, after the checks of sanity_checks.py."""
    line = {"step": first + 1, "episodes": (first + 1) * c.batch_size, **{k: float(v) for k, v in metrics.items()}}
    check_iteration(line, first, c.precision.dtype, c.rollout.missing_eos)
    yield line


if __name__ == "__main__":
    command_line.run_stage(ppo, PPOConfig)
