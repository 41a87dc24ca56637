"""Scaling on paper: what bounds 175B's step on v5p slices of 256 to 4,096 chips, by closed formulas.

    python -m experiments.tpu_fit.scaling        writes scaling.jsonl and scaling.png

Symbols: N matrices' parameters, L layers, d width, T context, V vocabulary, f = fsdp, t = tensor = 8, r rows of a
micro-batch on one group of t chips, M micro-batches, C chips = f t. One step, one chip:

    compute  (causal FLOPs + those of full remat) tokens / C / 459e12
    hbm      (24 N/C + M (8 N/C + 3 * 2 N/t + 2 * 2 r T d L/t)) / 2,765e9        bounds.train_bytes
    fsdp     M (f-1)/f (3 * 2 + 4) N/t      16-bit matrices gathered forward, again under remat, and backward;
                                            float32 gradients reduced and scattered
    tensor   M L 12 * 2 r T d (t-1)/t       4 gathers or scatters of the residual stream a layer, three times
    ici      (fsdp + tensor) / 600e9        every link busy, one way

The bound is the longest of the three; without overlap it is their sum. compiled.jsonl holds aot's answers for the same
model, in the plot as crosses. Strong: 1,536 sequences of 2,048 (3.1M
tokens) whatever the slice; weak: 3 sequences a chip. r is the largest divisor of a group's rows up to 16.
"""

import dataclasses
from pathlib import Path

from gptjax import json_files
from gptjax.cost.roofline import bounds, train_work
from gptjax.cost.topology import CHIPS
from gptjax.model.spec import GPT3, non_embedding_count, parameter_count

HERE = Path(__file__).parent
MODEL = dataclasses.replace(GPT3["175b"], remat="full")
CHIP_COUNTS = (256, 512, 1024, 2048, 4096)
TENSOR, MOST_ROWS = 8, 16


def sent(c, *, fsdp: int, tensor: int, rows: int, micro_batches: int) -> dict[str, float]:
    """Bytes that a chip sends in a step, by the mesh axis they go along."""
    matrices = (non_embedding_count(c) + c.vocab_size * c.d_model) / tensor
    passes = 3 if c.remat == "full" else 2
    stream = 2 * rows * c.context_length * c.d_model
    return {
        "fsdp": micro_batches * (2 * passes + 4) * matrices * (fsdp - 1) / fsdp,
        "tensor": micro_batches * c.n_layer * 4 * passes * stream * (tensor - 1) / tensor,
    }


def point(chips: int, sequences: int, tensor: int = TENSOR) -> dict:
    c, fsdp = MODEL, chips // tensor
    group_rows = sequences // fsdp
    rows = max(n for n in range(1, MOST_ROWS + 1) if group_rows % n == 0)
    micro = group_rows // rows
    tokens = fsdp * group_rows * c.context_length
    n = parameter_count(c)
    kept = 2 * rows * c.context_length * c.d_model * c.n_layer / tensor
    work = train_work(
        c, tokens=tokens, devices=chips, micro_batches=micro, ways=tensor, state_bytes=12 * n // chips,
        parameter_bytes=4 * n // chips, kept_bytes=kept,
    )  # fmt: skip
    along = sent(c, fsdp=fsdp, tensor=tensor, rows=rows, micro_batches=micro)
    return {
        "chips": chips, "fsdp": fsdp, "tensor": tensor, "sequences": fsdp * group_rows, "rows": rows,
        "micro_batches": micro, "state_and_kept_bytes": 16 * n / chips + kept, "sent": along,
        **bounds(work, sum(along.values()), 0, CHIPS["v5p"]),
    }  # fmt: skip


def points() -> list[dict]:
    strong = [{"scaling": "strong", **point(chips, 1536)} for chips in CHIP_COUNTS]
    weak = [{"scaling": "weak", **point(chips, 3 * chips)} for chips in CHIP_COUNTS]
    return strong + weak


def compiled() -> list[dict]:
    path = HERE / "compiled.jsonl"
    return json_files.read_json_lines(path) if path.exists() else []


def plot(rows: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharex=True)
    for scaling, marker in (("strong", "o"), ("weak", "s")):
        line = [r for r in rows if r["scaling"] == scaling]
        x = [r["chips"] for r in line]
        axes[0].plot(x, [r["mfu_bound"] for r in line], marker=marker, label=f"{scaling}, all overlapped")
        axes[0].plot(x, [r["mfu_without_overlap"] for r in line], marker=marker, ls="--", label=f"{scaling}, nothing")
        axes[1].plot(x, [r["collective_share"] for r in line], marker=marker, label=scaling)
    for r in compiled():
        axes[0].plot(r["chips"], r["bounds"]["mfu_without_overlap"], "kx")
        axes[1].plot(r["chips"], r["bounds"]["collective_share"], "kx")
        label = f" {r['tokens'] // (2048 * r['micro_rows'])} micro-batches, compiled"
        axes[1].annotate(label, (r["chips"], r["bounds"]["collective_share"]), fontsize=7)
    axes[0].set(xscale="log", ylim=(0, 1), xlabel="v5p chips", ylabel="MFU bound (PaLM's MFU)")
    axes[1].set(ylim=(0, 1), xlabel="v5p chips", ylabel="share of collectives, no overlap")
    axes[0].set_xticks(CHIP_COUNTS, [f"{n:,}" for n in CHIP_COUNTS])
    axes[0].minorticks_off()
    for a in axes:
        a.grid(alpha=0.3)
        a.legend()
    figure.suptitle("GPT-3 175B, tensor 8, full remat: compute, HBM and ICI at data-sheet rates")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main():
    rows = points()
    json_files.write_json_lines(HERE / "scaling.jsonl", rows)
    plot(rows, HERE / "scaling.png")
    for r in rows:
        seconds = ", ".join(f"{k} {v:.2f} s" for k, v in r["seconds"].items())
        print(
            f"{r['scaling']:<7}{r['chips']:>6} chips, {r['micro_batches']} x {r['rows']} rows: {seconds}; MFU "
            f"{r['mfu_bound']:.1%} / {r['mfu_without_overlap']:.1%}, share {r['collective_share']:.1%}"
        )


if __name__ == "__main__":
    main()
