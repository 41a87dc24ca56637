"""Supervised fine-tuning on demonstrations (InstructGPT stage 1).

    python -m gptjax.sft --config=configs/instructgpt/sft.py --workdir=runs/sft --config.init_from=runs/pretrain \
        --config.data.source=demonstrations.jsonl

Rows are {"prompt", "response"} or {"messages": [{"role", "content"}, ...]}. The same command resumes a stopped run
where it was, bit for bit.
"""

import contextlib
import dataclasses
import time

import jax
from etils import epath
from ml_collections import config_dict as mlc

from gptjax import command_line, lock, paths, report, run_config
from gptjax import config as configs
from gptjax.data.chat import Template, chat_tokenizer
from gptjax.data.corpus import load_text
from gptjax.data.demonstrations import (
    DemonstrationBatches,
    DemonstrationConfig,
    PackedRows,
    load_demonstrations,
    validation_batches,
)
from gptjax.data.records import start_record, write_record
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.generation.respond import respond
from gptjax.model import gpt, heads
from gptjax.model.flops import flops_per_token
from gptjax.model.spec import GPTConfig, ModelOptions, parameter_count
from gptjax.objectives.finetune import auxiliary_weights
from gptjax.objectives.lm import bits_per_byte, causal_lm_loss
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import MeshConfig, check_fits, make_mesh
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import BelowOne, Count, Positive, Seed
from gptjax.rlhf.reward_model import load_reward_model
from gptjax.trained import load_base, origin
from gptjax.training import loop
from gptjax.training.checkpoint import CheckpointConfig, Checkpointer, check_selection
from gptjax.training.metrics import LogConfig, MetricWriter
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig
from gptjax.training.schedule import Schedule, ScheduleConfig
from gptjax.training.state import new_state, state_shardings
from gptjax.training.step import jit_eval_step, jit_train_step, train_step


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """Pre-training text mixed into the demonstrations (InstructGPT C.3: 10 % for the model RL starts from).

    fraction: share of the rows of a batch, 0 = none. source: None = what the run's weights were pre-trained on. cache:
    local folder for the tokens, as data.cache of pre-training; None = `data` in the workdir, or without `source` where
    that pre-training has them."""

    fraction: BelowOne = 0.0
    source: str | None = paths.field(paths.SOURCE)
    cache: str | None = paths.field()

    def __post_init__(self):
        if not 0 <= self.fraction < 1:
            raise InputError(f"mix.fraction={self.fraction} must be a share from 0 to under 1.")


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """responses to validation prompts, written to samples.jsonl before the first step and after the last; they are
    also what selection='reward' scores."""

    count: int = 8
    max_new_tokens: Count = 64
    temperature: float = 0.7


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """How long: the first given of steps and epochs. batch_size: rows of a step, each of which holds several
    demonstrations when they are packed. lm_weight: lambda of GPT-1's auxiliary language-model term, 0 = none.
    selection: the checkpoint that later stages use: 'last', 'loss' (lowest on validation) or 'reward' (highest score
    of the reward model in the workdir `reward`, as InstructGPT C.1). init_from: the workdir to start from."""

    init_from: str | None = paths.field()
    model: ModelOptions = ModelOptions()
    data: DemonstrationConfig = DemonstrationConfig()
    mix: MixConfig = MixConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: loop.EvalConfig = loop.EvalConfig()
    log: LogConfig = LogConfig()
    samples: SamplesConfig = SamplesConfig()
    selection: str = "last"
    reward: str | None = paths.field()
    lm_weight: float = 0.0
    seed: Seed = 0
    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 32
    microbatch_size: Count | None = None
    steps_per_dispatch: Count = 1
    loss_chunk: Count = 128

    def __post_init__(self):
        if self.selection not in ("last", "loss", "reward"):
            raise InputError(f"selection={self.selection!r}: choose last, loss or reward.")
        if (self.selection == "reward") != (self.reward is not None):
            raise InputError(
                "selection='reward' needs the workdir of a reward model, --config.reward=..., and no other."
            )
        if self.selection == "reward" and self.samples.count < 1:
            raise InputError("selection='reward' scores samples: set --config.samples.count to at least 1.")
        check_selection(self)
        if self.lm_weight < 0 or self.batch_size < 1 or self.steps_per_dispatch < 1 or self.loss_chunk < 1:
            raise InputError("batch_size, steps_per_dispatch and loss_chunk are at least 1, lm_weight at least 0.")
        if self.batch_size % self.microbatch_rows:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of microbatch_size={self.microbatch_size}: change one."
            )

    @property
    def microbatch_rows(self) -> int:
        return self.microbatch_size or self.batch_size


