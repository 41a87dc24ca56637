"""What a step costs in Python, and how compile time grows with depth.

    python -m experiments.benchmarks.dispatch [--json]

The dispatch time is what the loop pays before the next line of Python runs: the call returns while the device
computes. The model is 12 layers of width 32, so that the device is never far behind.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from experiments.benchmarks.setup import as_batch, make_step, random_tokens
from gptjax.model.spec import GPTConfig
from gptjax.training.supervised import Dispatch


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    batch, rates = as_batch(random_tokens(64, 2, 16)), np.array([1e-3], np.float32)
    compile_seconds = {}
    for layers in (2, 12, 48):
        model = GPTConfig(64, layers, 2, 32, 16, attention="reference")
        state, step = make_step(model)
        jax.config.update("jax_enable_compilation_cache", False)
        began = time.perf_counter()
        step.lower(state, batch, rates).compile()
        compile_seconds[layers] = time.perf_counter() - began
    state, step = make_step(GPTConfig(64, 12, 2, 32, 16, attention="reference"))
    dispatch = Dispatch(step, say=lambda _: None)
    device_batch = jax.tree.map(jax.numpy.asarray, batch)
    seconds = []
    for _ in range(200):
        began = time.perf_counter()
        state, metrics = dispatch(state, device_batch, rates)
        seconds.append(time.perf_counter() - began)
        jax.block_until_ready(metrics)
    result = {
        "benchmark": "dispatch",
        "python_ms_per_step_12_layers": 1e3 * statistics.median(seconds),
        "trace_and_compile_seconds_by_layers": compile_seconds,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"dispatch: {result['python_ms_per_step_12_layers']:.2f} ms of Python per step at 12 layers")
    print("compile: " + ", ".join(f"{n} layers {s:.1f} s" for n, s in compile_seconds.items()))


if __name__ == "__main__":
    main()
