"""Pre-training: text -> tokens -> GPT (or LSTM) -> checkpoints.

    python -m gptjax.pretrain --config=configs/gpt2.py:124m --workdir=runs/x --config.data.source=PATH

The same command resumes an interrupted run: bitwise identical on the same mesh, to rounding on another.
"""

import dataclasses
import functools

from ml_collections import config_dict as mlc

from gptjax import command_line, paths, run_config
from gptjax.data import lm, validation
from gptjax.data.corpus import DataConfig, Text, load_corpus, shards_directory
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.evals.generation import SamplesConfig, continuations, sample_prompts
from gptjax.evals.lm import text_loss
from gptjax.generation.decode import Decoder
from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.objectives.base import Objective
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import Count, Positive
from gptjax.run import Claim, run
from gptjax.trained import check_same_tokenizer, load_initial, origin
from gptjax.training.schedule import Schedule
from gptjax.training.stage import Evaluator, RunResult, Stage, TrainConfig
from gptjax.training.state import init_state
from gptjax.training.step import TrainProgram, train_program
from gptjax.training.supervised import supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(TrainConfig):
    """Pre-training. How long: the first given of steps, tokens and epochs.

    tokens: length of the run in training tokens, if steps is not given.
    batch_size: sequences of a step over all devices.
    loss_chunk: time steps whose logits are held at once.
    noise_scale: log the gradient noise scale in tokens (training/noise_scale.py), from the gradients of the
        micro-batches, of which a batch must have at least two (microbatch_size).
    init_from: a workdir whose weights the run starts from; None = random ones.
    """

    model: ModelConfig
    data: DataConfig = DataConfig()
    samples: SamplesConfig = SamplesConfig()
    tokens: Positive | None = None
    loss_chunk: Count = 128
    noise_scale: bool = False
    init_from: str | None = paths.field()

    def __post_init__(self):
        super().__post_init__()
        if self.noise_scale and self.microbatch_rows == self.batch_size:
            raise InputError(
                f"noise_scale compares gradients of micro-batches with that of the batch, and batch_size="
                f"{self.batch_size} is a single one: set microbatch_size to a half of it or less."
            )


def pretrain(config: mlc.ConfigDict, workdir) -> RunResult:
    """Runs the stage (run.run). If config.model.vocab_size is None, it is the tokenizer's, which `build` loads."""
    section = config.to_dict() if isinstance(config, mlc.ConfigDict) else dict(config)
    vocab = (section.get("model") or {}).get("vocab_size")
    if vocab is None and hosts.from_first((paths.local(workdir) / "config.json").exists):
        vocab = run_config.read_config(workdir)["model"]["vocab_size"]
    section["model"] = (section.get("model") or {}) | {"vocab_size": vocab or 1}  # until the tokenizer is there
    return run("pretrain", PretrainConfig, functools.partial(build, by_tokenizer=vocab is None), section, workdir)


def program(c: PretrainConfig, model: ModelConfig, mesh) -> TrainProgram:
    """What runs on the devices, from shapes alone."""
    objective = Objective(causal_lm_loss(model, c.precision.dtype, c.loss_chunk, mesh))
    return train_program(
        objective, architecture.abstract_params, model, c.optimizer, c.precision, mesh, c.noise_scale
    )


