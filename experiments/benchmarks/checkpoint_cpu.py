"""Checkpoints beside torch.save and torch.load of the same arrays: float32 parameters and AdamW's two moments.

    python -m experiments.benchmarks.checkpoint_cpu [--rounds=5] [--json]

GPT-2 of 6 layers, 384 wide, vocabulary 50,257. Ours computes a digest of every array when it saves and verifies it
when it restores; it writes in the background, so what a training step waits for is `blocked`, not `saved`. Needs torch
(make bench makes an environment that has it). Both write to --directory, by default the temporary one.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from experiments.benchmarks._peer import Peer, interleaved, machine, quartiles, serve

SHAPE = dict(vocab_size=50_257, n_layer=6, n_head=6, d_model=384, context_length=256)


def serve_torch(directory: str):
    import torch

    from gptjax.model.spec import GPTConfig, parameter_count

    n = parameter_count(GPTConfig(**SHAPE))
    state = {name: torch.randn(n) for name in ("parameters", "first moments", "second moments")}
    path = Path(directory) / "torch.pt"

    def work(_):
        began = time.perf_counter()
        torch.save(state, path)
        with open(path, "rb+") as f:
            os.fsync(f.fileno())
        saved = time.perf_counter()
        torch.load(path)
        return {"saved": saved - began, "blocked": saved - began, "restored": time.perf_counter() - saved}

    serve({"about": f"torch {torch.__version__}", "bytes": 12 * n}, work)


def serve_gptjax(directory: str):
    import jax
    import orbax.checkpoint

    from gptjax.model import gpt
    from gptjax.model.spec import GPTConfig
    from gptjax.parallel.mesh import MeshConfig, make_mesh
    from gptjax.training.checkpoint import CheckpointConfig, Checkpointer
    from gptjax.training.optimizer import OptimizerConfig, make_optimizer
    from gptjax.training.precision import PrecisionConfig
    from gptjax.training.state import init_state, state_shardings

    model, tx, precision = GPTConfig(**SHAPE), make_optimizer(OptimizerConfig()), PrecisionConfig()
    mesh = make_mesh(MeshConfig())
    abstract, shardings = state_shardings(gpt.abstract_params(model), tx, precision, mesh)
    state = init_state(model, tx, precision, shardings, seed=0)
    checkpointer, step = Checkpointer(Path(directory) / "gptjax", CheckpointConfig(keep_last=1)), 0

    def work(_):
        nonlocal step
        step += 1
        began = time.perf_counter()
        checkpointer.save(step, state, {"data": ""})
        blocked = time.perf_counter()
        checkpointer.wait()
        saved = time.perf_counter()
        jax.block_until_ready(checkpointer.restore(abstract, shardings)[0])
        return {"blocked": blocked - began, "saved": saved - began, "restored": time.perf_counter() - saved}

    serve({"about": f"jax {jax.__version__}, orbax-checkpoint {orbax.checkpoint.__version__}"}, work)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--directory", help="where both write; a temporary one if not given")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=["torch", "gptjax"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.serve:
        return {"torch": serve_torch, "gptjax": serve_gptjax}[args.serve](args.directory)

    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        sides = {
            side: Peer(sys.executable, "-m", "experiments.benchmarks.checkpoint_cpu", f"--serve={side}",
                       f"--directory={directory}")
            for side in ("torch", "gptjax")
        }  # fmt: skip
        interleaved(sides, 1)
        answers = interleaved(sides, args.rounds)
        size = sides["torch"].about["bytes"]
        versions = {side: peer.about["about"] for side, peer in sides.items()}
        for peer in sides.values():
            peer.close()
    result = {"benchmark": "checkpoint_cpu", "bytes": size}
    for what in ("blocked", "saved", "restored"):
        seconds = {side: [a[what] for a in of] for side, of in answers.items()}
        result[what] = {
            "ratio_quartiles": quartiles(t / g for t, g in zip(seconds["torch"], seconds["gptjax"], strict=True)),
            "seconds": {side: quartiles(v)[1] for side, v in seconds.items()},
        }
    result |= {"versions": versions, "machine": machine()}
    if args.json:
        print(json.dumps(result))
        return
    print(f"{size / 1e6:,.0f} MB")
    for what in ("blocked", "saved", "restored"):
        low, middle, high = result[what]["ratio_quartiles"]
        seconds = result[what]["seconds"]
        print(
            f"{what:<9} {seconds['gptjax']:.2f} s beside {seconds['torch']:.2f} s: torch / gptjax {middle:.2f} "
            f"(quartiles {low:.2f}-{high:.2f})"
        )


if __name__ == "__main__":
    main()
