"""Pre-training: text -> tokens -> GPT -> checkpoints.

    python -m gptjax.pretrain --config=configs/gpt2.py:124m --workdir=runs/x --config.data.source=PATH

The same command resumes a stopped run where it was: bit for bit on the same mesh, to rounding on another.
"""

import contextlib
import dataclasses
import time

import jax
from etils import epath
from ml_collections import config_dict as mlc

from gptjax import command_line, lock, paths, report, run_config
from gptjax import config as configs
from gptjax.data import lm
from gptjax.data.corpus import DataConfig, Text, load_corpus, shards_directory
from gptjax.data.records import start_record, write_record
from gptjax.data.tokenizer import Tokenizer
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.generation.decode import generate
from gptjax.generation.sampling import Sampling
from gptjax.model import gpt
from gptjax.model.attention import resolve
from gptjax.model.flops import flops_per_token
from gptjax.model.spec import GPTConfig, parameter_count
from gptjax.objectives.lm import causal_lm_loss
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import MeshConfig, check_fits, make_mesh
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import Count, Positive, Seed, TopP
from gptjax.trained import Model, has_no_tokenizer, origin
from gptjax.training import loop
from gptjax.training.checkpoint import CheckpointConfig, Checkpointer
from gptjax.training.metrics import LogConfig, MetricWriter
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig
from gptjax.training.schedule import Schedule, ScheduleConfig
from gptjax.training.state import init_state, state_shardings
from gptjax.training.step import jit_eval_step, jit_train_step, train_step


