"""Reward model from ranked completions (InstructGPT stage 2).

    python -m gptjax.reward --config=configs/instructgpt/reward.py --workdir=runs/reward --config.init_from=runs/sft \
        --config.data.source=comparisons.jsonl

Rows are {"prompt", "completions", "ranks"} with 2 to 9 completions (lower rank is better, equal is a tie), or
{"prompt", "chosen", "rejected"}. All pairs of a prompt are one element of the batch and each completion is forwarded
once. After training a bias makes demonstrations score 0 on average.
"""

import dataclasses

import jax
import numpy as np
from ml_collections import config_dict as mlc

from gptjax import command_line, json_files, paths
from gptjax.data.chat import Template, chat_tokenizer
from gptjax.data.comparisons import ComparisonConfig, batches_of, load_comparisons, padded_length
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.evals.base import spread
from gptjax.evals.preference import agreement_with, length_explains, ranking, ranking_metrics, scorer
from gptjax.model import heads
from gptjax.model.architecture import require_gpt
from gptjax.model.spec import GPTConfig, ModelOptions
from gptjax.objectives.base import Objective
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import check_fits
from gptjax.ranges import Count
from gptjax.rlhf.normalization import fit_scale, reference_texts, texts_of_base
from gptjax.rlhf.reward_model import CRITERIA, RewardModel, reward_loss, score_at_end
from gptjax.run import Claim, require, run
from gptjax.trained import load_base, origin
from gptjax.training.checkpoint import check_selection
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.schedule import Schedule
from gptjax.training.stage import Evaluator, RunResult, Stage, TrainConfig
from gptjax.training.state import new_state
from gptjax.training.step import TrainProgram, train_program
from gptjax.training.supervised import make_schedule, supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig(TrainConfig):
    """Reward model. How long: the first given of steps and epochs (InstructGPT: one epoch; more overfits).

    batch_size: prompts of a step over all devices.
    init_from: the workdir to start from, of an SFT run.
    objective: 'pairs' (Ouyang et al. eq. 1) or 'best' (Ziegler et al. eq. 1: which of K is best).
    normalize: after training, 'mean' = a bias so that demonstrations score 0 (InstructGPT C.2), 'mean_std' = a gain
        too, so that their standard deviation is 1 (Ziegler et al. 2019), 'none'.
    demonstrations: rows with prompt and response to normalize on; None = those of the SFT run.
    template: 'chat' or 'plain'; None = the SFT run's, else 'chat'.
    selection: the checkpoint that later stages use: 'last', or 'loss' (lowest on validation).
    """

    init_from: str | None = paths.field()
    model: ModelOptions = ModelOptions()
    data: ComparisonConfig = ComparisonConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6, weight_decay=0.0)
    objective: str = "pairs"
    normalize: str = "mean"
    demonstrations: str | None = paths.field(paths.SOURCE)
    template: str | None = None
    selection: str = "last"
    batch_size: Count = 64

    def __post_init__(self):
        super().__post_init__()
        for name, known in (("objective", tuple(CRITERIA)), ("normalize", ("mean", "mean_std", "none"))):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(known)}.")
        check_selection(self, ("last", "loss"))


def reward(config: mlc.ConfigDict, workdir) -> RunResult:
    """Runs the stage (run.run)."""
    return run("reward", RewardConfig, build, config, workdir, kind="scalar")


def program(c: RewardConfig, model: GPTConfig, mesh) -> TrainProgram:
    """What runs on the devices, from shapes alone."""
    loss = reward_loss(model, c.precision.dtype, c.objective, mesh)
    objective = Objective(loss, metrics=ranking_metrics, unit="prompts")
    return train_program(objective, heads.abstract_scalar_model, model, c.optimizer, c.precision, mesh)


def trunk(c: RewardConfig, base: GPTConfig, **changes) -> GPTConfig:
    """The config of the model under the scalar head. base: of the SFT model; changes: further keys."""
    return c.model.no_dropout_by_default().apply(base, **changes)


