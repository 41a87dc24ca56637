"""Direct preference optimization of an SFT model on ranked completions (Rafailov et al. 2023).

    python -m gptjax.dpo --config=configs/dpo.py --workdir=runs/dpo --config.init_from=runs/sft \
        --config.data.source=comparisons.jsonl

Rows as for gptjax.reward. init_from is the initial policy and the reference, whose log-probabilities are computed once.
The same command resumes an interrupted run, bitwise identical.
"""

import dataclasses

import jax
from ml_collections import config_dict as mlc

from gptjax import command_line, paths
from gptjax.data.chat import Template
from gptjax.data.comparisons import ComparisonConfig, batches_of, load_comparisons, padded_length
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.evals.preference import ranking_metrics, ranking_sums
from gptjax.model import architecture
from gptjax.model.spec import GPTConfig, ModelOptions
from gptjax.objectives.base import Objective
from gptjax.objectives.dpo import dpo_objective
from gptjax.ranges import Count, Positive
from gptjax.rlhf.reference import ReferenceLogProbs
from gptjax.run import Claim, require, run
from gptjax.trained import load_base, origin
from gptjax.training.checkpoint import check_selection
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.stage import Evaluator, RunResult, Stage, TrainConfig
from gptjax.training.state import new_state
from gptjax.training.step import TrainProgram, train_program
from gptjax.training.supervised import make_schedule, supervised


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig(TrainConfig):
    """Direct preference optimization. How long: the first given of steps and epochs.

    batch_size: prompts of a step over all devices.
    init_from: the workdir of the SFT run whose model is the initial policy and the reference.
    beta: coefficient of the implicit KL penalty; higher keeps the policy closer to the reference.
    selection: the checkpoint that later stages use: 'last', or 'loss' (lowest on validation).
    loss_chunk: time steps whose logits are held at once.
    """

    init_from: str | None = paths.field()
    model: ModelOptions = ModelOptions()
    data: ComparisonConfig = ComparisonConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, weight_decay=0.0)
    beta: Positive = 0.1
    selection: str = "last"
    batch_size: Count = 64
    loss_chunk: Count = 128

    def __post_init__(self):
        super().__post_init__()
        check_selection(self, ("last", "loss"))


def dpo(config: mlc.ConfigDict, workdir) -> RunResult:
    """Runs the stage (run.run)."""
    return run("dpo", DPOConfig, build, config, workdir)


def program(c: DPOConfig, model: GPTConfig, mesh) -> TrainProgram:
    """What runs on the devices, from shapes alone."""
    loss = dpo_objective(model, c.beta, c.precision.dtype, c.loss_chunk, mesh)
    objective = Objective(loss, metrics=ranking_metrics, unit="prompts")
    return train_program(objective, architecture.abstract_params, model, c.optimizer, c.precision, mesh)


def build(c: DPOConfig, mesh, claim: Claim) -> Stage:
    """The Stage of this run: base model, data, reference log-probabilities, device program."""
    require(c, {
        "init_from": "No model to start from: give --config.init_from=WORKDIR of an SFT run.",
        "data.source": "No comparisons: give --config.data.source=PATH (JSONL, Parquet or hf:NAME).",
        "steps,epochs": "Say how long to train: --config.epochs or --config.steps.",
    })  # fmt: skip
    base = load_base(c.init_from, claim.workdir, mesh=mesh)
    if base.template is None:
        raise InputError(f"{c.init_from} answers no prompts: give the workdir of an SFT run as init_from.")
    model = c.model.no_dropout_by_default().apply(base.config)

    # --- data, and the reference's log-probabilities of its completions ---
    template = Template(base.tokenizer, base.template)
    comparisons = load_comparisons(c.data, template, model.context_length, c.seed)
    counted, length = padded_length(comparisons, c.data.max_length or model.context_length, mesh.shape["seq"])
    architecture.check_fits(model, mesh.shape, time=length, **c.rows)
    hosts.agree("The comparisons", comparisons.fingerprint)
    sections = {"model": model, "template": template.kind, "origin": origin(init_from=base)}
    claim.check(c, **sections)
    record = claim.begin(c.init_from)
    reference = ReferenceLogProbs(base, comparisons, length, c, mesh, claim.workdir)
    batches, held_out = batches_of(
        c, comparisons, length, template.pad_id, mesh, record["shuffle"], (reference.train, reference.validation)
    )
    schedule = make_schedule(c, counted * comparisons.k, batches)
    claim.make(c, base.tokenizer, **sections)
    reference.save()
    hosts.only_first(lambda: comparisons.left_out.write(claim.workdir))

    # --- model ---
    train = program(c, model, mesh)
    init = lambda: jax.jit(lambda p: new_state(p, train.tx, c.precision), out_shardings=train.shardings)(base.params)
    return supervised(
        c, train, batches, schedule, mesh, workdir=claim.workdir, init=init, data=comparisons.fingerprint,
        changed=f"{c.data.source} has changed since the run began: restore it, or give another --workdir.",
        evaluators=(Evaluator(ranking_sums(train.objective.loss, held_out, mesh, c.eval.batches), c.eval.every),),
        begin=lambda _: hosts.say(f"{comparisons}; {schedule.steps:,} steps of {c.batch_size} prompts"),
    )  # fmt: skip


if __name__ == "__main__":
    command_line.run_stage(dpo, DPOConfig)