def build(c: PretrainConfig, mesh, claim: Claim, by_tokenizer: bool) -> Stage:
    """The Stage of this run. by_tokenizer: set model.vocab_size to the tokenizer's."""
    architecture.check_fits(c.model, mesh.shape, time=c.model.context_length, **c.rows)
    claim.check(c)

    # --- data ---
    # One host tokenizes; the others open its token shards, or make their own if data.cache is not a shared folder.
    record = claim.begin()
    corpus = load_corpus(c.data, claim.workdir, c.seed, record, claim.known)
    hosts.agree("The tokens", [corpus.fingerprint, corpus.tokenizer.fingerprint])
    tokenizer = corpus.tokenizer
    if by_tokenizer:
        c = dataclasses.replace(c, model=dataclasses.replace(c.model, vocab_size=tokenizer.vocab_size))
    if tokenizer.vocab_size > c.model.vocab_size:
        raise InputError(
            f"The tokenizer has {tokenizer.vocab_size} tokens and the model {c.model.vocab_size}: raise "
            "--config.model.vocab_size or train a smaller tokenizer (--config.data.tokenizer=bpe:SIZE)."
        )
    context = c.model.context_length
    examples = corpus.examples(context, c.seed, record["shuffle"])
    for part in corpus.parts:
        validation.warn_if_few(part.validation, context)
    prompts = sample_prompts(c.samples.prompts, tokenizer, context)  # checked now, not when they are used
    schedule = Schedule(
        c.schedule, batch_size=c.batch_size, context_length=context, learning_rate=c.optimizer.learning_rate,
        steps=c.steps, tokens=c.epochs * corpus.train_tokens if c.epochs and c.tokens is None else c.tokens,
    )  # fmt: skip
    here = hosts.batch_rows(batch_sharding(mesh, 0), c.microbatch_rows)
    batches = lm.LmBatches(
        examples, lambda step: (schedule.sequences_before(step), schedule.sequences(step)),
        lambda step: -(-schedule.sequences(step) // c.microbatch_rows) * c.microbatch_rows,
        byte_lengths=corpus.byte_lengths, eot_id=tokenizer.eot_id, isolate_documents=c.data.isolate_documents,
        here=here,
    )  # fmt: skip

    # --- model ---
    model = architecture.resolved(c.model, mesh.devices.flat[0].platform)
    train = program(c, model, mesh)
    base = None
    # Once the run has checkpoints the weights of init_from are not needed, nor its folder.
    if c.init_from and not (claim.resuming and not paths.local(c.init_from).exists()):
        check_same_tokenizer(c.init_from, tokenizer)
    if c.init_from and not claim.resuming:
        base = load_initial(c.init_from, model, train.abstract.params, train.shardings.params, tokenizer, mesh)

    def init():
        state = init_state(model, train.tx, c.precision, train.shardings, c.seed)
        return dataclasses.replace(state, params=base.params) if base else state

    # --- all input has been checked: claim the workdir ---
    claim.make(c, tokenizer, corpus, **({"origin": origin(init_from=base)} if base else {}))
    most = c.eval.batches or None
    decoder = Decoder(model, tokenizer.vocab_size, c.precision.dtype, mesh)
    held_out = corpus.validation_batches(context, c.microbatch_rows, most, here=here)
    return supervised(
        c, train, batches, schedule, mesh, workdir=claim.workdir, init=init,
        flops_per_token=architecture.flops_per_token(model).palm, data=corpus.fingerprint,
        changed=f"The tokens in {shards_directory(c.data.cache, claim.workdir)} are not those this run was trained on: "
        "restore them, or start again in a new --workdir.",
        evaluators=(
            Evaluator(text_loss(train.objective.loss, corpus, held_out, mesh), c.eval.every),
            Evaluator(continuations(c.samples, prompts, decoder, tokenizer, c.seed)),
        ),
        begin=lambda state: describe(c, model, corpus, schedule, mesh),
    )  # fmt: skip


def describe(c: PretrainConfig, model: ModelConfig, corpus: Text, schedule: Schedule, mesh):
    """Prints the model, the mesh, the data and the length of the run."""
    axes = " x ".join(f"{k} {v}" for k, v in mesh.shape.items() if v > 1) or "1 device"
    hosts.say(
        f"{architecture.parameter_count(model):,} parameters, {architecture.computed_by(model)}, "
        f"{c.precision.compute}, {mesh.devices.flat[0].device_kind}, mesh {axes}"
        f"{architecture.pipeline_clause(model, mesh.shape, c.microbatch_rows)}\n"
        f"{corpus.train_tokens:,} training tokens, vocabulary {corpus.tokenizer.vocab_size:,}; "
        f"{schedule.steps:,} steps of {c.batch_size} x {model.context_length} tokens = {schedule.total_tokens:,}"
    )


if __name__ == "__main__":
    command_line.run_stage(pretrain, PretrainConfig)