@configs.with_sharding_rules
@lock.holds_workdir
def sft(config: mlc.ConfigDict, workdir: str) -> bool:
    """The whole stage. Returns whether the run is finished (False after a SIGTERM or Ctrl-C)."""
    began = time.perf_counter()
    workdir = epath.Path(workdir)

    # --- config ---
    c = configs.build(SFTConfig, config)
    if c.init_from is None:
        raise InputError("No model to start from: give --config.init_from=WORKDIR of a pre-training run.")
    if c.data.source is None:
        raise InputError("No demonstrations: give --config.data.source=PATH (JSONL, Parquet or hf:NAME).")
    if c.steps is None and c.epochs is None:
        raise InputError("Say how long to train: --config.steps or --config.epochs.")
    mesh = make_mesh(c.mesh)

    # --- the model it starts from; new tokens for the chat template ---
    base = load_base(c.init_from, workdir, mesh=mesh)
    tokenizer = chat_tokenizer(base.tokenizer)
    model = c.model.apply(base.config, vocab_size=max(base.config.vocab_size, tokenizer.vocab_size))
    length = c.data.max_length or model.context_length
    check_fits(mesh.shape, n_head=model.n_head, batch_size=c.batch_size, microbatch_size=c.microbatch_rows, time=length)
    pipeline.make_plan(model, mesh.shape, c.microbatch_rows)
    judge = c.reward and load_reward_model(c.reward, mesh=mesh, tokenizer=tokenizer)

    # --- data ---
    template = Template(tokenizer, c.data.template)
    demonstrations = load_demonstrations(c.data, template, model.context_length, c.seed)
    packed = PackedRows(demonstrations.train, length, c.data.packing, template.pad_id)
    if judge:
        longest = max((len(p) for p in scored_prompts(c, demonstrations)), default=0) + c.samples.max_new_tokens
        judge.check_length(
            min(longest, model.context_length),
            "selection='reward' scores sampled responses: lower --config.samples.max_new_tokens or "
            "--config.data.max_length, or take a reward model of a longer context.",
        )
    if judge and judge.template != template.kind:
        raise InputError(f"The reward model in {c.reward} saw {judge.template!r} prompts, not {template.kind!r} ones.")
    hosts.agree("The demonstrations", demonstrations.fingerprint)
    known = hosts.from_first((workdir / "config.json").exists)
    sections = {"model": model, "origin": origin(init_from=base, reward=judge)}
    if known:
        run_config.claim_workdir(workdir, "sft", c, **sections)
    hosts.only_first(lambda: tokenizer.save(workdir / "tokenizer"))
    mix, text, record = None, None, start_record(workdir, known, c.init_from)
    if c.mix.fraction:
        text = load_text(c.mix.source, c.init_from, workdir, c.mix.cache, "mix.cache", c.seed + 1, record, known)
        mix = text.examples(length, c.seed + 1, record["shuffle"])
    if not known:
        write_record(workdir, record, text)
        run_config.claim_workdir(workdir, "sft", c, **sections)
    hosts.only_first(lambda: demonstrations.left_out.write(workdir))
    here = hosts.batch_rows(batch_sharding(mesh, 0), c.microbatch_rows)
    byte_lengths = tokenizer.byte_lengths if tokenizer.lossless else tokenizer.byte_lengths * demonstrations.byte_ratio
    kind = {"byte_lengths": byte_lengths, "loss_on": c.data.loss_on, "here": here}
    batches = DemonstrationBatches(
        packed, c.batch_size, c.seed, mix=mix, mix_fraction=c.mix.fraction, mix_eot_id=text and text.eot_id,
        shuffle=record["shuffle"], **kind,
    )  # fmt: skip
    schedule = Schedule(
        c.schedule, batch_size=c.batch_size, context_length=length, learning_rate=c.optimizer.learning_rate,
        steps=c.steps if c.steps is not None else batches.steps(c.epochs),
    )  # fmt: skip

    # --- abstract state, shardings, step ---
    tx = make_optimizer(c.optimizer)
    abstract, shardings = state_shardings(gpt.abstract_params(model), tx, c.precision, mesh)
    loss = sft_loss(model, c.precision.dtype, c.loss_chunk, mesh)
    step = train_step(
        loss, tx, c.optimizer.clip_norm, c.precision, c.seed, dropout=model.dropout > 0, weigh=weigher(c.lm_weight)
    )
    evaluate = evaluator(c, model, packed_validation(c, demonstrations, length, template, kind), judge, demonstrations,
                         template, mesh)  # fmt: skip

    # Whatever stops the run, the checkpoint being written and the last lines are kept.
    with jax.set_mesh(mesh), contextlib.ExitStack() as kept:
        # --- where the state comes from: the newest good checkpoint of this run, else init_from's weights ---
        checkpointer = kept.enter_context(contextlib.closing(Checkpointer(workdir, c.checkpoint)))
        state, seconds = checkpointer.resume(
            abstract, shardings, data=demonstrations.fingerprint, total=schedule.steps,
            changed=f"{c.data.source} has changed since the run began: put it back or take another --workdir.",
        )  # fmt: skip
        if state is None:
            make = lambda params: new_state(heads.grow_vocabulary(params, model.vocab_size), tx, c.precision)
            state = jax.jit(make, out_shardings=shardings)(base.params)
        del base
        start = int(state.step)
        writer = kept.enter_context(contextlib.closing(MetricWriter(workdir, c.log, start, configs.to_json(c))))

        # --- loop ---
        describe_run(c, model, demonstrations, packed, schedule, mesh)
        if start == 0:
            write_samples(writer, 0, state.params, model, demonstrations, template, c, mesh)
        state, finished = loop.train(
            c, state, jit_train_step(step, shardings), batches, mesh=mesh, schedule=schedule, checkpointer=checkpointer,
            writer=writer, evaluate=evaluate, data=demonstrations.fingerprint, seconds_before=seconds,
            train_flops_per_token=None if mix is None and c.data.loss_on == "response" else flops_per_token(model).palm,
        )  # fmt: skip
        if finished:
            write_samples(writer, schedule.steps, state.params, model, demonstrations, template, c, mesh)
    if hosts.first():
        print(f"{time.perf_counter() - began:.0f} s in all; report: {report.write(workdir)}")
    return finished


