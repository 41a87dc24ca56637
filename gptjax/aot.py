"""Does it fit, and how fast can it be: any config compiled for any TPU slice by the real TPU compiler, without a TPU.

    python -m gptjax.aot --config=configs/gpt3.py:175b --topology=v5p:8x8x16 [--json]

--topology: libtpu's name or Cloud's (v5p-1024, v5litepod-16; --num_slices for several). --program: train or decode,
and with a PPO config ppo_collect or ppo_update, which both have to fit; --policy and --reward name the models, and no
workdir is needed:

    python -m gptjax.aot --config=configs/instructgpt/ppo.py:1.3b --policy=gpt3:1.3b --reward=gpt3:6.7b \
        --program=ppo_update --topology=v5p:2x2x2 --config.precision.compute=bfloat16

A mesh smaller than the slice grows along fsdp, and rows that do not divide over it are rounded: `adjusted` lists what
was changed.

Exit code 0: it fits. 3: it does not; then the largest buffers, and the nearest change under which it compiles. FLOPs
are counted by model/flops.py, collectives from the compiled program (parallel/hlo.py), bounds by parallel/bounds.py.
"""

import dataclasses
import json
import math
import re
import sys
import time

import jax
from absl import flags
from ml_collections import config_flags

from gptjax import config as configs
from gptjax import programs
from gptjax.describe import with_vocabulary
from gptjax.errors import InputError
from gptjax.model.spec import GPT1, GPT2, GPT3, GPTConfig
from gptjax.parallel import topology as topologies
from gptjax.parallel.bounds import bounds
from gptjax.parallel.hlo import traffic
from gptjax.parallel.mesh import AXES, MeshConfig, batch_ways
from gptjax.parallel.topology import Topology
from gptjax.peak import KEPT, STATE
from gptjax.ppo import PPOConfig
from gptjax.pretrain import PretrainConfig

PROGRAMS = ("train", "decode", "ppo_collect", "ppo_update")
PRESETS = {"gpt1": GPT1} | {f"gpt2:{k}": v for k, v in GPT2.items()} | {f"gpt3:{k}": v for k, v in GPT3.items()}


@dataclasses.dataclass(frozen=True)
class Request:
    """program of PROGRAMS. rows, prompt_length, new_tokens: of decode; None = half the context each. policy, reward:
    the models of a PPO config."""

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
            raise InputError(f"Which policy? Give --policy, one of {', '.join(PRESETS)}.")


