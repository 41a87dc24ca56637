"""Decoding in 16 bits beside reading weights and cache once a token at the data sheet's bandwidth, and beside torch."""

import functools

import jax
import numpy as np

from experiments.benchmarks._peer import quartiles
from experiments.benchmarks.gpu.common import Scale, half, seconds_of
from gptjax.generation.decode import Decoder, Stop, decode
from gptjax.generation.sampling import Sampling
from gptjax.generation.speed import bytes_per_token
from gptjax.hardware import memory_bandwidth
from gptjax.model import gpt
from gptjax.training.precision import frozen


def run(scale: Scale, name: str, torch=None) -> dict:
    """Greedy, prompt and prefill included; torch: the Peer of torch_peer.py, or None."""
    model, dtype = scale.decode[name], half(jax.devices()[0]).dtype
    bandwidth = memory_bandwidth(jax.devices()[0].device_kind)
    params = jax.jit(lambda k: frozen(gpt.init(model, k), dtype))(jax.random.key(0))
    result = {"prompt": scale.prompt, "new_tokens": scale.new_tokens, "dtype": np.dtype(dtype).name}
    for batch in scale.batches:
        prompts = np.random.default_rng(0).integers(0, model.vocab_size, (batch, scale.prompt), dtype=np.int32)
        full, limits = np.full(batch, scale.prompt, np.int32), np.full(batch, scale.new_tokens)
        run = functools.partial(
            decode, params, Decoder(model, dtype=dtype), prompts, full, limits,
            jax.random.split(jax.random.key(0), batch), Stop(scale.new_tokens), Sampling(0.0),
        )  # fmt: skip
        seconds_of(run, 2)
        if torch:
            torch.iterate(f"decode {batch} {scale.prompt} {scale.new_tokens}")
        ours, theirs = [], []
        for _ in range(scale.rounds):
            ours.append(seconds_of(run))
            if torch:
                theirs.append(torch.iterate(f"decode {batch} {scale.prompt} {scale.new_tokens}")["of_one"])
        tokens = batch * scale.new_tokens
        bound = bandwidth and batch * bandwidth / bytes_per_token(
            params, model, batch, scale.prompt + scale.new_tokens / 2, dtype
        )
        speed = tokens / quartiles(ours)[1]
        of = {"seconds_quartiles": quartiles(ours), "tokens_per_second": speed, "bound_tokens_per_second": bound,
              "share_of_bound": bound and speed / bound}  # fmt: skip
        if torch:
            of["torch"] = {"seconds_quartiles": quartiles(theirs), "about": torch.about}
            of["ratio_quartiles"] = quartiles([t / o for t, o in zip(theirs, ours, strict=True)])
        result[f"batch {batch}"] = of
    return result