def sft_loss(model: GPTConfig, dtype, chunk: int, mesh=None):
    """The language-model loss under the batch's token weights; counted are the task's tokens (`task`), which are the
    weights themselves without an auxiliary term."""
    language_model = causal_lm_loss(model, dtype, chunk, mesh)

    def loss(params, batch, dropout_keys):
        total, _ = language_model(params, batch, dropout_keys)
        return total, batch.get("task", batch["weights"]).sum()

    return loss


def weigher(lm_weight: float):
    """What train_step does to a whole batch first: GPT-1's auxiliary term as token weights (eq. 5)."""
    if not lm_weight:
        return None

    def weigh(batch):
        task = batch["weights"]
        return batch | {"task": task, "weights": auxiliary_weights(task, batch["lm_weights"], lm_weight)}

    return weigh


def packed_validation(c: SFTConfig, demonstrations, length: int, template: Template, kind: dict):
    packed = PackedRows(demonstrations.validation, length, c.data.packing, template.pad_id)
    batches = validation_batches(packed, c.microbatch_rows, **kind)
    most = c.eval.batches or len(batches)
    return batches if len(batches) <= most else [batches[i * len(batches) // most] for i in range(most)]


def evaluator(c: SFTConfig, model, batches, judge, demonstrations, template, mesh):
    """params -> {'loss' in nats per response token, 'bits_per_byte', 'tokens'}, with a reward model also 'reward', the
    mean score of sampled responses to validation prompts."""
    step = jit_eval_step(sft_loss(model, c.precision.dtype, c.loss_chunk, mesh), mesh)
    sharding = batch_sharding(mesh, 0)

    def evaluate(params) -> dict:
        total, count, more = loop.evaluation_sums(step, params, batches, sharding)
        bits = float(bits_per_byte(total, max(more["target_bytes"], 1)))
        result = {"loss": total / max(count, 1), "bits_per_byte": bits, "tokens": int(count)}
        if judge:
            prompts = scored_prompts(c, demonstrations)
            responses = sampled(params, model, prompts, template, c, mesh)
            result["reward"] = float(judge.score(prompts, responses).mean())
            result["selection"] = -result["reward"]
        return result

    return evaluate


def scored_prompts(c: SFTConfig, demonstrations) -> list:
    """The validation prompts (ids) whose sampled responses selection='reward' scores."""
    return [d.ids[: d.prompt] for d in demonstrations.validation if d.prompt][: 4 * c.samples.count]


def sampled(params, model: GPTConfig, prompts, template: Template, c: SFTConfig, mesh) -> list[list[int]]:
    """One sampled response to each prompt, as ids with end-of-text where there was one."""
    return respond(
        params, model, prompts, template, max_new_tokens=c.samples.max_new_tokens, temperature=c.samples.temperature,
        seed=c.seed, dtype=c.precision.dtype, mesh=mesh,
    )  # fmt: skip


def write_samples(writer: MetricWriter, step, params, model, demonstrations, template: Template, c: SFTConfig, mesh):
    """Responses to the first validation prompts, beside the demonstration: to samples.jsonl and the screen."""
    if not c.samples.count:
        return
    shown = [d for d in demonstrations.validation if d.prompt][: c.samples.count]
    responses = sampled(params, model, [d.ids[: d.prompt] for d in shown], template, c, mesh)
    rows = [
        {"prompt": template.decode(d.ids[: d.prompt]), "text": template.decode(response),
         "demonstration": template.decode(d.ids[d.prompt :])}
        for d, response in zip(shown, responses, strict=True)
    ]  # fmt: skip
    writer.samples(step, rows)
    for row in rows:
        hosts.say(f"--- sample at step {step} ---\n{row['prompt']}\n=> {row['text']}")


def describe_run(c: SFTConfig, model: GPTConfig, demonstrations, packed: PackedRows, schedule: Schedule, mesh):
    if not hosts.first():
        return
    print(
        f"{parameter_count(model):,} parameters from {c.init_from}, vocabulary {model.vocab_size:,}"
        f"{pipeline.describe(model, mesh.shape, c.microbatch_rows)}\n"
        f"{len(demonstrations.train):,} demonstrations in {len(packed):,} rows of {packed.length} tokens"
        f"{demonstrations.left_out.describe()}; "
        f"{len(demonstrations.validation):,} held out; {schedule.steps:,} steps of {c.batch_size} rows"
    )


if __name__ == "__main__":
    command_line.run_stage(sft)