def build_program(config: dict, topology: Topology, request: Request) -> programs.Program:
    """The program from shapes alone, for a config as a nested dict."""
    if request.program.startswith("ppo"):
        c = configs.build(PPOConfig, config)
        make = programs.collect_program if request.program == "ppo_collect" else programs.update_program
        return make(c, request.policy, request.reward, topologies.topology_mesh(c.mesh, topology))
    c = configs.build(PretrainConfig, with_vocabulary(config))
    mesh = topologies.topology_mesh(c.mesh, topology)
    if request.program == "train":
        return programs.train_program(c, mesh)
    half, ways = c.model.context_length // 2, batch_ways(mesh.shape)
    return programs.decode_program(
        c,
        mesh,
        rows=-(-request.rows // ways) * ways,
        prompt=request.prompt_length or half,
        new_tokens=request.new_tokens or half,
    )


def adjusted(config: dict, topology: Topology, request: Request) -> tuple[dict, dict]:
    """The config on this slice, and what had to change: {key: value}. InputError where the program is not its own."""
    of_ppo = "rollout" in config
    if request.program.startswith("ppo") != of_ppo:
        suits = "ppo_collect or --program=ppo_update" if of_ppo else "train or --program=decode"
        raise InputError(f"program={request.program} is not of this config: give --program={suits}.")
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
    ways = batch_ways(sizes)
    if request.program == "train":
        micro, batch = config["microbatch_size"] or config["batch_size"], config["batch_size"]
        if micro % ways or batch % micro:
            groups = -(-batch // ways)  # rows that a device has of a step
            at_once = max(n for n in range(1, max(1, micro // ways) + 1) if groups % n == 0)
            changes |= {"microbatch_size": at_once * ways, "batch_size": groups * ways}
    elif of_ppo:
        changes |= _ppo_rows(config, ways)
    return changed(config, changes), changes


def _ppo_rows(config: dict, ways: int) -> dict:
    """A minibatch's rows rounded up to a multiple of `ways`, and what of it and of the batch goes at a time."""
    batch, minibatches = config["batch_size"], config["ppo"]["minibatches"]
    up = lambda n: -(-n // ways) * ways
    minibatch = up(batch // minibatches)
    changes = {"batch_size": minibatch * minibatches} if minibatch * minibatches != batch else {}
    for first, name, of in (
        ("ppo", "microbatch_size", minibatch),
        ("rollout", "forward_rows", minibatch * minibatches),
    ):
        rows = config[first][name]
        if rows is not None and (rows % ways or of % rows):
            changes[f"{first}.{name}"] = next((n for n in range(up(rows), of, ways) if of % n == 0), of)
    return changes


def changed(config: dict, changes: dict) -> dict:
    """The nested dict with dotted keys set."""
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        config = {**config, first: changed(config[first], {rest: value}) if rest else value}
    return config


# --- one answer ---------------------------------------------------------------------------------------------


@configs.by_its_rules
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
    # The compiler's peak has in it what lies in host memory from beginning to end (optimizer.offload).
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
    """The bytes a chip would need, from an out-of-memory message of the TPU compiler: all it says."""
    wanted = re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM", message)
    return wanted and round(float(wanted[1]) * 2 ** (10 * " KMGT".index(wanted[2] or " ")))


def largest(program: programs.Program) -> list[dict]:
    """The largest buffers of a device, by our own count, as the compiler lists none: what is in memory whatever the
    order of the operations, and the largest arrays that the forward pass keeps."""
    arrays = program.arrays
    rows = [{"what": k, "shape": "", "bytes": v} for k, v in program.parts.items() if not (arrays and k == KEPT)]
    rows += [{"what": f"kept, every layer: {w}", "shape": "x".join(map(str, s)), "bytes": v} for w, s, v in arrays[:6]]
    return sorted(rows, key=lambda row: -row["bytes"])


# --- the nearest remedy -------------------------------------------------------------------------------------


def remedies(config: dict, topology: Topology, request: Request, state_bytes: int):
    """Candidates, nearest first, as (topology, {key: value}): other settings on this slice, then larger slices.

    state_bytes: parameters, moments and gradients of one device: no setting but a wider fsdp makes those smaller.
    """
    mesh = configs.build(MeshConfig, config["mesh"]).sizes(topology.device_count)
    slices = topology.num_slices  # between which there are copies of the model and nothing else
    wider = {"mesh.data": slices, "mesh.fsdp": mesh["data"] * mesh["fsdp"] // slices} if mesh["data"] > slices else {}
    least = {}
    if wider:
        yield topology, wider
    cut = state_bytes / (mesh["data"] / slices if wider else 1)
    for option in _smaller(config, mesh, request):
        least = option
        if state_bytes < topology.chip.hbm:
            yield topology, option
        if wider and cut < topology.chip.hbm:
            yield topology, wider | option
    for larger in (dataclasses.replace(t, num_slices=slices) for t in topologies.slices(topology.generation)):
        times, rest = divmod(larger.chips, topology.chips)
        if times < 2 or rest or cut / times > topology.chip.hbm:
            continue
        grown = {"mesh.data": slices, "mesh.fsdp": mesh["data"] * mesh["fsdp"] // slices * times}
        for option in ({}, least):
            yield larger, option | grown


def _smaller(config: dict, mesh: dict, request: Request):
    """Settings that need less memory, the gentlest first."""
    ways = batch_ways(mesh)
    if request.program == "train":
        halves = [{"microbatch_size": n} for n in _halves(config["microbatch_size"] or config["batch_size"], ways)]
        order = ("none", "dots", "full")
        remat = config["model"]["remat"]
        remats = [{"model.remat": r} for r in order[order.index(remat) + 1 :]] if remat in order else []
        yield from halves[:1] + remats + halves[1:]
        yield from (a | b for a in halves for b in remats[-1:])
    elif request.program == "ppo_collect":
        for rows in _halves(config["rollout"]["forward_rows"] or config["batch_size"], ways):
            yield {"rollout.forward_rows": rows}
    elif request.program == "ppo_update":
        size = config["ppo"]["microbatch_size"] or config["batch_size"] // config["ppo"]["minibatches"]
        options = [{"ppo.microbatch_size": n} for n in _halves(size, ways)]
        yield from options
        yield from (o | {"model.remat": "full"} for o in options[-1:] or [{}])
        yield from (o | {"model.remat": "full", "offload": True} for o in options[-1:] or [{}])


def _halves(size: int, ways: int) -> list[int]:
    found = []
    while size % 2 == 0 and (size // 2) % ways == 0:
        size //= 2
        found.append(size)
    return found


def find_remedy(config: dict, topology: Topology, request: Request, result: dict, status) -> dict | None:
    """The first candidate that the compiler accepts, as {topology, changes, bytes_per_chip, tried}; None if none."""
    config, before = adjusted(config, topology, request)
    ours = result["ours_per_chip"]
    of_ppo = "rollout" in config
    state = sum(v for k, v in ours.items() if (k != "key-value cache" if of_ppo else k in STATE))
    for tried, (larger, changes) in enumerate(remedies(config, topology, request, state), 1):
        try:
            answer = check(changed(config, changes), larger, request, status)
        except InputError:  # does not divide
            continue
        if answer["fits"]:
            return {
                "topology": answer["topology"], "changes": before | changes | answer["adjusted"],
                "bytes_per_chip": answer["bytes_per_chip"], "tried": tried,
            }  # fmt: skip
    return None


# --- the command --------------------------------------------------------------------------------------------


def describe_mesh(mesh: dict) -> str:
    return " x ".join(f"{k} {v}" for k, v in mesh.items() if v > 1) or "one device"


def gib(n) -> str:
    return "?" if n is None else f"{n / 2**30:,.2f} GiB"


def table(r: dict) -> str:
    """The result for people."""
    per = "chip" if r["chips"] == r["devices"] else "device (half a chip)"
    rows = [("slice", f"{r['topology']}, {r['chips']:,} chips, mesh {describe_mesh(r['mesh'])}")]
    if r["adjusted"]:
        rows.append(("adjusted", " ".join(f"--config.{k}={v}" for k, v in r["adjusted"].items())))
    if not r["fits"]:
        rows += [("fits", f"NO: {r['message']}"), ("largest per " + per, "")]
        rows += [(f"  {gib(b['bytes'])}", f"{b['what']} {b['shape']}") for b in r["largest"][:12]]
        if remedy := r.get("remedy"):
            flags_ = " ".join(f"--config.{k}={v}" for k, v in remedy["changes"].items())
            rows.append(("compiles with", f"--topology={remedy['topology']} {flags_}: {gib(remedy['bytes_per_chip'])}"))
        elif "remedy" in r:
            rows.append(("remedy", "none found on slices of this generation: try mesh.tensor, or larger chips"))
        return "\n".join(f"{name:<24}{value}" for name, value in rows)
    b = r["bounds"]
    rows += [
        ("fits", f"yes: {gib(r['bytes_per_chip'])} of {gib(r['hbm_per_chip'])} per {per}"),
        ("  arguments", gib(r["argument_bytes_per_chip"])),
        ("  temporaries", gib(r["temporary_bytes_per_chip"])),
        *((("  in host memory", gib(r["host_bytes_per_chip"])),) if r["host_bytes_per_chip"] else ()),
        ("our own count", f"{gib(sum(r['ours_per_chip'].values()))}"),
        *((f"  {gib(v)}", k) for k, v in r["ours_per_chip"].items()),
        ("FLOPs per " + per, f"{r['flops_per_chip']:.4g}"),
        ("sent per " + per, gib(r["collective_bytes_per_chip"])),
    ]
    rows += [(f"  {k}", f"{v['executions']:,} x, {gib(v['bytes'])}") for k, v in r["collectives"].items()]
    rows += [
        ("at least", ", ".join(f"{k} {v:.4g} s" for k, v in b["seconds"].items() if v is not None)
                     + f": {b['binding']} bounds it"),
        ("intensity", f"{b['flops_per_hbm_byte']:,.0f} FLOPs per HBM byte"),
    ]  # fmt: skip
    if b["mfu_bound"]:
        rows.append(
            (
                "MFU, PaLM's",
                f"at most {b['mfu_bound']:.1%} ({b['mfu_bound_causal']:.1%} with attention halved); "
                f"{b['mfu_without_overlap']:.1%} if nothing overlaps",
            )
        )
    if r["loops_of_unknown_length"]:
        rows.append(("counted once", f"loops of unknown length: {', '.join(r['loops_of_unknown_length'])}"))
    rows.append(("compiled in", f"{r['compile_seconds']:.0f} s"))
    return "\n".join(f"{name:<24}{value}" for name, value in rows)


def main(_):
    jax.config.update("jax_platforms", "cpu")  # the compiler is all that is wanted of libtpu
    config = FLAGS.config.to_dict()
    slices = config["mesh"]["dcn_data"] if FLAGS.num_slices is None else FLAGS.num_slices
    topology = topologies.parse(FLAGS.topology, slices)
    preset = lambda name: name and configs.choose(PRESETS, name, "model preset")
    request = Request(
        FLAGS.program, FLAGS.rows, FLAGS.prompt_length, FLAGS.new_tokens, preset(FLAGS.policy), preset(FLAGS.reward)
    )
    status = lambda text: print(f"{text} …", file=sys.stderr, flush=True)
    result = check(config, topology, request, status)
    if not result["fits"] and FLAGS.remedy:
        result["remedy"] = find_remedy(config, topology, request, result, status)
    print(json.dumps(configs.json_safe(result), allow_nan=False) if FLAGS.json else table(result))
    if not result["fits"]:
        sys.exit(3)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "A config file, as configs/gpt3.py:175b.", lock_config=True)
    flags.DEFINE_string("topology", None, "A TPU slice: v5p:8x8x8, v5p-1024, v5litepod-16.")
    flags.DEFINE_integer("num_slices", None, "Slices joined by the data-centre network; else the config's dcn_data.")
    flags.DEFINE_string("program", "train", "What to compile: " + ", ".join(PROGRAMS))
    flags.DEFINE_string("policy", None, "PPO's policy, a preset: gpt3:1.3b")
    flags.DEFINE_string("reward", None, "PPO's reward model, a preset.")
    flags.DEFINE_integer("rows", 8, "Prompts decoded together.")
    flags.DEFINE_integer("prompt_length", None, "Tokens of a prompt; half the context if not given.")
    flags.DEFINE_integer("new_tokens", None, "Tokens decoded; half the context if not given.")
    flags.DEFINE_bool("remedy", True, "Where it does not fit, look for the nearest change under which it compiles.")
    flags.DEFINE_bool("json", False, "One JSON object.")
    flags.mark_flags_as_required(["config", "topology"])
    configs.run(main)
