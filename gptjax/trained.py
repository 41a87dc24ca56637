"""A finished or running workdir as a model to use: what sample, evaluate, convert and later stages open."""

import dataclasses

import flax.linen as nn
import jax

from gptjax import config as configs
from gptjax import paths, run_config
from gptjax.data.tokenizer import Tokenizer
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.generation.decode import Decoder
from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.parallel.mesh import MeshConfig, make_mesh, slice_count
from gptjax.parallel.sharding import parameter_shardings
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.metrics import JsonLines
from gptjax.training.precision import DTYPES
from gptjax.training.stage import selection_value


@dataclasses.dataclass(frozen=True)
class Model:
    """config has its attention path resolved for the devices here; params are laid out over `mesh`. template: the
    kind that SFT put around prompts (data/chat.py); None for a model that only continues text. weights: digest of the
    checkpoint's parameters. tokenizer: None only with load_model(needs_tokenizer=False)."""

    config: ModelConfig
    params: dict
    tokenizer: Tokenizer
    dtype: type
    step: int
    mesh: jax.sharding.Mesh
    template: str | None = None
    weights: str = ""

    @property
    def decoder(self) -> Decoder:
        """The Decoder of this model, which samples ids of its tokenizer only."""
        return Decoder(self.config, self.tokenizer.vocab_size, self.dtype, self.mesh)


def load_model(workdir, *, step: int | str | None = None, mesh: jax.sharding.Mesh | None = None,
               needs_tokenizer: bool = True) -> Model:  # fmt: skip
    """Model, tokenizer and weights (float32) of a workdir's newest good checkpoint, of a given step, or of the 'best'
    one: the lowest validation loss among those on disk.

    A stage that selects its best checkpoint (config `selection`, as SFT) gives that one instead of the newest. For
    PPO the weights are the policy's moving average.

    mesh: None = parameters spread over all devices if they divide (fsdp), else one whole copy on each.
    needs_tokenizer: False = a workdir imported without one is opened too, with None in its place.
    Raises InputError if the workdir, its tokenizer or its checkpoint is missing or damaged, or if it is a reward
    model, which writes no text.
    """
    workdir = paths.local(workdir)
    run = run_config.read_config(workdir)
    if run["kind"] != "lm":
        what = {"scalar": "a reward model, which scores texts", "classifier": "a classifier, which labels texts"}
        raise InputError(f"{workdir} is {what[run['kind']]} and writes none: give another workdir.")
    config = configs.build(ModelConfig, run["model"], "model")
    without = run.get("without_tokenizer", False)
    if without and needs_tokenizer:
        raise InputError(
            f"{workdir} was imported without a tokenizer, so it reads and writes no text: import it again with "
            "--tokenizer=DIR, or train on from it with gptjax.pretrain and --config.data.tokenizer."
        )
    tokenizer = None if without else Tokenizer.load(workdir / "tokenizer")
    config = architecture.resolved(config, jax.default_backend(), remat="none", pipeline_microbatches=None,
                                   pipeline_virtual_stages=1)  # fmt: skip
    boxed = architecture.abstract_params(config)
    grid, shardings = _layout(boxed, mesh)
    params, meta = load_params(workdir, run, boxed, shardings, step)
    dtype = DTYPES[run.get("precision", {}).get("compute", "float32")]
    return Model(config, params, tokenizer, dtype, meta["step"], grid, template_kind(run), meta["weights"])


def template_kind(run: dict) -> str | None:
    """The template of a run's config.json: SFT has it among its data, the later stages beside them."""
    return run.get("template") or (run.get("data") or {}).get("template")


def _layout(boxed, mesh):
    if mesh is not None:
        return mesh, parameter_shardings(boxed, mesh)
    slices = slice_count(jax.devices())
    for axes in (MeshConfig(data=slices, fsdp=-1, dcn_data=slices), MeshConfig(dcn_data=slices)):
        grid = make_mesh(axes)
        try:
            return grid, parameter_shardings(boxed, grid)
        except InputError:  # its widths do not divide over so many devices
            continue
    raise AssertionError("whole copies always fit the rules")


