"""What takes the time of the parts between: an iteration of PPO by phase, and attention by path."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from experiments.benchmarks._peer import quartiles
from experiments.benchmarks.gpu.common import Scale, half, in_turns, some_segments
from experiments.benchmarks.ppo_cpu import Ours
from gptjax.model.attention import attention, resolve
from gptjax.model.flops import visible_pairs


def ppo(scale: Scale, name: str) -> dict:
    """Four models of that size; 4 epochs x 1 minibatch. bfloat16, or float32 where there is none."""
    model, compute = scale.decode[name], half(jax.devices()[0])
    dtype = jnp.float32 if compute.scaled else compute.dtype
    model = dataclasses.replace(model, vocab_size=model.vocab_size + 1)
    ours = Ours(model, scale.prompt, scale.response, scale.episodes, microbatch=scale.microbatch, dtype=dtype)
    for _ in range(2):
        ours.iterate()
    rounds = [ours.iterate() for _ in range(scale.rounds)]
    of = {k: quartiles([r[k] for r in rounds]) for k in ("seconds", "rollout", "score", "update")}
    return {
        "episodes": scale.episodes, "prompt": scale.prompt, "response": scale.response, "epochs": 4, **of,
        "microbatch": scale.microbatch, "dtype": jnp.dtype(dtype).name,
        "samples_per_second": scale.episodes / of["seconds"][1],
    }  # fmt: skip


def paths(scale: Scale) -> dict:
    """Milliseconds of forward and backward pass: the platform's own path beside XLA's, in turns. TFLOP/s count what the
    mask leaves, without the backward pass's recomputation; documents are counted as if they were one."""
    dtype, result = half(jax.devices()[0]).dtype, {"own": resolve("auto", jax.default_backend())}
    for what, (rows, time, n_head, width, window, packed) in scale.attention.items():
        keys = jax.random.split(jax.random.key(0), 3)
        q, k, v = (jax.random.normal(key, (rows, time, n_head, width), dtype) for key in keys)
        segments = some_segments(rows, time) if packed else None

        def both(path, q, k, v, window=window, segments=segments):
            f = lambda *a: attention(*a, path=path, window=window, segment_ids=segments)
            out, pull = jax.vjp(f, q, k, v)
            return pull(out)

        sides = {name: functools.partial(jax.jit(functools.partial(both, path)), q, k, v)
                 for name, path in (("own", "auto"), ("xla", "xla"))}  # fmt: skip
        seconds = in_turns(sides, scale.rounds, 10)
        flops = 3 * 4 * rows * n_head * width * visible_pairs(time, window)
        result[what] = {
            name: {"ms_quartiles": [1e3 * s for s in of], "tflops": flops / of[1] / 1e12}
            for name, of in seconds.items()
        } | {"times_xla": seconds["xla"][1] / seconds["own"][1]}
    return result
