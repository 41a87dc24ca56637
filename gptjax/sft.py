"""Supervised fine-tuning on demonstrations (InstructGPT stage 1).

    python -m gptjax.sft --config=configs/instructgpt/sft.py --workdir=runs/sft --config.init_from=runs/pretrain \
        --config.data.source=demonstrations.jsonl

Rows are {"prompt", "response"} or {"messages": [{"role", "content"}, ...]}. The same command resumes an interrupted
run, bitwise identical.
"""

import dataclasses

import jax
from ml_collections import config_dict as mlc

from gptjax import command_line, paths
from gptjax.data.chat import Template, chat_tokenizer
from gptjax.data.corpus import load_text
from gptjax.data.demonstrations import (
    DemonstrationBatches,
    DemonstrationConfig,
    PackedRows,
    load_demonstrations,
    validation_batches,
)
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.evals.base import spread
from gptjax.evals.generation import ResponseConfig, responses, scored_prompts, scored_responses
from gptjax.evals.lm import response_loss
from gptjax.generation.decode import Decoder
from gptjax.model import gpt, heads
from gptjax.model.architecture import require_gpt
from gptjax.model.flops import flops_per_token
from gptjax.model.spec import GPTConfig, ModelOptions, parameter_count
from gptjax.objectives.base import Objective
from gptjax.objectives.sft import sft_loss, weigher
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import check_fits
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import BelowOne, Count
from gptjax.rlhf.reward_model import RewardModel, load_reward_model
from gptjax.run import Claim, require, run
from gptjax.trained import load_base, origin
from gptjax.training.checkpoint import check_selection
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.schedule import Schedule
from gptjax.training.stage import Evaluator, RunResult, Stage, TrainConfig
from gptjax.training.state import new_state
from gptjax.training.step import TrainProgram, train_program
from gptjax.training.supervised import make_schedule, supervised


