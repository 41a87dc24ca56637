"""Reward model from ranked completions (InstructGPT stage 2).

    python -m gptjax.reward --config=configs/instructgpt/reward.py --workdir=runs/reward --config.init_from=runs/sft \
        --config.data.source=comparisons.jsonl

Rows are {"prompt", "completions", "ranks"} with 2 to 9 completions (lower rank is better, equal is a tie), or
{"prompt", "chosen", "rejected"}. All pairs of a prompt are one element of the batch and each completion is forwarded
once. After training a bias makes demonstrations score 0 on average.
"""

import contextlib
import dataclasses
import time

import jax
import numpy as np
from etils import epath
from ml_collections import config_dict as mlc

from gptjax import command_line, json_files, lock, paths, report, run_config
from gptjax import config as configs
from gptjax.data.chat import Template, chat_tokenizer
from gptjax.data.comparisons import ComparisonBatches, ComparisonConfig, load_comparisons, validation_batches
from gptjax.data.demonstrations import DemonstrationConfig, load_demonstrations
from gptjax.data.records import start_record, write_record
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.evals.preference import agreement, calibration, length_explains, pairs
from gptjax.model import heads
from gptjax.model.spec import GPTConfig, ModelOptions
from gptjax.objectives.preference import best_of_k_loss, ranking_loss, ranking_statistics
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import MeshConfig, check_fits, make_mesh
from gptjax.parallel.sharding import batch_sharding
from gptjax.ranges import Count, Positive, Seed
from gptjax.rlhf.reward_model import RewardModel, normalized, score_at_end
from gptjax.trained import load_base, origin
from gptjax.training import loop
from gptjax.training.checkpoint import CheckpointConfig, Checkpointer, check_selection
from gptjax.training.metrics import LogConfig, MetricWriter
from gptjax.training.optimizer import OptimizerConfig, make_optimizer
from gptjax.training.precision import PrecisionConfig
from gptjax.training.schedule import Schedule, ScheduleConfig
from gptjax.training.state import new_state, state_shardings
from gptjax.training.step import jit_train_step, train_step
from gptjax.training.stopping import leave_if_asked


@dataclasses.dataclass(frozen=True)
class RewardConfig:
    """How long: the first given of steps and epochs (InstructGPT: one epoch; more overfits). batch_size: prompts of a
    step. objective: 'pairs' (Ouyang et al. eq. 1) or 'best' (Ziegler et al. eq. 1: which of K is best).
    normalize: after training, 'mean' = a bias so that demonstrations score 0 (InstructGPT C.2), 'mean_std' = a gain
    too, so that their standard deviation is 1 (Ziegler et al. 2019), 'none'. demonstrations: rows with prompt and
    response; None = those of the SFT run. template: None = the SFT run's, else 'chat'."""

    init_from: str | None = paths.field()
    model: ModelOptions = ModelOptions()
    data: ComparisonConfig = ComparisonConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6, weight_decay=0.0)
    schedule: ScheduleConfig = ScheduleConfig()
    precision: PrecisionConfig = PrecisionConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: loop.EvalConfig = loop.EvalConfig()
    log: LogConfig = LogConfig()
    objective: str = "pairs"
    normalize: str = "mean"
    demonstrations: str | None = paths.field(paths.SOURCE)
    template: str | None = None
    selection: str = "last"
    seed: Seed = 0
    steps: Count | None = None
    epochs: Positive | None = None
    batch_size: Count = 64
    microbatch_size: Count | None = None
    steps_per_dispatch: Count = 1

    def __post_init__(self):
        for name, known in (
            ("objective", ("pairs", "best")),
            ("normalize", ("mean", "mean_std", "none")),
            ("selection", ("last", "loss")),
        ):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}.")
        check_selection(self)
        if self.batch_size < 1 or self.steps_per_dispatch < 1 or self.batch_size % self.microbatch_rows:
            raise InputError(
                f"batch_size={self.batch_size} must be a positive multiple of microbatch_size={self.microbatch_size}."
            )

    @property
    def microbatch_rows(self) -> int:
        return self.microbatch_size or self.batch_size


