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
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.parallel.rules import parameter_shardings
from gptjax.training.checkpoint import Checkpointer
from gptjax.training.precision import DTYPES


@dataclasses.dataclass(frozen=True)
class Model:
    """config has its attention path resolved for the devices here; params are laid out over `mesh`."""

    config: GPTConfig
    params: dict
    tokenizer: Tokenizer
    dtype: type
    step: int
    mesh: jax.sharding.Mesh


def load_model(workdir, *, step: int | None = None, mesh: MeshConfig | None = None) -> Model:
    """Model, tokenizer and weights (float32) of a workdir's newest good checkpoint, or of a given step.

    mesh: None = parameters spread over all devices if they divide (fsdp), else one whole copy on each.
    Raises InputError if the workdir, its tokenizer or its checkpoint is missing or damaged.
    """
    workdir = epath.Path(workdir)
    run = configs.read_config(workdir)
    config = configs.build(GPTConfig, run["model"], "model")
    tokenizer = Tokenizer.load(workdir / "tokenizer")
    config = dataclasses.replace(config, attention=resolve(config.attention, jax.default_backend()), remat="none")
    boxed = gpt.abstract_params(config)
    try:
        grid = make_mesh(mesh or MeshConfig(data=1, fsdp=-1))
        shardings = parameter_shardings(boxed, grid)
    except InputError:
        if mesh is not None:
            raise
        grid = make_mesh(MeshConfig())
        shardings = parameter_shardings(boxed, grid)
    checkpointer = Checkpointer(workdir)
    if step is not None and step not in checkpointer.steps():
        there = ", ".join(map(str, checkpointer.steps())) or "none"
        raise InputError(f"{workdir} has no checkpoint of step {step}: there are {there}.")
    restored = checkpointer.restore_params(nn.meta.unbox(boxed), shardings, step)
    if restored is None:
        raise InputError(f"{workdir} has no checkpoint yet: train until the first one (checkpoint.every).")
    params, meta = restored
    dtype = DTYPES[run.get("precision", {}).get("compute", "float32")]
    return Model(config, params, tokenizer, dtype, meta["step"], grid)
