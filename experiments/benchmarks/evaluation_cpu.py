"""Evaluation beside lm-evaluation-harness's own model class for transformers: the same weights, the same requests, the
same run.

    python -m experiments.benchmarks.evaluation_cpu [--shots=0,5] [--rounds=5] [--layers=12] [--json]

GPT-2's shape of 124M (12 layers, 768 wide, 50,257 logits), random weights, float32; four-choice questions of real
lengths: 18 to 32 words and choices of 1 to 8 words, from Python's reference manual, and with 5 examples before them,
drawn anew for each question, as the harness draws them. Both sides are given lm-evaluation-harness's requests,
text and all, and answer with log-likelihoods; the harness's side has the batch size that is fastest for it. Needs
lm-eval, torch and transformers (make bench makes an environment that has them).
"""

import argparse
import contextlib
import functools
import os
import sys
import tempfile
import time

import numpy as np

from experiments.benchmarks._peer import Peer, finish, interleaved, quartiles, serve

ITEMS = {0: 8, 5: 2}  # questions a round
BATCH_SIZES = (4, 16)
SHAPE = dict(vocab_size=50257, n_head=12, d_model=768, context_length=1024)


def requests(shots: int):
    """(context, continuation) of each choice of each question, as lm-evaluation-harness asks for them."""
    rng = np.random.default_rng(shots)
    words = manual()

    def text(low, high):
        start = rng.integers(0, len(words) - high)
        return " ".join(words[start : start + rng.integers(low, high + 1)])

    def question():
        return f"Question: {text(18, 32)}?\nAnswer:", [text(1, 8) for _ in range(4)]

    found = []
    for _ in range(ITEMS[shots]):
        examples = [(context, choices[0]) for context, choices in (question() for _ in range(shots))]
        before = "".join(f"{context} {choice}\n\n" for context, choice in examples)
        context, choices = question()
        found += [(before + context, f" {choice}") for choice in choices]
    return found


@functools.cache
def manual() -> list[str]:
    """The words of Python's reference manual."""
    from pydoc_data.topics import topics

    return " ".join(topics.values()).split()


def instances(shots: int):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(requests(shots))]


def serve_hf(directory: str):
    import torch
    import transformers
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.logging.set_verbosity_error()
    model = HFLM(pretrained=f"{directory}/hf", dtype="float32", device="cpu", batch_size=1)
    asked = {shots: instances(shots) for shots in ITEMS}

    def work(line):
        shots, model.batch_size_per_gpu = map(int, line.split())
        return {"log_probs": [v for v, _ in model.loglikelihood(asked[shots], disable_tqdm=True)]}

    serve({"about": f"transformers {transformers.__version__}, torch {torch.__version__}"}, work)


def serve_gptjax(directory: str):
    import jax

    from gptjax.lm_eval.adapter import GPTJAX

    model = GPTJAX(f"{directory}/run")
    asked = {shots: instances(shots) for shots in ITEMS}

    def work(line):
        return {"log_probs": [v for v, _ in model.loglikelihood(asked[int(line.split()[0])])]}

    serve({"about": f"jax {jax.__version__}"}, work)


def export(directory: str, layers: int):
    """Random weights and a tokenizer, as Hugging Face's files (hf) and as a workdir (run)."""
    import jax

    from gptjax import convert
    from gptjax.data.bpe import train_bpe
    from gptjax.interop.huggingface import write
    from gptjax.model import gpt
    from gptjax.model.spec import GPTConfig

    tokenizer = train_bpe([" ".join(manual())], 8192)
    config = GPTConfig(**SHAPE, n_layer=layers)
    write(f"{directory}/hf", config, jax.jit(lambda key: gpt.init(config, key))(jax.random.key(0)), tokenizer)
    convert.import_weights(f"{directory}/hf", f"{directory}/run")
    return {f"{shots} shots": lengths(tokenizer, shots) for shots in ITEMS}


def lengths(tokenizer, shots: int) -> dict:
    pairs = requests(shots)
    tokens = [(len(tokenizer.encode(context)), len(tokenizer.encode(choice))) for context, choice in pairs]
    context, choice = np.mean(tokens, axis=0)
    return {"items": ITEMS[shots], "tokens of a context": float(context), "of a choice": float(choice)}


def fastest(peer: Peer, shots: int) -> int:
    """The batch size with which the harness's side is quickest."""
    seconds = {}
    for size in BATCH_SIZES:
        seconds[size] = peer.iterate(f"{shots} {size}")["seconds"]
        print(f"{shots} shots, batch size {size}: {seconds[size]:.2f} s", file=sys.stderr)
    return min(seconds, key=seconds.get)


def measure(sides: dict[str, Peer], shots: int, rounds: int) -> dict:
    size = fastest(sides["lm-eval hf"], shots)
    interleaved(sides, 1, f"{shots} {size}")  # compiled, pages touched
    answers = interleaved(sides, rounds, f"{shots} {size}")
    seconds = {side: [a["seconds"] for a in found] for side, found in answers.items()}
    ours, theirs = (np.array(answers[side][0]["log_probs"]) for side in ("gptjax", "lm-eval hf"))
    return {
        "ratio_quartiles": quartiles(t / g for t, g in zip(seconds["lm-eval hf"], seconds["gptjax"], strict=True)),
        "items_per_second": {side: ITEMS[shots] / quartiles(values)[1] for side, values in seconds.items()},
        "batch_size_of_hf": size,
        "largest_relative_difference": float(np.abs(ours / theirs - 1).max()),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shots", default="0,5")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=["hf", "gptjax"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if args.serve:
        return {"hf": serve_hf, "gptjax": serve_gptjax}[args.serve](args.weights)

    began, load = time.time(), os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result
            shape = export(directory, args.layers)
        command = (sys.executable, "-m", "experiments.benchmarks.evaluation_cpu", f"--weights={directory}")
        names = {"lm-eval hf": "hf", "gptjax": "gptjax"}
        sides = {side: Peer(*command, f"--serve={name}") for side, name in names.items()}
        about = {**SHAPE, "n_layer": args.layers, "dtype": "float32"}
        result = {"benchmark": "evaluation_cpu", "model": about, **shape}
        for shots in map(int, args.shots.split(",")):
            result[f"{shots} shots"] |= measure(sides, shots, args.rounds)
        result |= {"load_before": load, "minutes": (time.time() - began) / 60}
        finish(result, sides, args.json, summary)


def summary(result: dict) -> list[str]:
    lines = []
    for name, r in result.items():
        if name.endswith("shots") and "ratio_quartiles" in r:
            low, middle, high = r["ratio_quartiles"]
            lines.append(
                f"{name}: {middle:.2f}x lm-eval hf at batch size {r['batch_size_of_hf']} (quartiles {low:.2f}-"
                f"{high:.2f}); {r['items_per_second']['gptjax']:.2f} items/s; log-probabilities differ by at most "
                f"{r['largest_relative_difference']:.1e} of their size"
            )
    return lines


if __name__ == "__main__":
    main()
