"""A finished or running workdir as a model to use: what sample, evaluate, convert and later stages open."""

import dataclasses

import flax.linen as nn
import jax
from etils import epath

from gptjax import config as configs
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.model import gpt
from gptjax.model.attention import resolve
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import MeshConfig, make_mesh, slice_count
from gptjax.parallel.rules import parameter_shardings
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.precision import DTYPES


@dataclasses.dataclass(frozen=True)
class Model:
    """config has its attention path resolved for the devices here; params are laid out over `mesh`. template: the
    kind that SFT put around prompts (data/chat.py); None for a model that only continues text. tokenizer: None only
    where load_model was told so."""

    config: GPTConfig
    params: dict
    tokenizer: Tokenizer
    dtype: type
    step: int
    mesh: jax.sharding.Mesh
    template: str | None = None


def load_model(workdir, *, step: int | None = None, mesh: jax.sharding.Mesh | None = None,
               needs_tokenizer: bool = True) -> Model:  # fmt: skip
    """Model, tokenizer and weights (float32) of a workdir's newest good checkpoint, or of a given step.

    A stage that selects its best checkpoint (config `selection`, as SFT) gives that one instead of the newest. For
    PPO the weights are the policy's moving average.

    mesh: None = parameters spread over all devices if they divide (fsdp), else one whole copy on each.
    needs_tokenizer: False = a workdir imported without one is opened too, with None in its place.
    Raises InputError if the workdir, its tokenizer or its checkpoint is missing or damaged, or if it is a reward
    model, which writes no text.
    """
    workdir = epath.Path(workdir)
    run = configs.read_config(workdir)
    if run.get("stage") == "reward":
        raise InputError(f"{workdir} is a reward model, which scores texts and writes none: give another workdir.")
    config = configs.build(GPTConfig, run["model"], "model")
    without = has_no_tokenizer(workdir, run)
    if without and needs_tokenizer:
        raise InputError(
            f"{workdir} was imported without a tokenizer, so it reads and writes no text: import it again with "
            "--tokenizer=DIR, or train on from it with gptjax.pretrain and --config.data.tokenizer."
        )
    tokenizer = None if without else Tokenizer.load(workdir / "tokenizer")
    config = dataclasses.replace(config, attention=resolve(config.attention, jax.default_backend()), remat="none",
                                 pipeline_microbatches=None, pipeline_rounds=1)  # fmt: skip
    boxed = gpt.abstract_params(config)
    grid, shardings = _layout(boxed, mesh)
    params, meta = load_params(workdir, run, boxed, shardings, step)
    dtype = DTYPES[run.get("precision", {}).get("compute", "float32")]
    return Model(config, params, tokenizer, dtype, meta["step"], grid, template_kind(run))


def has_no_tokenizer(workdir, run: dict) -> bool:
    """Whether a workdir is one of `convert --tokenizer=none`."""
    return run.get("stage") == "convert" and not (epath.Path(workdir) / "tokenizer").exists()


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


def load_params(workdir, run: dict, boxed, shardings, step: int | None = None) -> tuple[dict, dict]:
    """(parameters, meta) of the checkpoint to use: `step`, the selected one, or the newest good one."""
    checkpointer = Checkpointer(workdir)
    steps = checkpointer.steps()
    if step is not None and step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise InputError(f"{workdir} has no checkpoint of step {step}: there are {there}.")
    if step is None and run.get("selection", "last") != "last" and checkpointer.best in steps:
        step = checkpointer.best
    restored = checkpointer.restore_params(nn.meta.unbox(boxed), shardings, step)
    if restored is None:
        raise InputError(f"{workdir} has no checkpoint yet: train until the first one (checkpoint.every).")
    return restored