@dataclasses.dataclass(frozen=True)
class SamplesConfig:
    """Texts written to samples.jsonl before the first step and after the last."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: Count = 128
    temperature: float = 0.8
    top_p: TopP = 0.95


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """How long: the first given of steps, tokens and epochs. batch_size: sequences of a step over all devices;
    microbatch_size: sequences computed at a time, None = all. steps_per_dispatch: steps per device call.
    loss_chunk: time steps whose logits are held at once. init_from: a workdir to take the weights from."""

    model: GPTConfig
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: loop.EvalConfig = loop.EvalConfig()
    log: LogConfig = LogConfig()
    samples: SamplesConfig = SamplesConfig()
    seed: Seed = 0
    steps: Count | None = None
    tokens: Positive | None = None
    epochs: Positive | None = None
    batch_size: Count = 32
    microbatch_size: Count | None = None
    steps_per_dispatch: Count = 1
    loss_chunk: Count = 128
    init_from: str | None = paths.field()

    def __post_init__(self):
        if self.batch_size < 1 or self.steps_per_dispatch < 1 or self.loss_chunk < 1:
            raise InputError("batch_size, steps_per_dispatch and loss_chunk are at least 1.")
        if self.batch_size % self.microbatch_rows:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of microbatch_size={self.microbatch_size}: change one."
            )

    @property
    def microbatch_rows(self) -> int:
        return self.microbatch_size or self.batch_size


@configs.with_sharding_rules
@lock.holds_workdir
def pretrain(config: mlc.ConfigDict, workdir: str) -> bool:
    """The whole stage. Returns whether the run is finished (False after a SIGTERM or Ctrl-C)."""
    began = time.perf_counter()
    workdir = epath.Path(workdir)

    # --- config: checked whole before anything is written ---
    config = mlc.ConfigDict(config.to_dict())
    known = hosts.from_first((workdir / "config.json").exists)
    unset = config.model.vocab_size is None  # then the tokenizer decides
    if unset and known:
        config.model.vocab_size = run_config.read_config(workdir)["model"]["vocab_size"]
    c = configs.build(PretrainConfig, _with_vocab(config, config.model.vocab_size or 1))
    mesh = make_mesh(c.mesh)
    check_fits(
        mesh.shape, n_head=c.model.n_head, batch_size=c.batch_size, microbatch_size=c.microbatch_rows,
        time=c.model.context_length,
    )  # fmt: skip
    pipeline.make_plan(c.model, mesh.shape, c.microbatch_rows)
    if known:
        run_config.claim_workdir(workdir, "pretrain", c)

    # --- data ---
    # of many hosts one tokenizes; the others open what it made, or, where data.cache isn't shared, make their own
    record = start_record(workdir, known)
    corpus = load_corpus(c.data, workdir, c.seed, record, known)
    examples = corpus.examples(c.model.context_length, c.seed, record["shuffle"])
    hosts.agree("The tokens", [corpus.fingerprint, corpus.tokenizer.fingerprint])
    for part in corpus.parts:
        lm.warn_if_few(part.validation, c.model.context_length)
    vocab = corpus.tokenizer.vocab_size
    if unset and not known:
        c = configs.build(PretrainConfig, _with_vocab(config, vocab))
    if vocab > c.model.vocab_size:
        raise InputError(
            f"The tokenizer has {vocab} tokens and the model {c.model.vocab_size}: raise --config.model.vocab_size "
            "or train a smaller tokenizer (--config.data.tokenizer=bpe:SIZE)."
        )
    prompts = sample_prompts(c.samples.prompts, corpus.tokenizer, c.model.context_length)  # refused now, not at the end
    resumes = run_config.has_checkpoints(workdir)
    if not (resumes and c.init_from and not paths.local(c.init_from).exists()):
        check_same_tokenizer(c.init_from, corpus.tokenizer)
    tokens = c.tokens if c.epochs is None or c.tokens is not None else c.epochs * corpus.train_tokens
    schedule = Schedule(
        c.schedule, batch_size=c.batch_size, context_length=c.model.context_length,
        learning_rate=c.optimizer.learning_rate, steps=c.steps, tokens=tokens,
    )  # fmt: skip
    rows = lambda step: -(-schedule.sequences(step) // c.microbatch_rows) * c.microbatch_rows
    here = hosts.batch_rows(batch_sharding(mesh, 0), c.microbatch_rows)
    batches = lm.LmBatches(
        examples, lambda step: (schedule.sequences_before(step), schedule.sequences(step)), rows,
        byte_lengths=corpus.byte_lengths, eot_id=corpus.tokenizer.eot_id,
        isolate_documents=c.data.isolate_documents, here=here,
    )  # fmt: skip

    # --- model, abstract state, shardings ---
    model = dataclasses.replace(c.model, attention=resolve(c.model.attention, mesh.devices.flat[0].platform))
    tx = make_optimizer(c.optimizer)
    boxed = gpt.abstract_params(model)
    abstract, shardings = state_shardings(boxed, tx, c.precision, mesh)
    loss = causal_lm_loss(model, c.precision.dtype, c.loss_chunk, mesh)
    step = train_step(loss, tx, c.optimizer.clip_norm, c.precision, c.seed, dropout=model.dropout > 0)
    evaluate = evaluator(loss, corpus, c, mesh, here)

    base = None
    if c.init_from and not resumes:
        with jax.set_mesh(mesh):
            base = load_weights(c.init_from, model, abstract.params, shardings.params, corpus.tokenizer)

    # --- everything that can be refused has been: the workdir is ours ---
    if not known:
        write_record(workdir, record, corpus)
    if not known or base:
        run_config.claim_workdir(workdir, "pretrain", c, **({"origin": origin(init_from=base)} if base else {}))
    hosts.only_first(lambda: corpus.tokenizer.save(workdir / "tokenizer"))

    # Whatever stops the run, the checkpoint being written and the last lines are kept.
    with jax.set_mesh(mesh), contextlib.ExitStack() as kept:
        # --- where the state comes from ---
        #   1. the newest good checkpoint of this run
        #   2. the weights of another workdir (init_from)
        #   3. random numbers
        checkpointer = kept.enter_context(contextlib.closing(Checkpointer(workdir, c.checkpoint)))
        state, seconds = checkpointer.resume(
            abstract, shardings, data=corpus.fingerprint, total=schedule.steps,
            changed=f"The tokens in {shards_directory(c.data.cache, workdir)} are not those this run was trained on: "
            "put them back, or start anew in another --workdir.",
        )  # fmt: skip
        if state is None:
            state = init_state(model, tx, c.precision, shardings, c.seed)
            if base:
                state = dataclasses.replace(state, params=base.params)
        del base
        start = int(state.step)
        writer = kept.enter_context(contextlib.closing(MetricWriter(workdir, c.log, start, configs.to_json(c))))

        # --- loop ---
        describe_run(c, model, corpus, schedule, mesh)
        if start == 0:
            write_samples(writer, 0, state.params, model, corpus.tokenizer, prompts, c, mesh)
        state, finished = loop.train(
            c, state, jit_train_step(step, shardings), batches, mesh=mesh, schedule=schedule, checkpointer=checkpointer,
            writer=writer, evaluate=evaluate, data=corpus.fingerprint, seconds_before=seconds,
            train_flops_per_token=flops_per_token(model).palm,
        )  # fmt: skip
        if finished:
            write_samples(writer, schedule.steps, state.params, model, corpus.tokenizer, prompts, c, mesh)
    if hosts.first():
        print(f"{time.perf_counter() - began:.0f} s in all; report: {report.write(workdir)}")
    return finished


def _with_vocab(config: mlc.ConfigDict, vocab_size: int) -> dict:
    section = config.to_dict()
    return {**section, "model": {**section["model"], "vocab_size": vocab_size}}


def describe_run(c: PretrainConfig, model: GPTConfig, corpus: Text, schedule: Schedule, mesh):
    if not hosts.first():
        return
    axes = " x ".join(f"{k} {v}" for k, v in mesh.shape.items() if v > 1) or "1 device"
    print(
        f"{parameter_count(model):,} parameters, {model.attention} attention, {c.precision.compute}, "
        f"{mesh.devices.flat[0].device_kind}, mesh {axes}{pipeline.describe(model, mesh.shape, c.microbatch_rows)}\n"
        f"{corpus.train_tokens:,} training tokens, vocabulary {corpus.tokenizer.vocab_size:,}; "
        f"{schedule.steps:,} steps of {c.batch_size} x {model.context_length} tokens = {schedule.total_tokens:,}"
    )


def evaluator(loss, corpus: Text, c: PretrainConfig, mesh, here):
    """params -> {'loss' in nats per token, 'bits_per_byte', 'tokens'} over the validation split; of a mixture the
    means under its weights, with 'loss/<name>' of each part."""
    batches = corpus.validation_batches(c.model.context_length, c.microbatch_rows, c.eval.batches or None, here=here)
    step = jit_eval_step(loss, mesh)
    sharding = batch_sharding(mesh, 0)

    def evaluate(params) -> dict:
        sums = {name: loop.evaluation_sums(step, params, part, sharding) for name, part in batches.items()}
        return corpus.figures(sums)

    return evaluate


def check_same_tokenizer(init_from, tokenizer):
    """Weights mean nothing under another vocabulary: InputError if the two runs' tokenizers differ."""
    if not init_from or has_no_tokenizer(init_from, run_config.read_config(init_from)):
        return  # imported with --tokenizer=none: whose ids they are is the user's to know
    if Tokenizer.load(epath.Path(init_from) / "tokenizer").fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"init_from: {init_from} was trained with another tokenizer; "
            f"give --config.data.tokenizer={init_from}/tokenizer."
        )