@configs.with_sharding_rules
@lock.holds_workdir
def reward(config: mlc.ConfigDict, workdir: str) -> bool:
    """The whole stage. Returns whether the run is finished (False after a SIGTERM or Ctrl-C)."""
    began = time.perf_counter()
    workdir = epath.Path(workdir)

    # --- config ---
    c = configs.build(RewardConfig, config)
    if c.init_from is None:
        raise InputError("No model to start from: give --config.init_from=WORKDIR of an SFT run.")
    if c.data.source is None:
        raise InputError("No comparisons: give --config.data.source=PATH (JSONL, Parquet or hf:NAME).")
    mesh = make_mesh(c.mesh)
    gone = run_config.has_checkpoints(workdir) and not paths.local(c.init_from).exists()
    before = {"template": run_config.read_config(workdir)["template"]} if gone else run_config.read_config(c.init_from)
    of_sft = before["data"] if before.get("stage") == "sft" else {}
    if gone and c.normalize != "none" and c.demonstrations is None:
        raise InputError(f"{c.init_from} is not there any more, and it tells which demonstrations are to score 0 on "
                         "average: put it back.")  # fmt: skip
    kind = c.template or (before if gone else of_sft).get("template", "chat")
    if of_sft and kind != of_sft["template"]:
        raise InputError(f"template={kind!r}, but {c.init_from} was tuned with {of_sft['template']!r}: leave it out.")

    # --- the trunk it starts from ---
    base = load_base(c.init_from, workdir, mesh=mesh)
    tokenizer = chat_tokenizer(base.tokenizer)
    options = c.model if c.model.dropout is not None else dataclasses.replace(c.model, dropout=0.0)
    model = options.apply(base.config, vocab_size=max(base.config.vocab_size, tokenizer.vocab_size))
    length = c.data.max_length or model.context_length
    pipeline.make_plan(model, mesh.shape, c.microbatch_rows)

    # --- data ---
    template = Template(tokenizer, kind)
    comparisons = load_comparisons(c.data, template, model.context_length, c.seed)
    examples = None if c.normalize == "none" else reference_texts(c, of_sft, template, model.context_length)
    here = hosts.batch_rows(batch_sharding(mesh, 0), c.microbatch_rows)
    longest = max(len(x.prompt) + max(map(len, x.completions)) for x in comparisons.train + comparisons.validation)
    padded = lambda step_of: min(length, -(-longest // step_of) * step_of)
    counted = padded(8)  # a completion's tokens as the schedule counts them, whatever the mesh pads them to
    length = padded(8 * mesh.shape["seq"])
    check_fits(mesh.shape, n_head=model.n_head, batch_size=c.batch_size, microbatch_size=c.microbatch_rows, time=length)
    known = hosts.from_first((workdir / "config.json").exists)
    record = start_record(workdir, known, c.init_from)
    batches = ComparisonBatches(
        comparisons.train, c.batch_size, comparisons.k, length, c.seed, pad_id=template.pad_id, here=here,
        shuffle=record["shuffle"],
    )  # fmt: skip
    if c.steps is None and c.epochs is None:
        raise InputError("Say how long to train: --config.epochs=1 (more overfits) or --config.steps.")
    schedule = Schedule(
        c.schedule, batch_size=c.batch_size, context_length=counted * comparisons.k,
        learning_rate=c.optimizer.learning_rate, steps=c.steps if c.steps is not None else batches.steps(c.epochs),
    )  # fmt: skip
    hosts.agree("The comparisons", comparisons.fingerprint)
    if not known:
        write_record(workdir, record)
    about = origin(init_from=base)
    run_config.claim_workdir(workdir, "reward", dataclasses.replace(c, template=kind), model=model, origin=about)
    hosts.only_first(lambda: comparisons.left_out.write(workdir))
    hosts.only_first(lambda: tokenizer.save(workdir / "tokenizer"))

    # --- abstract state, shardings, step ---
    tx = make_optimizer(c.optimizer)
    abstract, shardings = state_shardings(heads.abstract_scalar_model(model), tx, c.precision, mesh)
    loss = reward_loss(model, c.precision.dtype, c.objective, mesh)
    step = train_step(loss, tx, c.optimizer.clip_norm, c.precision, c.seed, dropout=model.dropout > 0)
    held_out = validation_batches(
        comparisons.validation, c.microbatch_rows, comparisons.k, length, pad_id=template.pad_id, here=here
    )
    judge = judge_of(model, c.precision.dtype, mesh)
    evaluate = evaluator(c, judge, held_out, mesh)

    # Whatever stops the run, the checkpoint being written and the last lines are kept.
    with jax.set_mesh(mesh), contextlib.ExitStack() as kept:
        # --- where the state comes from: the newest good checkpoint of this run, else init_from's trunk ---
        checkpointer = kept.enter_context(contextlib.closing(Checkpointer(workdir, c.checkpoint)))
        state, seconds = checkpointer.resume(
            abstract, shardings, data=comparisons.fingerprint, total=schedule.steps,
            changed=f"{c.data.source} has changed since the run began: put it back or take another --workdir.",
        )  # fmt: skip
        if state is None:

            def make(params, key):
                params = heads.scalar_model(heads.grow_vocabulary(params, model.vocab_size), model, key)
                return new_state(params, tx, c.precision)

            state = jax.jit(make, out_shardings=shardings)(base.params, jax.random.key(c.seed))
        del base
        start = int(state.step)
        writer = kept.enter_context(contextlib.closing(MetricWriter(workdir, c.log, start, configs.to_json(c))))

        # --- loop ---
        describe_run(c, model, comparisons, length, schedule, mesh)
        if start < schedule.steps and hosts.first():
            (workdir / "reward.json").unlink(missing_ok=True)  # of a shorter run: it tells of other weights
        state, finished = loop.train(
            c, state, jit_train_step(step, shardings), batches, mesh=mesh, schedule=schedule, checkpointer=checkpointer,
            writer=writer, evaluate=evaluate, data=comparisons.fingerprint, seconds_before=seconds,
            figures=figures, unit="prompts",
        )  # fmt: skip

        # --- the zero of its scale, and how far it can be trusted ---
        if finished:
            step, params = schedule.steps, state.params
            if c.selection == "loss" and checkpointer.best in checkpointer.steps():
                step = checkpointer.best
                params, _ = checkpointer.restore_params(abstract.params, shardings.params, step)
            result = {"step": step, **agreement_with(judge, params, held_out, comparisons.validation)}
            fitted = {"gain": 1.0, "bias": 0.0}
            if examples is not None:
                fitted = fit_scale(c, model, params, examples, tokenizer, mesh)
            if hosts.first():
                json_files.write_json(workdir / "reward.json", {**fitted, **result})
                say(result, fitted, c)
    if hosts.first():
        print(f"{time.perf_counter() - began:.0f} s in all; report: {report.write(workdir)}")
    return finished


def reward_loss(model: GPTConfig, dtype, objective: str, mesh=None):
    """Sum over prompts of their ranking loss. Microbatch: tokens [rows, K, time], lengths, ranks, valid [rows, K]."""
    criterion = ranking_loss if objective == "pairs" else best_of_k_loss

    def loss(params, batch, dropout_keys):
        rows, k, time = batch["tokens"].shape
        if dropout_keys is not None:  # each completion's own
            dropout_keys = jax.vmap(lambda key: jax.random.split(key, k))(dropout_keys).reshape(rows * k)
        flat = batch["tokens"].reshape(rows * k, time), batch["lengths"].reshape(rows * k)
        scores = score_at_end(params, *flat, model, dtype, mesh, dropout_keys).reshape(rows, k)
        total, count = criterion(scores, batch["ranks"], batch["valid"])
        return total, count, ranking_statistics(scores, batch["ranks"], batch["valid"])

    return loss


def figures(sums: dict) -> dict:
    """A step's further sums as what metrics.jsonl has."""
    n = max(sums["pairs"], 1)
    return {"accuracy": sums["correct"] / n, "margin": sums["margin"] / n, "pairs": int(sums["pairs"])}


def judge_of(model: GPTConfig, dtype, mesh):
    """judge(params, batches) -> scores, ranks, valid, lengths of all completions, each [prompts, K]."""

    def score(params, b):
        rows, k, time = b["tokens"].shape
        flat = b["tokens"].reshape(rows * k, time), b["lengths"].reshape(rows * k)
        return score_at_end(params, *flat, model, dtype, mesh).reshape(rows, k), b["ranks"], b["valid"], b["lengths"]

    score = jax.jit(score, out_shardings=hosts.replicated(mesh))  # each host has some of the rows and needs all scores

    def judge(params, batches):
        sharding, parts = batch_sharding(mesh, 0), []
        for i in range(len(batches)):
            leave_if_asked()
            batch = {k: hosts.global_array(a, sharding) for k, a in batches[i].items() if k != "weights"}
            parts.append(jax.device_get(score(params, batch)))
        return tuple(np.concatenate(p) for p in zip(*parts, strict=True))

    return judge


def evaluator(c: RewardConfig, judge, batches, mesh):
    """params -> {'loss', 'accuracy', 'margin', 'pairs'} over the validation comparisons."""
    most = min(c.eval.batches or len(batches), len(batches))
    some = [batches[i * len(batches) // most] for i in range(most)]
    criterion = ranking_loss if c.objective == "pairs" else best_of_k_loss

    def evaluate(params) -> dict:
        scores, ranks, valid, _ = judge(params, some)
        total, count = criterion(scores, ranks, valid)
        found = figures({k: float(v) for k, v in ranking_statistics(scores, ranks, valid).items()})
        return {"loss": float(total) / max(float(count), 1), **found}

    return evaluate


def agreement_with(judge, params, batches, comparisons) -> dict:
    """comparisons: what the batches hold, in their order."""
    scores, *rest = judge(params, batches)
    characters = np.zeros(scores.shape)
    for row, comparison in zip(characters, comparisons, strict=False):  # rows of padding follow
        row[: len(comparison.characters)] = comparison.characters
    p = pairs(scores, *rest, characters)
    return {**agreement(p), "calibration": calibration(p)}


def reference_texts(c: RewardConfig, of_sft: dict, template: Template, context_length: int):
    """(prompts, responses) as ids: what is to score 0 on average, at most 1,000 of them, spread over the source."""
    if not of_sft and c.demonstrations is None:
        raise InputError(
            f"{c.init_from} is no SFT run, so there are no demonstrations to set the zero of the reward by: give "
            "--config.demonstrations=PATH, or --config.normalize=none."
        )
    data = {**of_sft, "max_length": None, "drop_long": True}
    if c.demonstrations is not None:
        data = {"source": c.demonstrations, "template": template.kind, "drop_long": True}
    source = configs.build(DemonstrationConfig, data, "demonstrations")
    demonstrations = load_demonstrations(source, template, context_length, c.seed, flags=None)
    chosen, left_out = demonstrations.train, demonstrations.left_out
    if left_out and c.demonstrations is not None:  # of those of the SFT run that run has told
        hosts.say(f"demonstrations left out: {left_out}; {left_out.first()}")
    chosen = [chosen[i * len(chosen) // min(len(chosen), 1000)] for i in range(min(len(chosen), 1000))]
    return [d.ids[: d.prompt] for d in chosen], [d.ids[d.prompt :] for d in chosen]


def fit_scale(c: RewardConfig, model, params, examples, tokenizer, mesh) -> dict:
    """gain and bias under which the examples have mean 0 (and standard deviation 1)."""
    raw = RewardModel(dataclasses.replace(model, dropout=0.0), params, tokenizer, c.template, c.precision.dtype, mesh)
    scores = raw.score(*examples)
    gain = 1.0 / max(float(scores.std()), 1e-8) if c.normalize == "mean_std" else 1.0
    bias = -gain * float(scores.mean())
    after = dataclasses.replace(raw, params={**params, "head": normalized(params["head"], gain, bias)}).score(*examples)
    return {
        "gain": gain, "bias": bias, "demonstrations": len(scores),
        "mean_before": float(scores.mean()), "std_before": float(scores.std()), "mean_after": float(after.mean()),
    }  # fmt: skip


def say(result: dict, fitted: dict, c: RewardConfig):
    n = fitted.get("demonstrations")
    zero = f"; zeroed on {n:,} demonstrations (mean was {fitted['mean_before']:.3f})" if n else ""
    by_length = result["length_baseline"]
    print(
        f"validation: accuracy {result['accuracy']:.4f} on {result['pairs']:,} pairs; by length alone "
        f"{by_length['accuracy']:.4f} ({by_length['rule']} wins){zero}"
    )
    if length_explains(result):
        print(
            f"warning: length alone agrees with {by_length['accuracy']:.3f} of the pairs: this reward model may have "
            "learned length. See accuracy_same_length in reward.json."
        )


def describe_run(c: RewardConfig, model: GPTConfig, comparisons, length: int, schedule: Schedule, mesh):
    if not hosts.first():
        return
    n_pairs, same = np.sum([x.pairs() for x in comparisons.train], axis=0)
    print(
        f"{len(comparisons.train):,} comparisons of up to {comparisons.k} completions, {n_pairs:,} pairs"
        f"{comparisons.left_out.describe()}; "
        f"{len(comparisons.validation):,} held out; {schedule.steps} steps of {c.batch_size} prompts of {length} tokens"
        f"{pipeline.describe(model, mesh.shape, c.microbatch_rows * comparisons.k)}"
    )
    if same:
        print(
            f"warning: in {same:,} of the {n_pairs:,} pairs the better and the worse completion are the same text, "
            "which teaches nothing: look at how the rows were made"
        )


if __name__ == "__main__":
    command_line.run_stage(reward)
