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

from gptjax import command_line, paths
from gptjax.data.chat import Template
from gptjax.data.prompts import PromptBatches, PromptConfig, Prompts, bucket_widths, load_prompts, longest_of
from gptjax.data.rows import LeftOut
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.model import heads
from gptjax.model.architecture import require_gpt
from gptjax.model.spec import ModelOptions
from gptjax.objectives.ppo import adaptive_kl_coefficient
from gptjax.parallel import pipeline
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import Count
from gptjax.rlhf import ptx, rewards, rollout
from gptjax.rlhf.clock import Clock
from gptjax.rlhf.config import EvaluationConfig, KLConfig, PtxConfig, RateConfig, RolloutConfig
from gptjax.rlhf.evaluation import held_out_score
from gptjax.rlhf.memory import memory_plan, offloaded, on_device
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.program import PPOProgram, context_lengths, make_spec, ppo_program
from gptjax.rlhf.reward_model import RewardModel, load_reward_model, prompt_room
from gptjax.rlhf.sanity_checks import check_iteration
from gptjax.rlhf.state import PPOState, new_state, phase_keys
from gptjax.rlhf.update import UpdateConfig
from gptjax.run import Claim, require, run
from gptjax.trained import Model, load_model, origin
from gptjax.training.checkpoint import CheckpointConfig
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.precision import frozen
from gptjax.training.stage import Advance, Evaluator, RunConfig, RunResult, Stage


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """Reinforcement learning. How long: steps (iterations), or episodes. Give `reward`, `reward_fn`, or both.

    steps: iterations of the run.
    batch_size: episodes (sampled responses) of an iteration.
    policy: workdir of the SFT run whose model is the initial policy and the reference.
    reward: workdir of the reward model.
    reward_fn: 'package.module:function', alone or added to the reward model's score.
    reward_on: what reward_fn gets, 'text' or 'tokens'.
    optimizer: of the policy.
    value_optimizer: of the separate value network, which is initialized from the reward model.
    shared_trunk: a value head on the policy's trunk, in place of a separate value network.
    offload: keep the two frozen models in host memory and bring them to the device to score.
    episodes: length of the run in sampled responses, if steps is not given.
    loss_chunk: time steps whose logits are held at once.
    """

    policy: str | None = paths.field()
    reward: str | None = paths.field()
    reward_fn: str | None = None
    reward_on: str = "text"
    model: ModelOptions = ModelOptions()
    data: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: UpdateConfig = UpdateConfig()
    kl: KLConfig = KLConfig()
    ptx: PtxConfig = PtxConfig()
    rate: RateConfig = RateConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-6, weight_decay=0.0)
    value_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6, weight_decay=0.0)
    shared_trunk: bool = False
    offload: bool = False
    checkpoint: CheckpointConfig = CheckpointConfig(every=10)
    eval: EvaluationConfig = EvaluationConfig()
    episodes: Count | None = None
    batch_size: Count = 512
    loss_chunk: Count = 128

    def __post_init__(self):
        rows, group = self.batch_size // self.ppo.minibatches, self.rollout.group_size
        if self.batch_size % self.ppo.minibatches:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of ppo.minibatches={self.ppo.minibatches}: change one."
            )
        if rows % (self.ppo.microbatch_size or rows):
            raise InputError(
                f"A minibatch of {rows} episodes is not a multiple of ppo.microbatch_size={self.ppo.microbatch_size}: "
                "change it, batch_size or ppo.minibatches."
            )
        if self.rollout.forward_rows is not None and self.batch_size % self.rollout.forward_rows:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of rollout.forward_rows={self.rollout.forward_rows}: "
                "change one."
            )
        if self.batch_size % group:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of rollout.group_size={group}: change one."
            )
        if group > 1 and self.shared_trunk:
            raise InputError(f"rollout.group_size={group} is GRPO, which has no values: set shared_trunk to False.")
        if self.precision.scaled:
            raise InputError("PPO computes in float32 or bfloat16: set --config.precision.compute to one of them.")
        self.kl.check_batch(self.batch_size)
        if self.reward_on not in ("text", "tokens"):
            raise InputError(f"reward_on={self.reward_on!r}: choose text or tokens.")


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