def load_base(init_from, workdir, *, mesh: jax.sharding.Mesh) -> Model:
    """The model that a run begins from. Where its folder is gone and the run in `workdir` has checkpoints, it
    is what the run's own config and tokenizer say, without weights (params is None), which are not needed."""
    base, workdir = paths.local(init_from), paths.local(workdir)
    if not run_config.has_checkpoints(workdir) or base.exists():
        return load_model(base, mesh=mesh)
    hosts.say(f"note: {base} no longer exists. The run continues from its own checkpoint.")
    run = run_config.read_config(workdir)
    config = configs.build(ModelConfig, run["model"], "model")
    config = architecture.resolved(config, jax.default_backend())
    return Model(config, None, Tokenizer.load(workdir / "tokenizer"), float, 0, mesh, template_kind(run))


def check_same_tokenizer(init_from, tokenizer: Tokenizer):
    """Weights mean nothing under another vocabulary: InputError if the two runs' tokenizers differ."""
    if run_config.read_config(init_from).get("without_tokenizer"):
        return  # imported with --tokenizer=none: there is nothing to compare with
    if Tokenizer.load(paths.local(init_from) / "tokenizer").fingerprint != tokenizer.fingerprint:
        raise InputError(
            f"init_from: {init_from} was trained with another tokenizer; "
            f"give --config.data.tokenizer={init_from}/tokenizer."
        )


def load_initial(workdir, model: ModelConfig, abstract, shardings, tokenizer: Tokenizer, mesh) -> Model:
    """Another run's newest good checkpoint, for a run of the same model to begin from. Raises InputError if its model
    is another one."""
    saved = run_config.read_config(workdir)["model"]
    for key, value in architecture.shape(model).items():
        if saved.get(key) != value:
            raise InputError(f"init_from: {workdir} has model.{key}={saved.get(key)}, this run {value}.")
    checkpointer = Checkpointer(workdir)
    with jax.set_mesh(mesh):
        restored = checkpointer.restore_params(abstract, shardings)
    if restored is None:
        raise InputError(f"init_from: {workdir} has no checkpoint.")
    params, meta = restored
    return Model(model, params, tokenizer, float, meta["step"], mesh, weights=checkpointer.weights(meta["step"]))


def origin(**models) -> dict:
    """The entry `origin` of config.json: step, digest of the weights and tokenizer of the models that a run depends on
    (run_config.claim_workdir). models: {field of the config: Model, RewardModel or None}; one without weights is left
    out."""
    about = {}
    for name, model in models.items():
        if model is not None and model.params is not None:
            about |= {f"{name}_step": model.step, f"{name}_weights": model.weights}
            about[f"{name}_tokenizer"] = model.tokenizer.fingerprint
    return about


def load_params(workdir, run: dict, boxed, shardings, step: int | str | None = None) -> tuple[dict, dict]:
    """(parameters, meta) of the checkpoint to use: `step`, 'best', the selected one, or the newest good one. meta has
    the digest of the weights too."""
    checkpointer = Checkpointer(workdir)
    steps = checkpointer.steps()
    if step == "best":
        step = best_step(workdir, checkpointer)
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise InputError(f"{workdir} has no checkpoint of step {step}: there are {there}.")
    if step is None and run.get("selection", "last") != "last" and checkpointer.best in steps:
        step = checkpointer.best
    restored = checkpointer.restore_params(nn.meta.unbox(boxed), shardings, step)
    if restored is None:
        raise InputError(f"{workdir} has no checkpoint yet: train until the first one (checkpoint.every).")
    params, meta = restored
    return params, {**meta, "weights": checkpointer.weights(meta["step"])}


def best_step(workdir, checkpointer: Checkpointer) -> int:
    """The step on disk with the lowest validation loss, or what the stage selects by. Raises InputError if none of them
    was evaluated."""
    steps = checkpointer.steps()
    found = {}
    for line in JsonLines.read(paths.local(workdir) / "evaluations.jsonl"):
        value = selection_value(line)
        if line["step"] in steps and value is not None:
            found[line["step"]] = value
    if found:
        return min(found, key=lambda s: (found[s], s))
    if checkpointer.best in steps:
        return checkpointer.best
    there = ", ".join(map(str, steps)) or "none"
    raise InputError(
        f"{workdir} has no checkpoint with a validation loss, so none is the best (steps on disk: {there}): give "
        "--step=N, or leave it out for the newest one."
    )
