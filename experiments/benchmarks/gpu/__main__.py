"""Is the GPU path right, and how fast is it? Checks first, then figures, beside torch on the same chip where it is.

    make bench-gpu      # or: python -m experiments.benchmarks.gpu [--only=check,train] [--torch_python=PYTHON]

Each part is a process of its own, and the JSON and the picture are written anew after each: a limit of time (--minutes)
costs the parts that did not end, no more. XLA_FLAGS set outside stands, so the same part can be run with another flag.
--tiny runs every part at toy size on any platform: it says that the script works, and nothing of speed.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

from experiments.benchmarks._peer import Peer, machine
from gptjax.distributed import gpu_flags
from gptjax.errors import InputError

HERE = Path(__file__).resolve().parent
KINDS = {
    "check": "the GPU beside the CPU, attention beside the formula, the sampler, PPO's first minibatch",
    "train": "tokens/s and MFU of a train step",
    "decode": "tokens/s beside what the memory's bandwidth allows",
    "ppo": "an iteration of PPO: rollout, scoring, update",
    "attention": "forward and backward pass of the platform's own attention beside XLA's",
}


def part(name: str, tiny: bool, torch_python: str | None) -> dict:
    """One part's figures, in this process."""
    from experiments.benchmarks.gpu import check, common, decode, phases, train

    scale, (kind, _, model) = common.TINY if tiny else common.FULL, name.partition(" ")
    if kind in ("check", "attention"):
        result = {"check": check.run, "attention": phases.paths}[kind](scale)
    elif kind == "ppo":
        result = phases.ppo(scale, model)
    else:
        shape = dataclasses.asdict(scale.train[model][0] if kind == "train" else scale.decode[model])
        fields = ("vocab_size", "n_layer", "n_head", "d_model", "context_length")
        command = (torch_python, HERE / "torch_peer.py", json.dumps({k: shape[k] for k in fields}))
        torch = Peer(*command) if torch_python else None
        result = {"train": train.run, "decode": decode.run}[kind](scale, model, torch)
        if torch:
            torch.close()
    return {"about": common.about(), **result}


def names(kinds, tiny: bool) -> list[str]:
    """The parts of these kinds, one for each model; the smallest model is the one beside torch, and PPO's."""
    models = ("toy",) if tiny else ("gpt2-124m", "gpt2-1558m", "gpt3-1.3b")
    of = {"check": ("",), "train": models, "decode": models[:2], "ppo": models[:1], "attention": ("",)}
    return [f"{kind} {model}".strip() for kind in kinds for model in of[kind]]


def without_torch(python: str, tiny: bool) -> str | None:
    """Why there is no peer, or None."""
    code = "import torch; print(int(torch.cuda.is_available()))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return f"{python} has no torch"
    return None if tiny or done.stdout.strip() == "1" else f"the torch of {python} finds no CUDA"


def run(name: str, args, torch_python: str | None, left: float) -> dict:
    """A part in a process of its own, within `left` seconds: its figures, or why there are none."""
    beside = (
        torch_python if name.split()[-1] in ("gpt2-124m", "toy") and name.split()[0] in ("train", "decode") else None
    )
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", f"--part={name}", *(["--tiny"] if args.tiny else [])]
    command += [f"--torch_python={beside}"] if beside else []
    changed = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.45"} if beside else {}  # each of the two has half of the memory
    if (platforms := os.environ.get("JAX_PLATFORMS")) and "cpu" not in platforms:
        changed["JAX_PLATFORMS"] = f"{platforms},cpu"  # which the check compares with
    began = time.perf_counter()
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, **changed}, timeout=max(left, 1)
        )
    except subprocess.TimeoutExpired:
        return {"left out": f"did not end within the {left:.0f} s that were left (--minutes)"}
    if done.returncode:
        return {"left out": f"ended with status {done.returncode}: see its messages"}
    return {**json.loads(done.stdout.splitlines()[-1]), "part_seconds": time.perf_counter() - began}


def file_name(results: dict, tiny: bool) -> str:
    kind = next(r["about"]["device"] for r in results.values() if "about" in r)
    words = re.sub(r"[^a-z0-9]+", "-", kind.lower().replace("nvidia", "")).strip("-")
    return f"gpu-{'tiny-' if tiny else ''}{words}"


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", help="; ".join(f"{k}: {v}" for k, v in KINDS.items()) + "; comma-separated")
    parser.add_argument("--torch_python", default=sys.executable, help="Python of an environment with torch and CUDA")
    parser.add_argument("--minutes", type=float, default=9.0, help="of all parts; what is not done by then is left out")
    parser.add_argument("--output", default=str(HERE.parent / "results"), help="folder of gpu-CHIP.json and .png")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any platform")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        beside = args.torch_python if any(a.startswith("--torch_python") for a in argv or sys.argv) else None
        print(json.dumps(part(args.part, args.tiny, beside)))
        return
    kinds = args.only.split(",") if args.only else list(KINDS)
    if wrong := [k for k in kinds if k not in KINDS]:
        parser.error(f"there is no part {wrong[0]!r}: choose of {', '.join(KINDS)}")
    if not args.tiny and not gpu_flags.has_nvidia_gpu():
        raise InputError("No NVIDIA GPU is here (/dev/nvidia0, JAX_PLATFORMS): run it on one, or try it with --tiny.")
    gpu_flags.prepare()
    measure(args, kinds)


def measure(args, kinds):
    from experiments.benchmarks.gpu.report import plot, say

    ends, output = time.perf_counter() + 60 * args.minutes, Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    why = without_torch(args.torch_python, args.tiny) if {"train", "decode"} & set(kinds) else None
    if why:
        print(f"no peer: {why}; give --torch_python of an environment that has it", file=sys.stderr)
    results, wrong, path = {}, False, None
    for name in names(kinds, args.tiny):
        print(f"{name} …", file=sys.stderr, flush=True)
        results[name] = run(name, args, None if why else args.torch_python, ends - time.perf_counter())
        say(name, results[name])
        wrong |= bool(results[name].get("wrong"))
        if not any("about" in r for r in results.values()):
            continue  # which chip it is, the first part that ends says
        path = output / file_name(results, args.tiny)
        earlier = json.loads(path.with_suffix(".json").read_text()) if path.with_suffix(".json").exists() else {}
        whole = {
            **earlier,
            **{k: r for k, r in results.items() if "left out" not in r or "left out" in earlier.get(k, r)},
            "machine": machine(),
            "no peer": why,
            **({"tiny": "says nothing of speed"} if args.tiny else {}),
        }
        path.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
        plot(whole, path.with_suffix(".png"))
    print(path.with_suffix(".json") if path else "no part ended: nothing is written")
    if wrong or any("left out" in r for r in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