def build(c: RewardConfig, mesh, claim: Claim) -> Stage:
    """The Stage of this run: base model, comparisons, device program; afterwards the scale of the scores."""
    require(c, {
        "init_from": "No model to start from: give --config.init_from=WORKDIR of an SFT run.",
        "data.source": "No comparisons: give --config.data.source=PATH (JSONL, Parquet or hf:NAME).",
        "steps,epochs": "Say how long to train: --config.epochs=1 (more overfits) or --config.steps.",
    })  # fmt: skip
    kind, of_sft = texts_of_base(c, claim.workdir, claim.resuming)

    # --- the base model ---
    base = load_base(c.init_from, claim.workdir, mesh=mesh)
    require_gpt(base.config, "a reward model")
    tokenizer = chat_tokenizer(base.tokenizer)
    model = trunk(c, base.config, vocab_size=max(base.config.vocab_size, tokenizer.vocab_size))
    pipeline.make_plan(model, mesh.shape, c.microbatch_rows)

    # --- data ---
    template = Template(tokenizer, kind)
    comparisons = load_comparisons(c.data, template, model.context_length, c.seed)
    examples = None if c.normalize == "none" else reference_texts(c, of_sft, template, model.context_length)
    counted, length = padded_length(comparisons, c.data.max_length or model.context_length, mesh.shape["seq"])
    check_fits(mesh.shape, n_head=model.n_head, time=length, **c.rows)
    record = claim.begin(c.init_from)
    batches, held_out = batches_of(c, comparisons, length, template.pad_id, mesh, record["shuffle"])
    schedule = make_schedule(c, counted * comparisons.k, batches)
    hosts.agree("The comparisons", comparisons.fingerprint)
    claim.make(dataclasses.replace(c, template=kind), tokenizer, model=model, origin=origin(init_from=base))
    hosts.only_first(lambda: comparisons.left_out.write(claim.workdir))

    # --- model ---
    train = program(c, model, mesh)
    scores = scorer(lambda params, *texts: score_at_end(params, *texts, model, c.precision.dtype, mesh), mesh)

    def init():
        def make(params, key):
            params = heads.scalar_model(heads.grow_vocabulary(params, model.vocab_size), model, key)
            return new_state(params, train.tx, c.precision)

        return jax.jit(make, out_shardings=train.shardings)(base.params, jax.random.key(c.seed))

    def begin(state):
        describe(c, model, comparisons, length, schedule, mesh)
        if int(state.step) < schedule.steps and hosts.first():
            (claim.workdir / "reward.json").unlink(missing_ok=True)  # of a shorter run, so of other weights

    def finish(state, checkpointer):
        """Writes reward.json: gain and bias of the scores; accuracy and calibration on validation."""
        step, params = schedule.steps, state.params
        if c.selection == "loss" and checkpointer.best in checkpointer.steps():
            step = checkpointer.best
            params, _ = checkpointer.restore_params(train.abstract.params, train.shardings.params, step)
        result = {"step": step, **agreement_with(scores, params, held_out, comparisons.validation)}
        fitted = {"gain": 1.0, "bias": 0.0}
        if examples is not None:
            raw = RewardModel(model, params, tokenizer, kind, c.precision.dtype, mesh)
            fitted = fit_scale(raw, examples, c.normalize == "mean_std")
        if hosts.first():
            json_files.write_json(claim.workdir / "reward.json", {**fitted, **result})
            say(result, fitted)

    validation = ranking(scores, CRITERIA[c.objective], spread(held_out, c.eval.batches))
    return supervised(
        c, train, batches, schedule, mesh, workdir=claim.workdir, init=init, data=comparisons.fingerprint,
        changed=f"{c.data.source} has changed since the run began: restore it, or give another --workdir.",
        evaluators=(Evaluator(validation, c.eval.every),), begin=begin, finish=finish,
    )  # fmt: skip


def say(result: dict, fitted: dict):
    """Prints accuracy and baseline, with a warning if length explains the rankings."""
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


def describe(c: RewardConfig, model: GPTConfig, comparisons, length: int, schedule: Schedule, mesh):
    """Prints the data and the length of the run."""
    if not hosts.first():
        return
    n_pairs, same = np.sum([x.pairs() for x in comparisons.train], axis=0)
    print(
        f"{comparisons}; {n_pairs:,} pairs; {schedule.steps} steps of {c.batch_size} prompts of {length} tokens"
        f"{pipeline.describe(model, mesh.shape, c.microbatch_rows * comparisons.k)}"
    )
    if same:
        print(
            f"warning: in {same:,} of the {n_pairs:,} pairs the better and the worse completion are the same text, "
            "which teaches nothing: look at how the rows were made"
        )


if __name__ == "__main__":
    command_line.run_stage(reward, RewardConfig)