def load_models(c: PPOConfig, mesh) -> tuple[Model, Template, RewardModel | None]:
    """(model of policy and reference, template of its prompts, reward model or None)."""
    base = load_model(c.policy, mesh=mesh)
    require_gpt(base.config, "PPO")
    if base.tokenizer.pad_id is None or base.tokenizer.eot_id is None:
        raise InputError(f"{c.policy} has no padding token of its own: give the workdir of an SFT run as policy.")
    template = Template(base.tokenizer, base.template or "chat")
    reward_model = load_reward_model(c.reward, mesh=mesh, tokenizer=base.tokenizer) if c.reward else None
    if reward_model and reward_model.template != template.kind:
        raise InputError(
            f"The reward model saw {reward_model.template!r} prompts and the policy {template.kind!r} ones: train the "
            "reward model from this policy's SFT run."
        )
    return base, template, reward_model


def load_both_prompts(c: PPOConfig, spec: RLSpec, template: Template) -> tuple[Prompts, Prompts, int]:
    """(prompts to train on, prompts held out for evaluation, room: the most tokens of a prompt that leave space for a
    response in every model's context)."""
    room = prompt_room(context_lengths(spec), spec.response, "rollout.max_new_tokens")
    if c.data.max_length is not None and c.data.max_length > room:
        raise InputError(
            f"data.max_length={c.data.max_length} and rollout.max_new_tokens={spec.response} are together more than "
            f"the shortest context, {min(context_lengths(spec).values())}: lower one of them."
        )
    held_out = dataclasses.replace(c.data, source=c.eval.source or c.data.source)
    return load_prompts(c.data, template, room), load_prompts(held_out, template, room), room


def initial_state(policy, reward, *, c: PPOConfig, spec: RLSpec, program: PPOProgram) -> PPOState:
    """policy: parameters of the SFT model; reward: of the reward model, or None. The value network is initialized
    from the reward model (InstructGPT C.4), or without one from the policy, with a zero head."""
    value = {}
    if spec.value:
        value = reward or heads.scalar_model(policy, spec.policy, None)
    elif spec.critic:
        value = {"head": heads.new_head(spec.policy.d_model, None)}
    return new_state(policy, value, program.policy_tx, program.value_tx, c.kl.coefficient, c.seed)


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


def summary(line: dict) -> str:
    """A line of metrics.jsonl as text for the progress bar."""
    return (
        f"score {line['objective/score']:.3f}, kl {line['objective/kl']:.2f}, "
        f"length {line['response/length']:.0f}, {line['time/iteration']:.1f} s"
    )


def describe(c: PPOConfig, spec, prompts, slots: int, iterations: int, about: dict):
    """Prints the models, the prompts and the length of the run. slots: of the widest batch of prompts."""
    reward = f"; reward model: {c.reward} at step {about['reward_step']:,}" if c.reward else ""
    group = f", {spec.group_size} of each prompt" if spec.group_size > 1 else ""
    rows = c.ppo.microbatch_size or c.batch_size // c.ppo.minibatches
    hosts.say(
        f"policy and reference: {c.policy} at step {about['policy_step']:,}{reward}\n"
        f"{len(prompts.ids):,} prompts of up to {slots} tokens{prompts.left_out.describe()}; responses of up to "
        f"{spec.response}; {iterations} iterations of {c.batch_size} episodes{group}, {c.ppo.epochs} x "
        f"{c.ppo.minibatches} steps each{pipeline.describe(spec.policy, spec.mesh.shape, rows)}"
    )


def warn_of_warmup(c: PPOConfig, iterations: int):
    """Prints a warning if the learning rate never reaches its peak."""
    if iterations <= c.rate.warmup:
        hosts.say(
            f"warning: the run ends within its warm-up (rate.warmup={c.rate.warmup} iterations): the learning rate "
            f"never exceeds {c.rate.fraction(iterations - 1, iterations):.0%} of its peak."
        )


if __name__ == "__main__":
    command_line.run_stage(ppo, PPOConfig)
