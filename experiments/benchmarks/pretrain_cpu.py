"""Training throughput beside Hugging Face/torch eager: the same GPT, the same machine, the same run.

    python -m experiments.benchmarks.pretrain_cpu [--phase=train] [--vocab=65] [--rounds=7] [--steps=5] [--json]

Needs torch and transformers (make bench makes an environment that has them). Each side lives in a process of
its own that sleeps while the other works; rounds alternate A B A B. The model is 6 layers, 384 wide, context
256, batch 12, float32, AdamW with clipping. The ratio is tokens/s of gptjax over torch, its spread the
quartiles over rounds. The floor is what the matmuls alone need at the speed of one large matmul.
"""

import argparse
import json
import os
import statistics
import sys

from experiments.benchmarks._peer import Peer, interleaved, machine, matmul_speed, quartiles, serve

SHAPE = dict(n_layer=6, n_head=6, d_model=384, context_length=256)
BATCH = 12


def make_torch(vocab, phase):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from experiments.benchmarks.setup import random_tokens

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocab, n_positions=SHAPE["context_length"], n_embd=SHAPE["d_model"], n_layer=SHAPE["n_layer"],
        n_head=SHAPE["n_head"], bos_token_id=None, eos_token_id=None, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    tokens = torch.from_numpy(random_tokens(vocab, BATCH, SHAPE["context_length"])).long()
    batch = tokens[:, :-1]  # the model shifts the labels itself

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss

    def evaluate():
        with torch.inference_mode():
            return model(batch, labels=batch).loss

    return (
        (evaluate if phase == "evaluate" else step),
        lambda loss: loss.item(),
        f"torch {torch.__version__}, {torch.get_num_threads()} threads",
    )


def make_gptjax(vocab, phase):
    import jax
    import numpy as np

    from experiments.benchmarks.setup import as_batch, make_step, random_tokens
    from gptjax.model.spec import GPTConfig
    from gptjax.objectives.lm import causal_lm_loss
    from gptjax.parallel.mesh import MeshConfig, make_mesh
    from gptjax.training.step import jit_eval_step

    model = GPTConfig(vocab, **SHAPE, attention="cpu")
    state, run = make_step(model)
    batch = as_batch(random_tokens(vocab, BATCH, SHAPE["context_length"]))
    rates = np.array([1e-3], np.float32)

    def step():
        nonlocal state
        state, metrics = run(state, batch, rates)
        return metrics

    read = lambda m: float(m["loss_sum"][0] / m["count"][0])
    if phase == "evaluate":
        loss = jit_eval_step(causal_lm_loss(model, np.float32, 128), make_mesh(MeshConfig()))
        one = {k: a[0, 0] for k, a in batch.items()}
        return lambda: loss(state.params, one), lambda m: float(m[0] / m[1]), f"jax {jax.__version__}"
    return step, read, f"jax {jax.__version__}"


def serve_side(side, vocab, phase):
    """Makes the step, warms it up, then runs as many steps as each line says."""
    step, read, about = {"torch": make_torch, "gptjax": make_gptjax}[side](vocab, phase)
    for _ in range(3):
        read(step())

    def work(line):
        for _ in range(int(line)):
            out = step()
        return {"loss": read(out)}

    serve({"about": about}, work)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=65)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="steps per round and side")
    parser.add_argument("--phase", choices=["train", "evaluate"], default="train")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", choices=["torch", "gptjax"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.serve:
        return serve_side(args.serve, args.vocab, args.phase)

    from gptjax.model.flops import flops_per_token
    from gptjax.model.spec import GPTConfig

    peak = matmul_speed()
    sides = {
        side: Peer(
            sys.executable, "-m", "experiments.benchmarks.pretrain_cpu", f"--serve={side}",
            f"--vocab={args.vocab}", f"--phase={args.phase}",
        )
        for side in ("torch", "gptjax")
    }  # fmt: skip
    answers = interleaved(sides, args.rounds, str(args.steps))
    per_round = args.steps * BATCH * SHAPE["context_length"]
    speeds = {side: [per_round / a["seconds"] for a in of] for side, of in answers.items()}
    ratios = [g / t for g, t in zip(speeds["gptjax"], speeds["torch"], strict=True)]
    losses = {side: of[-1]["loss"] for side, of in answers.items()}
    abouts = {side: peer.about["about"] for side, peer in sides.items()}
    for peer in sides.values():
        peer.close()
    low, middle, high = quartiles(ratios)
    flops = flops_per_token(GPTConfig(args.vocab, **SHAPE)).causal / (3 if args.phase == "evaluate" else 1)
    result = {
        "benchmark": "pretrain_cpu",
        "phase": args.phase,
        "model": {**SHAPE, "vocab_size": args.vocab, "batch": BATCH, "dtype": "float32"},
        "ratio_quartiles": [low, middle, high],
        "ratios": ratios,
        "tokens_per_second": {side: statistics.median(s) for side, s in speeds.items()},
        "floor": {
            "flops_per_token": flops,
            "matmul_flops_per_second": peak,
            "tokens_per_second_at_matmul_speed": peak / flops,
            "share_reached": statistics.median(speeds["gptjax"]) * flops / peak,
        },
        "last_loss": losses,
        "versions": abouts,
        "machine": machine(),
    }
    if args.json:
        print(json.dumps(result))
        return
    print(f"gptjax / torch eager: {middle:.2f}x (quartiles {low:.2f}-{high:.2f})")
    for side, speed in result["tokens_per_second"].items():
        print(f"  {side:<8}{speed:>8,.0f} tokens/s   {abouts[side]}")
    floor = result["floor"]
    print(
        f"  floor   {floor['tokens_per_second_at_matmul_speed']:>8,.0f} tokens/s if every FLOP ran at matmul speed "
        f"({peak / 1e9:,.0f} GFLOP/s); gptjax reaches {100 * floor['share_reached']:.0f} %"
    )


if __name__ == "__main__":
    main()
