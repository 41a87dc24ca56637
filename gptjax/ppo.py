"""PPO and PPO-ptx on a reward model, on rules, or on both (InstructGPT stage 3).

    python -m gptjax.ppo --config=configs/instructgpt/ppo.py --workdir=runs/ppo --config.policy=runs/sft \
        --config.reward=runs/reward --config.data.source=prompts.jsonl

Rows are {"prompt"}. An iteration samples a response to each of a batch of prompts, scores them, and takes
epochs x minibatches optimizer steps on them. The same command resumes a run killed anywhere, bit for bit.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict as mlc

from gptjax import command_line, lock, paths, report, run_config
from gptjax import config as configs
from gptjax.console import progress
from gptjax.data.chat import Template
from gptjax.data.prompts import PromptBatches, PromptConfig, bucket_widths, load_prompts, longest_of
from gptjax.data.records import start_record, write_record
from gptjax.data.rows import LeftOut
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.model import gpt, heads
from gptjax.model.spec import ModelOptions
from gptjax.objectives.ppo import adaptive_kl_coefficient
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import MeshConfig, batch_shards, check_fits, make_mesh
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import Count, Seed
from gptjax.rlhf import ptx, rewards, rollout
from gptjax.rlhf.clock import Clock
from gptjax.rlhf.config import EvaluationConfig, KLConfig, PtxConfig, RateConfig, RolloutConfig
from gptjax.rlhf.evaluation import evaluator
from gptjax.rlhf.memory import memory_plan, offloaded, on_device
from gptjax.rlhf.networks import Networks
from gptjax.rlhf.reward_model import load_reward_model, prompt_room
from gptjax.rlhf.sanity_checks import check_iteration
from gptjax.rlhf.state import new_state, phase_keys, state_shardings
from gptjax.rlhf.update import UpdateConfig, make_update
from gptjax.trained import load_model, origin
from gptjax.training import loop
from gptjax.training.checkpoint import CheckpointConfig, Checkpointer
from gptjax.training.metrics import LogConfig, MetricWriter
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig, frozen
from gptjax.training.stopping import Interrupted, stop_on_signals


@dataclasses.dataclass(frozen=True)
class PPOConfig:
    """policy: workdir of the SFT run, also the reference. reward: workdir of the reward model. reward_fn:
    'package.module:function', alone or added to the reward model's score; reward_on: what it gets, 'text' or 'tokens'.
    How long: steps (iterations), or episodes. batch_size: episodes of an iteration. value_optimizer: of the separate
    value network, which starts as the reward model; shared_trunk: a head on the policy's own trunk instead.
    offload: keep the two frozen models in host memory and bring them to the device to score."""

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
    precision: PrecisionConfig = PrecisionConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig(every=10)
    eval: EvaluationConfig = EvaluationConfig()
    log: LogConfig = LogConfig()
    seed: Seed = 0
    steps: Count | None = None
    episodes: Count | None = None
    batch_size: Count = 512
    loss_chunk: Count = 128

    def __post_init__(self):
        rows = self.batch_size // self.ppo.minibatches
        if self.batch_size < 1 or self.batch_size % self.ppo.minibatches:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of ppo.minibatches={self.ppo.minibatches}."
            )
        if rows % (self.ppo.microbatch_size or rows):
            raise InputError(
                f"A minibatch of {rows} episodes is not a multiple of ppo.microbatch_size={self.ppo.microbatch_size}."
            )
        if self.rollout.forward_rows is not None and self.batch_size % self.rollout.forward_rows:
            raise InputError(f"batch_size={self.batch_size} is not a multiple of rollout.forward_rows.")
        if self.precision.scaled:
            raise InputError("PPO computes in float32 or bfloat16: set --config.precision.compute to one of them.")
        self.kl.check_batch(self.batch_size)
        if self.reward_on not in ("text", "tokens"):
            raise InputError(f"reward_on={self.reward_on!r}: choose text or tokens.")


@configs.with_sharding_rules
@lock.holds_workdir
def ppo(config: mlc.ConfigDict, workdir: str, reward_fn: Callable | None = None) -> bool:
    """The whole stage. Returns whether the run is finished (False after a SIGTERM or Ctrl-C).

    reward_fn: a callable in place of the config's `reward_fn` (rlhf/rewards.py).
    """
    began = time.perf_counter()
    workdir = epath.Path(workdir)

    # --- config ---
    c = configs.build(PPOConfig, config)
    if c.policy is None:
        raise InputError("No policy: give --config.policy=WORKDIR of an SFT run.")
    reward_fn = reward_fn or (c.reward_fn and rewards.load_callable(c.reward_fn))
    if c.reward is None and reward_fn is None:
        raise InputError("No reward: give --config.reward=WORKDIR of a reward model, --config.reward_fn, or both.")
    if c.data.source is None:
        raise InputError("No prompts: give --config.data.source=PATH (JSONL, Parquet or hf:NAME).")
    if c.steps is None and c.episodes is None:
        raise InputError("Say how long to train: --config.episodes or --config.steps (iterations).")
    iterations = c.steps if c.steps is not None else math.ceil(c.episodes / c.batch_size)
    mesh = make_mesh(c.mesh)

    # --- the models: policy and reference, reward model, value network ---
    base = load_model(c.policy, mesh=mesh)
    if base.tokenizer.pad_id is None or base.tokenizer.eot_id is None:
        raise InputError(f"{c.policy} has no padding token of its own: give the workdir of an SFT run as policy.")
    template = Template(base.tokenizer, base.template or "chat")
    judge_model = c.reward and load_reward_model(c.reward, mesh=mesh, tokenizer=base.tokenizer)
    if judge_model and judge_model.template != template.kind:
        raise InputError(
            f"The reward model saw {judge_model.template!r} prompts and the policy {template.kind!r} ones."
        )
    options = dataclasses.replace(c.model, dropout=0.0)  # or the ratio of the first minibatch would not be 1
    policy_config = options.apply(base.config)
    value_config = None if c.shared_trunk else options.apply(judge_model.config if judge_model else base.config)
    rows = c.batch_size // c.ppo.minibatches
    check_fits(mesh.shape, n_head=policy_config.n_head, batch_size=rows, microbatch_size=c.ppo.microbatch_size or rows)
    for trunk in filter(None, (policy_config, value_config)):
        pipeline.make_plan(trunk, mesh.shape, c.ppo.microbatch_size or rows)
    if c.rollout.forward_rows and c.rollout.forward_rows % batch_shards(mesh.shape):
        raise InputError(
            f"rollout.forward_rows={c.rollout.forward_rows} is not divisible over the "
            f"{batch_shards(mesh.shape)} devices that rows are sharded over: use a multiple of them."
        )

    # --- prompts, and the pre-training text of PPO-ptx ---
    judge_config = judge_model.config if judge_model else None
    readers = {"policy": policy_config, "value network": value_config, "reward model": judge_config}
    contexts = {name: model.context_length for name, model in readers.items() if model}
    room = prompt_room(contexts, c.rollout.max_new_tokens, "rollout.max_new_tokens")
    if c.data.max_length is not None and c.data.max_length > room:
        raise InputError(
            f"data.max_length={c.data.max_length} and rollout.max_new_tokens={c.rollout.max_new_tokens} are together "
            f"more than the shortest context, {min(contexts.values())}: lower one of them."
        )
    prompts = load_prompts(c.data, template, room)
    widths = bucket_widths(longest_of(prompts), c.data.buckets, room)
    known = hosts.from_first((workdir / "config.json").exists)
    record = start_record(workdir, known, c.policy)
    batches = PromptBatches(prompts, c.batch_size, widths, c.seed, template.pad_id, record["shuffle"])
    held_out = load_prompts(dataclasses.replace(c.data, source=c.eval.source or c.data.source), template, room)
    eval_widths = sorted({*widths, *bucket_widths(longest_of(held_out), 1, room)})
    n = Networks(
        policy=policy_config, value=value_config, reward=judge_config,
        response=c.rollout.max_new_tokens, eos_id=template.eos_id, pad_id=template.pad_id,
        vocab=base.tokenizer.vocab_size, temperature=c.rollout.temperature, loss_chunk=c.loss_chunk,
        dtype=c.precision.dtype, mesh=mesh,
    )  # fmt: skip
    hosts.agree("The prompts", prompts.fingerprint)
    # A resumed run must find the reference and the reward it began with, so what they are is part of its config.
    about = origin(policy=base, reward=judge_model)
    if judge_model:
        about["reward_bias"] = float(judge_model.params["head"]["bias"])
    sections = {"model": policy_config, "template": template.kind, "origin": about}
    if known:
        run_config.claim_workdir(workdir, "ppo", c, **sections)
    hosts.only_first(lambda: base.tokenizer.save(workdir / "tokenizer"))
    text = ptx.load_text(
        c.ptx, c.policy, workdir, policy_config.context_length, c.seed + 2,  # another order than the stages before
        needed=c.ppo.ptx_coefficient > 0, record=record, known=known,
    )  # fmt: skip
    if not known:
        write_record(workdir, record, text and text.text)
        run_config.claim_workdir(workdir, "ppo", c, **sections)
    more_left_out = held_out.left_out if c.eval.source else LeftOut()
    hosts.only_first(lambda: (prompts.left_out + more_left_out).write(workdir))

    # --- abstract state, shardings, the jitted phases ---
    policy_tx, value_tx = make_optimizer(c.optimizer), make_optimizer(c.value_optimizer)
    boxed_policy = gpt.abstract_params(policy_config)
    boxed_value = (
        heads.abstract_scalar_model(value_config) if value_config else {"head": heads.abstract_head(policy_config)}
    )
    abstract, shardings = state_shardings(boxed_policy, boxed_value, policy_tx, value_tx, mesh)
    update = jax.jit(
        make_update(c.ppo, n, policy_tx, value_tx, c.optimizer.clip_norm, c.value_optimizer.clip_norm),
        donate_argnums=0, out_shardings=(shardings, None),
    )  # fmt: skip
    by_row = batch_sharding(mesh, 0)

    # Whatever stops the run, a reward function's own error too, the checkpoint under way and the last lines are kept.
    with jax.set_mesh(mesh), contextlib.ExitStack() as kept:
        # --- where the state comes from: the newest good checkpoint of this run, else the SFT and reward models ---
        checkpointer = kept.enter_context(contextlib.closing(Checkpointer(workdir, c.checkpoint)))
        state, seconds = checkpointer.resume(
            abstract, shardings, data=prompts.fingerprint, total=iterations, unit="iteration",
            changed=f"{c.data.source} has changed since the run began: put it back or take another --workdir.",
        )  # fmt: skip
        if state is None:

            def make(policy, reward):
                trunk = reward or heads.scalar_model(policy, policy_config, None)
                value = trunk if value_config else {"head": heads.new_head(policy_config.d_model, None)}
                return new_state(policy, value, policy_tx, value_tx, c.kl.coefficient, c.seed)

            state = jax.jit(make, out_shardings=shardings)(base.params, judge_model and judge_model.params)
        start = int(state.step)
        freeze = jax.jit(lambda p: frozen(p, n.dtype))
        reference, reward = freeze(base.params), judge_model and freeze(judge_model.params)
        base = judge_model = None
        if c.offload:
            reference, reward = offloaded(reference), offloaded(reward)
        writer = kept.enter_context(contextlib.closing(MetricWriter(workdir, c.log, start, configs.to_json(c))))
        if hosts.first():
            at_once = ((c.batch_size, widths[-1]), (min(c.eval.prompts, len(held_out.ids)), eval_widths[-1]))
            most = max(at_once, key=lambda rows_slots: rows_slots[0] * (rows_slots[1] + n.response))
            print(memory_plan(state, reference, reward, n, *most, c.offload))
            print(
                f"policy and reference: {c.policy} at step {about['policy_step']:,}"
                + (f"; reward model: {c.reward} at step {about['reward_step']:,}" if reward else "")
            )
            print(
                f"{len(prompts.ids):,} prompts of up to {widths[-1]} tokens{prompts.left_out.describe()}; "
                f"responses of up to {n.response}; "
                f"{iterations} iterations of {c.batch_size} episodes, {c.ppo.epochs} x {c.ppo.minibatches} steps each"
                f"{pipeline.describe(policy_config, mesh.shape, c.ppo.microbatch_size or rows)}"
            )
            if start < iterations <= c.rate.warmup:
                print(
                    f"warning: the run ends within its warm-up (rate.warmup={c.rate.warmup} iterations): the learning "
                    f"rate never exceeds {c.rate.fraction(iterations - 1, iterations):.0%} of its peak."
                )

        # --- one phase each ---
        def sample(policy, prompts, lengths, key):
            return rollout.sample(policy, prompts, lengths, key, n)

        def judge(state, tokens, lengths, mask):
            """The four models' view of the samples, and the whole score of each."""
            models = on_device((reference, reward), c.offload)
            judged = rollout.judge(
                state.policy, state.value, *models, tokens, lengths, mask, n, rows=c.rollout.forward_rows
            )
            return judged, judged.get("score")

        def rule_score(tokens, lengths, mask, texts, score):
            if reward_fn is None:
                return score
            ids, responses = rewards.split_rows(*map(hosts.whole, (tokens, lengths, mask)))
            ruled = rewards.call(reward_fn, c.reward_on, template, ids, texts, responses)
            return ruled if score is None else hosts.whole(score) + ruled

        def finish(judged, score, coefficient):
            r = c.rollout
            return rollout.finish(
                judged, score, coefficient, eos_id=n.eos_id, missing_eos=r.missing_eos, gamma=r.gamma, lam=r.lam,
                whiten_rewards=r.whiten_rewards, whiten_advantages=r.whiten_advantages,
            )  # fmt: skip

        def pretraining_batch(state):
            if not c.ppo.ptx_coefficient:
                return None
            shape = ptx.batch_shape(c.ptx, c.ppo.minibatches, rows, c.ppo.microbatch_size, mesh)
            return text.batch(int(state.ptx_position), shape, ptx.sequences(c.ptx, rows), mesh)

        evaluate = evaluator(
            c.eval, n, held_out, eval_widths, template, text, (sample, judge, rule_score, finish), mesh, c.seed,
            record["shuffle"],
        )

        # --- the loop ---
        def assess(step) -> bool:
            """Whether the iteration has an evaluation, before the run was asked to stop."""
            if step in {line["step"] for line in writer.evaluations()}:
                return True
            try:
                record, table = evaluate(state)
            except Interrupted:
                return False
            writer.evaluation({"step": step, **record})
            writer.samples(step, table)
            bar.clear()
            shown = [f"{k} {v:.3f}" for k, v in record.items() if isinstance(v, float)]
            hosts.say(f"iteration {step}: {', '.join(shown)}")
            return True

        def save(step):
            nonlocal saved
            writer.flush()
            if checkpointer.save(step, state, {"seconds": seconds, "data": prompts.fingerprint}):
                saved = step

        bar = progress(total=iterations, initial=start, unit="it", disable=not hosts.first())
        saved, compiled, stopping = start if start else -1, set(), False
        with stop_on_signals() as asked_to_stop, loop.ends_when_stuck(c.log.stuck_after) as alive:
            if start % c.eval.every == 0 or start == iterations:
                # at the beginning, or where a kill came between saving and evaluating
                stopping = not assess(start)
            for iteration in range(start, start if stopping else iterations):
                clock = Clock()
                batch = batches.at(int(state.prompt_position))
                width = batch["tokens"].shape[1]
                if width not in compiled:
                    compiled.add(width)
                    bar.clear()
                    hosts.say(f"iteration {iteration + 1}: compiling for prompts padded to {width} of {widths[-1]}")
                    alive()
                tokens, lengths = (hosts.place(batch[k], by_row) for k in ("tokens", "lengths"))
                tokens, mask, sampled = sample(state.policy, tokens, lengths, phase_keys(state)[1])
                clock.lap("rollout", mask)
                judged, score = judge(state, tokens, lengths, mask)
                texts = [prompts.texts[i] for i in batch["index"]]
                score = rule_score(tokens, lengths, mask, texts, score)
                experience, metrics = finish(judged, score, state.kl_coefficient)
                metrics["policy/rollout_logp_diff"] = rollout.sampler_difference(sampled, judged["log_prob"], mask)
                clock.lap("score", experience)
                fraction = c.rate.fraction(iteration, iterations)
                rates = (np.float32(fraction * c.optimizer.learning_rate),
                         np.float32(fraction * c.value_optimizer.learning_rate))  # fmt: skip
                state, more = update(state, experience, pretraining_batch(state), rates)
                if c.kl.target is not None:
                    state = steer_kl(state, metrics["objective/kl"], c)
                clock.lap("update", state.policy)

                # --- figures, alarms, evaluation, checkpoint ---
                line = {k: float(v) for k, v in jax.device_get(metrics | more).items()}
                seconds += clock.total
                line |= clock.figures(mask, tokens) | {"learning_rate": float(rates[0]), "seconds": seconds}
                line["prompt/width"] = width
                step = iteration + 1
                writer.train({"step": step, "episodes": step * c.batch_size, **line})
                check_iteration(line, iteration, n.dtype, checkpointer, writer, c.rollout.missing_eos)
                bar.update()
                bar.set_postfix_str(
                    f"score {line['objective/score']:.3f}, kl {line['objective/kl']:.2f}, "
                    f"length {line['response/length']:.0f}, {clock.total:.1f} s", refresh=False
                )  # fmt: skip
                stopping = asked_to_stop()
                alive()
                at_end = step == iterations or stopping
                if at_end or step % c.checkpoint.every == 0:
                    save(step)
                if not stopping and (step % c.eval.every == 0 or step == iterations) and not assess(step):
                    stopping = True  # resuming the run evaluates this iteration
                    save(step)
                if stopping:
                    break
            bar.close()
            done = int(state.step)
            on_disk = checkpointer.wait() and (saved == done or done == 0)
    if not on_disk:
        raise InputError(
            "The last checkpoint could not be written: free some disk space and give the same command again."
        )
    finished = done >= iterations and not stopping
    if not finished:
        hosts.say(
            f"asked to stop: saved iteration {saved}; the same command goes on from there" if saved >= 0
            else "asked to stop before the first iteration; the same command starts again"
        )  # fmt: skip
    if hosts.first():
        print(f"{time.perf_counter() - began:.0f} s in all; report: {report.write(workdir)}")
    return finished


def steer_kl(state, kl, c: PPOConfig):
    """The adaptive coefficient, once an iteration."""
    coefficient = adaptive_kl_coefficient(state.kl_coefficient, kl, c.batch_size, c.kl.target, c.kl.horizon)
    return dataclasses.replace(state, kl_coefficient=jax.device_put(coefficient, state.kl_coefficient.sharding))


if __name__ == "__main__":
    command_line.run_stage(ppo)
