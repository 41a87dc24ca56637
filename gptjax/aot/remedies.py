"""The nearest change that makes a program fit which does not."""

import dataclasses

from gptjax import config as configs
from gptjax.aot.check import Request, adjusted, changed, check
from gptjax.cost import topology as topologies
from gptjax.cost.memory import STATE
from gptjax.cost.topology import Topology
from gptjax.errors import InputError
from gptjax.parallel.mesh import MeshConfig, batch_shards


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
    shards = batch_shards(mesh)
    if request.program == "train":
        halves = [{"microbatch_size": n} for n in _halves(config["microbatch_size"] or config["batch_size"], shards)]
        order = ("none", "dots", "full")
        remat = config["model"]["remat"]
        remats = [{"model.remat": r} for r in order[order.index(remat) + 1 :]] if remat in order else []
        yield from halves[:1] + remats + halves[1:]
        yield from (a | b for a in halves for b in remats[-1:])
    elif request.program == "ppo_collect":
        for rows in _halves(config["rollout"]["forward_rows"] or config["batch_size"], shards):
            yield {"rollout.forward_rows": rows}
    elif request.program == "ppo_update":
        size = config["ppo"]["microbatch_size"] or config["batch_size"] // config["ppo"]["minibatches"]
        options = [{"ppo.microbatch_size": n} for n in _halves(size, shards)]
        yield from options
        yield from (o | {"model.remat": "full"} for o in options[-1:] or [{}])
        yield from (o | {"model.remat": "full", "offload": True} for o in options[-1:] or [{}])


def _halves(size: int, shards: int) -> list[int]:
    """size / 2, size / 4, ...: as long as they are whole and divisible over the shards."""
    found = []
    while size % 2 == 0 and (size // 2) % shards == 0:
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
