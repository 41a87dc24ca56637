"""Fine-tuning on a labeled task, as GPT-1 (Radford et al. 2018 §3.2-3.3).

    python -m gptjax.finetune --config=configs/gpt1_finetune.py:sst2 --workdir=runs/sst2 --config.init_from=runs/gpt1 \
        --config.data.train=train.csv --config.data.valid=dev.csv [--seeds=0,1,2]

A linear head reads the hidden state at a new `extract` token. Tasks: classification, entailment, similarity, choice
(data/transforms.py). Ablations of the paper's Table 5 and Figure 2: --config.lm_weight=0 (no auxiliary loss),
--config.transfer=-1 (no pre-training), --config.transfer=K (the first K layers).

Writes results.json (metrics of validation and test) and predictions.jsonl. --seeds: a run in WORKDIR/seedN for each,
and the mean of their metrics with its standard error in WORKDIR/results.json.
"""

import dataclasses

import jax
from absl import flags
from ml_collections import config_dict as mlc

from gptjax import command_line, json_files, paths
from gptjax.data.labeled import LabeledBatches, LabeledConfig, in_order, load_labeled, padded_length
from gptjax.data.transforms import NEW_TOKENS, Marks
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.evals.base import spread
from gptjax.evals.classification import figures, labeled_metrics, logits_of, predictions, predictor
from gptjax.model import architecture, heads
from gptjax.model.architecture import ModelConfig
from gptjax.model.spec import ModelOptions
from gptjax.objectives.base import Objective
from gptjax.objectives.finetune import finetune_loss
from gptjax.parallel.sharding import batch_sharding, shared
from gptjax.ranges import BelowOne, Count, Layers
from gptjax.run import Claim, require, run
from gptjax.seeds import each_seed
from gptjax.trained import load_base, origin
from gptjax.training.checkpoint import check_selection
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.stage import Evaluator, RunResult, Stage, TrainConfig
from gptjax.training.state import new_state
from gptjax.training.step import TrainProgram, train_program
from gptjax.training.supervised import make_schedule, supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Fine-tuning on a labeled task. How long: the first given of steps and epochs (GPT-1: 3 epochs).

    batch_size: examples of a step over all devices.
    init_from: the pre-trained workdir to start from.
    transfer: the first K layers are transferred with the embeddings, the others are random; None = all, -1 = nothing.
    lm_weight: lambda of the auxiliary language-model loss, 0 = none (GPT-1 eq. 5: .5).
    head_dropout: dropout of the classifier's input.
    selection: the checkpoint that later stages and the predictions use: 'last' or 'loss' (lowest on validation).
    loss_chunk: time steps whose logits are held at once.
    """

    init_from: str | None = paths.field()
    model: ModelOptions = ModelOptions()
    data: LabeledConfig = LabeledConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=6.25e-5, b2=0.999, weight_decay=0.01)
    transfer: Layers | None = None
    lm_weight: float = 0.5
    head_dropout: BelowOne = 0.1
    selection: str = "last"
    loss_chunk: Count = 128

    def __post_init__(self):
        super().__post_init__()
        check_selection(self, ("last", "loss"))


def finetune(config: mlc.ConfigDict, workdir) -> RunResult:
    """Runs the stage (run.run)."""
    return run("finetune", FinetuneConfig, build, config, workdir, kind="classifier")


def program(c: FinetuneConfig, model: ModelConfig, outputs: int, mesh) -> TrainProgram:
    """What runs on the devices, from shapes alone. outputs: of the head; 1 for a choice."""
    loss = finetune_loss(model, c.data.task, c.lm_weight, c.head_dropout, c.precision.dtype, c.loss_chunk, mesh)
    objective = Objective(loss, metrics=task_metrics, unit="examples", dropout=c.head_dropout > 0)
    return train_program(objective, abstract_classifier(outputs), model, c.optimizer, c.precision, mesh)


@shared
def abstract_classifier(outputs: int):
    return lambda model: heads.abstract_classifier(model, outputs)


@shared
def initializer(train: TrainProgram, model: ModelConfig, vocab: int, outputs: int, transfer: int | None, precision):
    """Returns (params of the base model, key) -> TrainState: what is transferred of a model of `vocab` tokens, and the
    rest drawn."""

    def make(params, key):
        trunk_key, head_key = jax.random.split(key)
        fresh = architecture.init(dataclasses.replace(model, vocab_size=vocab), trunk_key)
        params = heads.transferred(params, fresh, model, transfer)
        return new_state(heads.classifier(params, model, outputs, head_key), train.tx, precision)

    return jax.jit(make, out_shardings=train.shardings)


def task_metrics(sums: dict) -> dict:
    """Metrics of a step from the extra sums of finetune_loss, means over the examples."""
    n = max(sums["examples"], 1)
    return {"accuracy": sums["correct"] / n, "task_loss": sums["task_loss"] / n, "lm_loss": sums["lm_loss"] / n}


def build(c: FinetuneConfig, mesh, claim: Claim) -> Stage:
    """The Stage of this run: base model, data, head, device program."""
    require(c, {
        "init_from": "No model to start from: give --config.init_from=WORKDIR of a pre-training run.",
        "data.train": "No labeled data: give --config.data.train=PATH (CSV, TSV, JSONL, Parquet or hf:NAME).",
        "steps,epochs": "Say how long to train: --config.epochs=3 (as GPT-1) or --config.steps.",
    })  # fmt: skip
    base = load_base(c.init_from, claim.workdir, mesh=mesh)
    # Of a resumed run whose base is gone, base.config is the run's own, which has the new tokens already.
    vocab = base.config.vocab_size - (NEW_TOKENS if base.params is None else 0)
    model = c.model.apply(base.config, vocab_size=vocab + NEW_TOKENS)
    if c.transfer is not None and not -1 <= c.transfer <= model.n_layer:
        raise InputError(f"transfer={c.transfer}: give -1 (nothing) to {model.n_layer}, the number of layers.")

    # --- data ---
    labeled = load_labeled(c.data, base.tokenizer, Marks.after(vocab), model.context_length, c.seed)
    outputs = 1 if c.data.task == "choice" else len(labeled.labels)
    counted, length = padded_length(labeled, c.data.max_length or model.context_length, mesh.shape["seq"])
    architecture.check_fits(model, mesh.shape, time=length, **c.rows)
    hosts.agree("The labeled examples", labeled.fingerprint)
    sections = {"model": model, "labels": list(labeled.labels), "origin": origin(init_from=base)}
    claim.check(c, **sections)
    record = claim.begin(c.init_from)
    options = {"pad_id": vocab, "here": hosts.batch_rows(batch_sharding(mesh, 0), c.microbatch_rows)}
    batches = LabeledBatches(
        labeled.train, c.batch_size, labeled.most, length, c.seed, shuffle=record["shuffle"], **options
    )
    batches_of = lambda examples: in_order(examples, c.microbatch_rows, labeled.most, length, **options)
    schedule = make_schedule(c, counted * labeled.most, batches)
    claim.make(c, base.tokenizer, **sections)
    hosts.only_first(lambda: labeled.left_out.write(claim.workdir))

    # --- model ---
    train = program(c, model, outputs, mesh)
    predict = predictor(logits_of(model, c.data.task, c.precision.dtype, mesh), mesh)

    def init():
        return initializer(train, model, vocab, outputs, c.transfer, c.precision)(base.params, jax.random.key(c.seed))

    def finish(state, checkpointer):
        step, params = schedule.steps, state.params
        if c.selection == "loss" and checkpointer.best in checkpointer.steps():
            step = checkpointer.best
            params, _ = checkpointer.restore_params(train.abstract.params, train.shardings.params, step)
        results, rows = {"step": step, "labels": labeled.labels}, []
        for name, examples in (("validation", labeled.validation), ("test", labeled.test)):
            logits = predict(params, batches_of(examples)) if examples else None
            if examples and all(e.target.any() for e in examples):
                results[name] = figures(logits, examples, c.data.score_range)
            if examples:
                rows += predictions(name, logits, examples, labeled.labels, c.data.score_range)
        if hosts.first():
            json_files.write_json(claim.workdir / "results.json", results)
            json_files.write_json_lines(claim.workdir / "predictions.jsonl", rows)
            say(results)

    some = spread(labeled.validation, c.eval.batches * c.microbatch_rows)
    validation = labeled_metrics(predict, batches_of(some), some, c.data.score_range)
    return supervised(
        c, train, batches, schedule, mesh, workdir=claim.workdir, init=init, data=labeled.fingerprint,
        changed=f"{c.data.train} has changed since the run began: restore it, or give another --workdir.",
        evaluators=(Evaluator(validation, c.eval.every),), finish=finish,
        begin=lambda _: hosts.say(f"{labeled}; {schedule.steps:,} steps of {c.batch_size} examples"),
    )  # fmt: skip


def say(results: dict):
    """Prints the metrics of each split."""
    for split in ("validation", "test"):
        if split in results:
            shown = (f"{k.replace('_', ' ')} {v:.4f}" for k, v in results[split].items() if isinstance(v, float))
            print(f"{split} at step {results['step']}: {', '.join(shown)}")


def main(config, workdir):
    if flags.FLAGS.seeds is None:
        return finetune(config, workdir)
    return each_seed(finetune, config, workdir, flags.FLAGS.seeds)


if __name__ == "__main__":
    command_line.define_seeds(None, "a run in WORKDIR/seedN for each, and the mean over them.")
    command_line.run_stage(main, FinetuneConfig)