@dataclasses.dataclass(frozen=True)
class MixConfig:
    """Pre-training text mixed into the demonstrations (InstructGPT C.3: 10 % for the model RL starts from).

    fraction: share of the rows of a batch, 0 = none.
    source: the text; None = what the run's weights were pre-trained on.
    cache: local folder for its tokens, as data.cache of pre-training; None = `data` in the workdir, or without
        `source` where that pre-training has them.
    """

    fraction: BelowOne = 0.0
    source: str | None = paths.field(paths.SOURCE)
    cache: str | None = paths.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning. How long: the first given of steps and epochs.

    batch_size: rows of a step over all devices, each of which holds several demonstrations when they are packed.
    init_from: the workdir to start from.
    selection: the checkpoint that later stages use: 'last', 'loss' (lowest on validation) or 'reward' (highest score
        of the reward model, as InstructGPT C.1).
    reward: the workdir of that reward model.
    lm_weight: lambda of GPT-1's auxiliary language-model term, 0 = none.
    loss_chunk: time steps whose logits are held at once.
    """

    init_from: str | None = paths.field()
    model: ModelOptions = ModelOptions()
    data: DemonstrationConfig = DemonstrationConfig()
    mix: MixConfig = MixConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, weight_decay=0.0)
    samples: ResponseConfig = ResponseConfig()
    selection: str = "last"
    reward: str | None = paths.field()
    lm_weight: float = 0.0
    loss_chunk: Count = 128

    def __post_init__(self):
        super().__post_init__()
        if (self.selection == "reward") != (self.reward is not None):
            raise InputError(
                "selection='reward' and --config.reward=WORKDIR (of a reward model) go together: give both or neither."
            )
        if self.selection == "reward" and self.samples.count < 1:
            raise InputError("selection='reward' scores samples: set --config.samples.count to at least 1.")
        check_selection(self, ("last", "loss", "reward"))


def sft(config: mlc.ConfigDict, workdir) -> RunResult:
    """Runs the stage (run.run)."""
    return run("sft", SFTConfig, build, config, workdir)


def program(c: SFTConfig, model: GPTConfig, mesh) -> TrainProgram:
    """What runs on the devices, from shapes alone."""
    objective = Objective(sft_loss(model, c.precision.dtype, c.loss_chunk, mesh), prepare=weigher(c.lm_weight))
    return train_program(objective, gpt.abstract_params, model, c.optimizer, c.precision, mesh)


def build(c: SFTConfig, mesh, claim: Claim) -> Stage:
    """The Stage of this run: base model, demonstrations, pre-training mix, device program."""
    require(c, {
        "init_from": "No model to start from: give --config.init_from=WORKDIR of a pre-training run.",
        "data.source": "No demonstrations: give --config.data.source=PATH (JSONL, Parquet or hf:NAME).",
        "steps,epochs": "Say how long to train: --config.steps or --config.epochs.",
    })  # fmt: skip

    # --- the base model, with new tokens for the chat template ---
    base = load_base(c.init_from, claim.workdir, mesh=mesh)
    require_gpt(base.config, "SFT")
    tokenizer = chat_tokenizer(base.tokenizer)
    model = c.model.apply(base.config, vocab_size=max(base.config.vocab_size, tokenizer.vocab_size))
    length = c.data.max_length or model.context_length
    check_fits(mesh.shape, n_head=model.n_head, time=length, **c.rows)
    pipeline.make_plan(model, mesh.shape, c.microbatch_rows)
    reward_model = c.reward and load_reward_model(c.reward, mesh=mesh, tokenizer=tokenizer)

    # --- data ---
    template = Template(tokenizer, c.data.template)
    demonstrations = load_demonstrations(c.data, template, model.context_length, c.seed)
    packed = PackedRows(demonstrations.train, length, c.data.packing, template.pad_id)
    if reward_model:
        check_reward_model(c, reward_model, demonstrations, template, model.context_length)
    hosts.agree("The demonstrations", demonstrations.fingerprint)
    sections = {"model": model, "origin": origin(init_from=base, reward=reward_model)}
    claim.check(c, **sections)
    record, mix, text = claim.begin(c.init_from), None, None
    if c.mix.fraction:
        claim.save(tokenizer)  # of the mix
        text = load_text(
            c.mix.source, c.init_from, claim.workdir, c.mix.cache, "mix.cache", c.seed + 1, record, claim.known
        )
        mix = text.examples(length, c.seed + 1, record["shuffle"])
    claim.make(c, tokenizer, text, **sections)
    hosts.only_first(lambda: demonstrations.left_out.write(claim.workdir))
    byte_lengths = tokenizer.byte_lengths if tokenizer.lossless else tokenizer.byte_lengths * demonstrations.byte_ratio
    here = hosts.batch_rows(batch_sharding(mesh, 0), c.microbatch_rows)
    options = {"byte_lengths": byte_lengths, "loss_on": c.data.loss_on, "here": here}
    batches = DemonstrationBatches(
        packed, c.batch_size, c.seed, mix=mix, mix_fraction=c.mix.fraction, mix_eot_id=text and text.eot_id,
        shuffle=record["shuffle"], **options,
    )  # fmt: skip
    schedule = make_schedule(c, length, batches)
    held_out = PackedRows(demonstrations.validation, length, c.data.packing, template.pad_id)
    validation = validation_batches(held_out, c.microbatch_rows, **options)

    # --- model ---
    train = program(c, model, mesh)

    def init():
        make = lambda params: new_state(heads.grow_vocabulary(params, model.vocab_size), train.tx, c.precision)
        return jax.jit(make, out_shardings=train.shardings)(base.params)

    decoder = Decoder(model, template.vocab_size, c.precision.dtype, mesh)
    sampler = (c.samples, demonstrations, decoder, template, c.seed)
    evaluators = [
        Evaluator(response_loss(train.objective.loss, spread(validation, c.eval.batches), mesh), c.eval.every),
        Evaluator(responses(*sampler)),
    ]
    if reward_model:
        evaluators.insert(1, Evaluator(scored_responses(reward_model, *sampler), c.eval.every))
    # The MFU is counted from the tokens in the loss, which are not all that is computed if prompts are not among them.
    counted = c.data.loss_on == "all"
    return supervised(
        c, train, batches, schedule, mesh, workdir=claim.workdir, init=init, data=demonstrations.fingerprint,
        flops_per_token=flops_per_token(model).palm if counted else None,
        changed=f"{c.data.source} has changed since the run began: restore it, or give another --workdir.",
        evaluators=tuple(evaluators), begin=lambda state: describe(c, model, demonstrations, packed, schedule, mesh),
    )  # fmt: skip


def check_reward_model(c: SFTConfig, reward_model: RewardModel, demonstrations, template: Template, context: int):
    """InputError: the reward model of selection='reward' cannot read the sampled responses."""
    longest = max(map(len, scored_prompts(c.samples, demonstrations)), default=0) + c.samples.max_new_tokens
    reward_model.check_length(
        min(longest, context),
        "selection='reward' scores sampled responses: lower --config.samples.max_new_tokens or "
        "--config.data.max_length, or take a reward model of a longer context.",
    )
    if reward_model.template != template.kind:
        raise InputError(
            f"The reward model in {c.reward} saw {reward_model.template!r} prompts, not {template.kind!r} ones."
        )


def describe(c: SFTConfig, model: GPTConfig, demonstrations, packed: PackedRows, schedule: Schedule, mesh):
    """Prints the model, the data and the length of the run."""
    hosts.say(
        f"{parameter_count(model):,} parameters from {c.init_from}, vocabulary {model.vocab_size:,}"
        f"{pipeline.describe(model, mesh.shape, c.microbatch_rows)}\n"
        f"{len(demonstrations.train):,} demonstrations in {len(packed):,} rows of {packed.length} tokens"
        f"{demonstrations.left_out.describe()}; "
        f"{len(demonstrations.validation):,} held out; {schedule.steps:,} steps of {c.batch_size} rows"
    )


if __name__ == "__main__":
    command_line.run_stage(sft, SFTConfig)
