"""How much faster the loader is than the step it feeds.

    python -m experiments.benchmarks.loader [--json]

Batches of random tokens in token shards, read as pre-training reads them (Grain, one reading thread), beside a
bare memmap with fancy indexing; page cache warm. The bar is 10 times what a train step eats.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from experiments.benchmarks._peer import quartiles
from gptjax.data import lm
from gptjax.data.prepare import prepare


def text(path, characters):
    rng = np.random.default_rng(0)
    words = np.array(["".join(chr(97 + c) for c in rng.integers(0, 26, rng.integers(2, 9))) for _ in range(5000)])
    with open(path, "w") as f:
        for _ in range(characters // 6_000):
            f.write(" ".join(words[rng.integers(0, 5000, 1000)]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    shapes = {"cpu demo": (16, 128), "nanoGPT cpu": (12, 64), "124M on one chip": (512, 1024)}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "text.txt"
        text(source, 12_000_000)
        tokenizer, shards = prepare(str(source), "bpe:2048", Path(folder) / "data", progress=False)
        train = shards["train"]
        flat = np.memmap(next(iter(sorted((Path(folder) / "data").glob("train-*.bin")))), np.uint16, "r")
        results = {}
        for name, (rows, context) in shapes.items():
            n = max(20, 2_000_000 // (rows * context))
            batches = lm.LmBatches(
                lm.Windows(train, context, 0), lambda t, rows=rows: (t * rows, rows),
                byte_lengths=tokenizer.byte_lengths, eot_id=tokenizer.eot_id,
            )  # fmt: skip
            ours, bare = [], []
            for _ in range(5):
                began = time.perf_counter()
                for _ in lm.iterate(batches, 0, n):
                    pass
                ours.append(n * rows * context / (time.perf_counter() - began))
                rng = np.random.default_rng(0)
                began = time.perf_counter()
                for _ in range(n):
                    starts = rng.integers(0, len(flat) - context - 1, rows)
                    flat[starts[:, None] + np.arange(context + 1)].astype(np.int32)
                bare.append(n * rows * context / (time.perf_counter() - began))
            results[name] = {
                "batch": [rows, context],
                "tokens_per_second": statistics.median(ours),
                "bare_memmap_tokens_per_second": statistics.median(bare),
                "ratio_quartiles": quartiles(o / b for o, b in zip(ours, bare, strict=True)),
            }
    if args.json:
        print(json.dumps({"benchmark": "loader", **results}))
        return
    for name, r in results.items():
        print(
            f"{name:<18}{r['tokens_per_second'] / 1e6:8.1f} M tokens/s, {r['ratio_quartiles'][1]:.2f} of a bare memmap"
        )


if __name__ == "__main__":
    main()
