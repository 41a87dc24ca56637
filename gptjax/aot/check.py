"""Compiles a program of a config for a TPU slice and reports what it needs: bytes, FLOPs, collectives, bounds.

FLOPs are counted by model/flops.py, collectives from the compiled program (cost/hlo.py), bounds by cost/roofline.py.
"""

import dataclasses
import math
import re
import time

import jax

from gptjax import config as configs
from gptjax.aot import programs
from gptjax.cost import topology as topologies
from gptjax.cost.hlo import traffic
from gptjax.cost.memory import KEPT
from gptjax.cost.roofline import bounds
from gptjax.cost.topology import Topology
from gptjax.describe import with_vocabulary
from gptjax.dpo import DPOConfig
from gptjax.errors import InputError
from gptjax.finetune import FinetuneConfig
from gptjax.model.architecture import require_gpt
from gptjax.model.spec import GPT1, GPT2, GPT3, GPTConfig
from gptjax.parallel.mesh import AXES, MeshConfig, batch_shards
from gptjax.ppo import PPOConfig
from gptjax.pretrain import PretrainConfig
from gptjax.reward import RewardConfig
from gptjax.sft import SFTConfig

PROGRAMS = ("train", "decode", "ppo_collect", "ppo_update")
PRESETS = {"gpt1": GPT1} | {f"gpt2:{k}": v for k, v in GPT2.items()} | {f"gpt3:{k}": v for k, v in GPT3.items()}


@dataclasses.dataclass(frozen=True)
class Request:
    """program: of PROGRAMS. rows, prompt_length, new_tokens: of decode; None = half the context. policy: of PPO, or the
    base model of SFT, fine-tuning, DPO and reward models. reward: of PPO, or None."""

    program: str = "train"
    rows: int = 8
    prompt_length: int | None = None
    new_tokens: int | None = None
    policy: GPTConfig | None = None
    reward: GPTConfig | None = None

    def __post_init__(self):
        if self.program not in PROGRAMS:
            raise InputError(f"program={self.program!r}: choose one of {', '.join(PROGRAMS)}.")
        if self.program.startswith("ppo") and self.policy is None:
            raise InputError(f"program={self.program} needs a policy: give --policy, one of {', '.join(PRESETS)}.")


