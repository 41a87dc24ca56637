"""Decoding beside transformers.generate: the same weights, the same greedy text, the same run.

    python -m experiments.benchmarks.decode_cpu [--batch=1,16] [--rounds=7] [--json]

GPT-2 of 6 layers, 384 wide, vocabulary 8,192; prompts of 32 tokens, 128 new ones; float32. Needs torch and
transformers (make bench makes an environment that has them). The bound is reading every parameter and the filled part
of the KV cache once a token, at the speed of a large matrix-vector product.
"""

import argparse
import os
import sys
import tempfile
import time

import numpy as np

from experiments.benchmarks._peer import Peer, finish, interleaved, quartiles, read_speed, serve

PROMPT, NEW = 32, 128
SHAPE = dict(vocab_size=8192, n_layer=6, n_head=6, d_model=384, context_length=256)


def prompts(batch: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (batch, PROMPT), dtype=np.int32)


def serve_torch(directory: str):
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    model.generation_config.pad_token_id = 0

    def work(line):
        ids = torch.from_numpy(prompts(int(line))).long()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW
            )
        return {"tokens": out[:, PROMPT:].tolist()}

    serve({"about": f"transformers {transformers.__version__}, torch {torch.__version__}"}, work)


def serve_gptjax(directory: str):
    import jax

    from gptjax.generation.decode import Decoder, Stop, decode
    from gptjax.generation.sampling import Sampling
    from gptjax.model import gpt

    config = model_config()
    params = jax.jit(lambda key: gpt.init(config, key))(jax.random.key(0))
    keys = lambda batch: jax.random.split(jax.random.key(0), batch)

    def work(line):
        batch = int(line)
        full = np.full(batch, PROMPT, np.int32)
        out, *_ = decode(
            params, Decoder(config), prompts(batch), full, np.full(batch, NEW), keys(batch), Stop(NEW), Sampling(0.0)
        )
        return {"tokens": np.asarray(out).tolist()}

    serve({"about": f"jax {jax.__version__}"}, work)


def model_config():
    from gptjax.model.spec import GPTConfig

    return GPTConfig(**SHAPE, attention="cpu")


def export(directory: str):
    """The weights that serve_gptjax has, as Hugging Face's files."""
    import jax

    from gptjax.interop.huggingface import write
    from gptjax.model import gpt

    config = model_config()
    write(directory, config, jax.jit(lambda key: gpt.init(config, key))(jax.random.key(0)))


def bound(batch: int, bytes_per_second: float) -> float:
    """Tokens/s of all rows, if nothing but weights (once for all rows) and each row's keys and values were read."""
    import jax

    from gptjax.generation.speed import bytes_per_token
    from gptjax.model import gpt

    config = model_config()
    shapes = jax.eval_shape(lambda key: gpt.init(config, key), jax.random.key(0))
    return batch * bytes_per_second / bytes_per_token(shapes, config, batch, PROMPT + NEW / 2, np.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=["torch", "gptjax"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.serve:
        return {"torch": serve_torch, "gptjax": serve_gptjax}[args.serve](args.weights)

    with tempfile.TemporaryDirectory() as directory:
        export(directory)
        sides = {
            side: Peer(sys.executable, "-m", "experiments.benchmarks.decode_cpu", f"--serve={side}",
                       f"--weights={directory}")
            for side in ("torch", "gptjax")
        }  # fmt: skip
    result = {"benchmark": "decode_cpu", "model": {**SHAPE, "prompt": PROMPT, "new_tokens": NEW, "dtype": "float32"}}
    speed = read_speed()
    for batch in map(int, args.batch.split(",")):
        interleaved(sides, 2, str(batch))  # warm: compiled, pages touched
        time.sleep(0.5)
        answers = interleaved(sides, args.rounds, str(batch))
        same = np.array(answers["torch"][0]["tokens"]) == np.array(answers["gptjax"][0]["tokens"])
        per_second = {side: [batch * NEW / a["seconds"] for a in of] for side, of in answers.items()}
        ratios = [g / t for g, t in zip(per_second["gptjax"], per_second["torch"], strict=True)]
        result[f"batch {batch}"] = {
            "ratio_quartiles": quartiles(ratios),
            "tokens_per_second": {side: quartiles(v)[1] for side, v in per_second.items()},
            "bound_tokens_per_second": bound(batch, speed),
            "share_of_bound": quartiles(per_second["gptjax"])[1] / bound(batch, speed),
            "same_tokens": float(same.mean()),
        }
    finish(result | {"read_bytes_per_second": speed}, sides, args.json, summary)


def summary(result: dict) -> list[str]:
    lines = []
    for name, r in result.items():
        if name.startswith("batch"):
            low, middle, high = r["ratio_quartiles"]
            lines.append(
                f"{name}: {middle:.2f}x transformers.generate (quartiles {low:.2f}-{high:.2f}); "
                f"{r['tokens_per_second']['gptjax']:,.0f} tokens/s, {100 * r['share_of_bound']:.0f} % of the bound; "
                f"{100 * r['same_tokens']:.0f} % of the tokens are the same"
            )
    return lines


if __name__ == "__main__":
    main()