def load_weights(workdir, model: GPTConfig, abstract, shardings, tokenizer: Tokenizer) -> Model:
    """Another run's newest good checkpoint. Raises InputError if its model is another one."""
    there = run_config.read_config(workdir)["model"]
    for key in ("vocab_size", "n_layer", "n_head", "d_model", "context_length", "norm", "local_window", "tied_head"):
        if there[key] != getattr(model, key):
            raise InputError(f"init_from: {workdir} has model.{key}={there[key]}, this run {getattr(model, key)}.")
    checkpointer = Checkpointer(workdir)
    restored = checkpointer.restore_params(abstract, shardings)
    if restored is None:
        raise InputError(f"init_from: {workdir} has no checkpoint.")
    params, meta = restored
    weights = checkpointer.weights(meta["step"])
    return Model(model, params, tokenizer, float, meta["step"], None, weights=weights)


def sample_prompts(prompts, tokenizer, context_length: int) -> dict[str, list[int]]:
    """{prompt: its token ids} of samples.prompts.

    One that cannot be a prompt (characters that the tokenizer lacks, longer than the context) is skipped with a warning
    where it is the config file's own, which knows nothing of the data. Raises InputError where the command line or code
    gave it.
    """
    encoded = {}
    for prompt in prompts:
        ids, problem = [], None
        try:
            ids = tokenizer.encode(prompt)
        except InputError as error:
            problem = str(error)
        if problem is None and not 0 < len(ids) <= context_length:
            problem = f"it has {len(ids)} tokens and must have 1 to {context_length} (the context)"
        if problem is None:
            encoded[prompt] = ids
        elif command_line.overridden("samples.prompts"):
            raise InputError(f"samples.prompts {prompt!r}: {problem}. Change --config.samples.prompts.")
        else:
            hosts.say(
                f"warning: no sample of the config file's prompt {prompt!r} is written: {problem}. Give another with "
                "--config.samples.prompts."
            )
    return encoded


def write_samples(writer: MetricWriter, step, params, model, tokenizer, prompts, c: PretrainConfig, mesh):
    """Continues the prompts ({text: ids}), prints them and appends them to samples.jsonl."""
    if not prompts:
        return
    out = generate(
        params, model, list(prompts.values()), max_new_tokens=c.samples.max_new_tokens,
        sampling=Sampling(c.samples.temperature, top_p=c.samples.top_p), seed=c.seed, eot_id=tokenizer.eot_id,
        vocab=tokenizer.vocab_size, dtype=c.precision.dtype, mesh=mesh,
    )  # fmt: skip
    rows = [{"prompt": p, "text": tokenizer.decode(ids)} for p, ids in zip(prompts, out, strict=True)]
    writer.samples(step, rows)
    for row in rows:
        hosts.say(f"--- sample at step {step} ---\n{row['prompt']}{row['text']}\n")


if __name__ == "__main__":
    command_line.run_stage(pretrain)