def build_program(config: dict, topology: Topology, request: Request) -> programs.Program:
    """The program from shapes alone, for a config as a nested dict."""
    if request.program.startswith("ppo"):
        c = configs.build(PPOConfig, config)
        make = programs.collect_program if request.program == "ppo_collect" else programs.update_program
        return make(c, request.policy, request.reward, topologies.topology_mesh(c.mesh, topology))
    for key, kind, make in (
        ("mix", SFTConfig, programs.sft_program), ("objective", RewardConfig, programs.reward_program),
        ("beta", DPOConfig, programs.dpo_program), ("transfer", FinetuneConfig, programs.finetune_program),
    ):  # fmt: skip
        if key in config:  # no other stage has it
            c = configs.build(kind, config)
            return make(c, request.policy, topologies.topology_mesh(c.mesh, topology))
    c = configs.build(PretrainConfig, with_vocabulary(config))
    require_gpt(c.model, "aot")
    mesh = topologies.topology_mesh(c.mesh, topology)
    if request.program == "train":
        return programs.train_program(c, mesh)
    half, shards = c.model.context_length // 2, batch_shards(mesh.shape)
    return programs.decode_program(
        c,
        mesh,
        rows=-(-request.rows // shards) * shards,
        prompt=request.prompt_length or half,
        new_tokens=request.new_tokens or half,
    )


def adjusted(config: dict, topology: Topology, request: Request) -> tuple[dict, dict]:
    """(the config adapted to this slice, {key: changed value}). InputError: the config's stage has no such program."""
    of_ppo = "rollout" in config
    if request.program.startswith("ppo") != of_ppo:
        suits = "ppo_collect or --program=ppo_update" if of_ppo else "train or --program=decode"
        raise InputError(f"program={request.program} is not of this config: give --program={suits}.")
    begins_with_another = not {"mix", "objective", "beta", "transfer"}.isdisjoint(config)
    if begins_with_another and (request.program != "train" or request.policy is None):
        raise InputError(
            "This config is of a stage that starts from another run's model: give --program=train and --policy, one of "
            f"{', '.join(PRESETS)}."
        )
    changes = {}
    mesh = {axis: config["mesh"][axis] for axis in AXES}
    slices = topology.num_slices
    if config["mesh"]["dcn_data"] != slices:
        changes["mesh.dcn_data"] = slices
        if mesh["data"] != -1 and mesh["data"] % slices:
            changes["mesh.data"] = mesh["data"] = slices
    fixed = math.prod(size for size in mesh.values() if size != -1)
    if -1 not in mesh.values() and fixed < topology.device_count and topology.device_count % fixed == 0:
        changes["mesh.fsdp"] = mesh["fsdp"] * topology.device_count // fixed
    config = changed(config, changes)
    sizes = configs.build(MeshConfig, config["mesh"]).sizes(topology.device_count)
    shards = batch_shards(sizes)
    if request.program == "train":
        micro, batch = config["microbatch_size"] or config["batch_size"], config["batch_size"]
        if micro % shards or batch % micro:
            groups = -(-batch // shards)  # rows that a device has of a step
            at_once = max(n for n in range(1, max(1, micro // shards) + 1) if groups % n == 0)
            changes |= {"microbatch_size": at_once * shards, "batch_size": groups * shards}
    elif of_ppo:
        changes |= _ppo_rows(config, shards)
    return changed(config, changes), changes


def _ppo_rows(config: dict, shards: int) -> dict:
    """{key: value} that round a minibatch up to a multiple of `shards` rows, and its micro-batches with it."""
    batch, minibatches = config["batch_size"], config["ppo"]["minibatches"]
    up = lambda n: -(-n // shards) * shards
    minibatch = up(batch // minibatches)
    changes = {"batch_size": minibatch * minibatches} if minibatch * minibatches != batch else {}
    for first, name, of in (
        ("ppo", "microbatch_size", minibatch),
        ("rollout", "forward_rows", minibatch * minibatches),
    ):
        rows = config[first][name]
        if rows is not None and (rows % shards or of % rows):
            changes[f"{first}.{name}"] = next((n for n in range(up(rows), of, shards) if of % n == 0), of)
    return changes


def changed(config: dict, changes: dict) -> dict:
    """The nested dict with dotted keys set."""
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        config = {**config, first: changed(config[first], {rest: value}) if rest else value}
    return config


# --- the result ---------------------------------------------------------------------------------------------


def describe_mesh(mesh: dict) -> str:
    return " x ".join(f"{k} {v}" for k, v in mesh.items() if v > 1) or "one device"


@configs.with_sharding_rules
def check(config: dict, topology: Topology, request: Request = Request(), status=lambda text: None) -> dict:
    """Compiles a program for a slice. Returns the figures as JSON types; per chip means per JAX device, which on
    tpu7x is half a chip."""
    config, changes = adjusted(config, topology, request)
    program = build_program(config, topology, request)
    chip = topology.chip
    result = {
        "program": request.program,
        "topology": str(topology),
        "fits": False,
        "chips": topology.chips,
        "devices": topology.device_count,
        "mesh": dict(program.mesh.shape),
        "adjusted": changes,
        "hbm_per_chip": chip.hbm,
        "bytes_per_chip": None,
        "ours_per_chip": program.parts,
        "tokens": program.tokens,
        "flops_per_chip": program.work.model_flops,
        "collective_bytes_per_chip": None,
        "compile_seconds": None,
    }
    status(f"compiling {request.program} for {topology}, mesh {describe_mesh(result['mesh'])}")
    began = time.perf_counter()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return result | {
            "compile_seconds": time.perf_counter() - began,
            "bytes_per_chip": bytes_wanted(str(error)),
            "message": str(error).splitlines()[0],
            "largest": largest(program),
        }
    result |= {"fits": True, "compile_seconds": time.perf_counter() - began}
    memory = compiled.memory_analysis()
    # The compiler's peak includes arguments in host memory (optimizer.offload).
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    sent = traffic(compiled.as_text(), topology.num_slices)
    ici, dcn = sent.sent(crosses=False), sent.sent(crosses=True)
    result |= {
        "bytes_per_chip": peak,
        "argument_bytes_per_chip": memory.argument_size_in_bytes,
        "temporary_bytes_per_chip": peak - memory.argument_size_in_bytes,
        "host_bytes_per_chip": memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes,
        "collective_bytes_per_chip": ici + dcn,
        "dcn_bytes_per_chip": dcn,
        "collectives": sent.by_kind(),
        "loops_of_unknown_length": list(sent.endless),
        "bounds": bounds(program.work, ici, dcn, chip),
    }
    return result


def bytes_wanted(message: str) -> int | None:
    """The bytes that a chip would need, from the TPU compiler's out-of-memory message; None if it does not say."""
    wanted = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return wanted and round(float(wanted[1]) * 2 ** (10 * " KMGT".index(wanted[2] or " ")))


def largest(program: programs.Program) -> list[dict]:
    """The largest buffers of a device, by our own estimate, since the compiler lists none: the state, and the largest
    arrays that the forward pass saves."""
    arrays = program.arrays
    rows = [{"what": k, "shape": "", "bytes": v} for k, v in program.parts.items() if not (arrays and k == KEPT)]
    rows += [{"what": f"kept, every layer: {w}", "shape": "x".join(map(str, s)), "bytes": v} for w, s, v in arrays[:6]]
    return sorted(rows, key=lambda row: -row["bytes"])
