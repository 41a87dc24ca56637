"""nanoGPT's CPU setting, wall time from start to finish, beside nanoGPT's own train.py.

    python -m experiments.benchmarks.shakespeare_cpu --nanogpt=CHECKOUT --input=input.txt [--rounds=2] [--json]

CHECKOUT is a copy of github.com/karpathy/nanoGPT whose data/shakespeare_char is prepared. Both sides are whole
processes in turn: imports, compilation, 2,000 steps, evaluations every 250 steps and checkpoints included. No
compilation cache is carried from one run to the next.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

NANOGPT = [
    "train.py", "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--log_interval=1", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128",
    "--max_iters=2000", "--lr_decay_iters=2000", "--dropout=0.0",
]  # fmt: skip


def run_nanogpt(checkout, out):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *NANOGPT, f"--out_dir={out}"], cwd=checkout, capture_output=True, text=True, check=True
    )
    seconds = time.perf_counter() - began
    losses = re.findall(r"val loss ([\d.]+)", done.stdout)
    return {"seconds": seconds, "validation_loss": float(losses[-1])}


def run_gptjax(text, out):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
    began = time.perf_counter()
    subprocess.run(
        [
            sys.executable, "-m", "gptjax.pretrain", "--config=configs/shakespeare_char.py", f"--workdir={out}",
            f"--config.data.source={text}",
        ],
        env={**environment, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - began
    with open(os.path.join(out, "evaluations.jsonl")) as f:
        last = json.loads(f.read().splitlines()[-1])
    return {"seconds": seconds, "validation_loss": last["loss"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", required=True)
    parser.add_argument("--input", required=True)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rounds = []
    for _ in range(args.rounds):
        pair = {}
        for side, run, where in (("nanogpt", run_nanogpt, args.nanogpt), ("gptjax", run_gptjax, args.input)):
            out = tempfile.mkdtemp()
            pair[side] = run(os.path.abspath(where), out)
            shutil.rmtree(out)
            print(f"{side}: {pair[side]['seconds']:.1f} s, loss {pair[side]['validation_loss']:.4f}", file=sys.stderr)
        rounds.append(pair)
    ratios = [r["nanogpt"]["seconds"] / r["gptjax"]["seconds"] for r in rounds]
    result = {
        "benchmark": "shakespeare_cpu",
        "speedup": statistics.median(ratios),
        "speedups": ratios,
        "rounds": rounds,
    }
    if args.json:
        print(json.dumps(result))
    else:
        print(
            f"gptjax takes 1/{result['speedup']:.2f} of nanoGPT's wall time (rounds: {[round(r, 2) for r in ratios]})"
        )


if __name__ == "__main__":
    main()
