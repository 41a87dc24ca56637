"""results.jsonl as README.md's table and as a picture.

python -m experiments.tpu_fit.plot [--results=FILE]        prints the table, writes bytes.png
"""

from pathlib import Path

from absl import app, flags

from experiments.tpu_fit.run import BATCH, HERE, read

FLAGS = flags.FLAGS


def table(rows: list[dict]) -> str:
    lines = [
        "| preset | smallest slice | mesh | remat | rows x micro-batches | ours: state | ours: all | "
        "compiler: arguments | compiler: peak | of HBM | sent a step | bound by | MFU bound | compiled in |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    gib = lambda n: f"{n / 2**30:.2f}"
    for r in rows:
        if not r["fits"]:
            lines.append(f"| {r['preset']} | none of {r['generation']} |" + " |" * 12)
            continue
        s, b, o = r["settings"], r["bounds"], r["ours_per_chip"]
        serial = b["mfu_without_overlap"] * b["mfu_bound_causal"] / b["mfu_bound"]
        mesh = " x ".join(f"{k} {v}" for k, v in r["mesh"].items() if v > 1) or "one chip"
        lines.append(
            f"| {r['preset']} | {r['topology']} ({r['chips']}) | {mesh} | {s['model.remat']} | "
            f"{s['microbatch_size']} x {s['batch_size'] // s['microbatch_size']} | "
            f"{gib(o['params'] + o['optimizer'])} | "
            f"{gib(sum(o.values()))} | {gib(r['argument_bytes_per_chip'])} | {gib(r['bytes_per_chip'])} | "
            f"{r['bytes_per_chip'] / r['hbm_per_chip']:.0%} | {gib(r['collective_bytes_per_chip'])} | {b['binding']} | "
            f"{b['mfu_bound_causal']:.0%} / {serial:.0%} | {r['compile_seconds']:.0f} s |"
        )
    return "\n".join(lines)


def picture(rows: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["fits"]]
    figure, axis = plt.subplots(figsize=(10, 4.5))
    x = range(len(rows))
    share = lambda key: [key(r) / r["hbm_per_chip"] for r in rows]
    axis.bar([i - 0.2 for i in x], share(lambda r: r["bytes_per_chip"]), 0.4, label="the compiler's peak")
    axis.bar([i + 0.2 for i in x], share(lambda r: sum(r["ours_per_chip"].values())), 0.4,
             label="ours: state, gradients, kept for the backward pass")  # fmt: skip
    axis.axhline(1, color="black", lw=0.8)
    axis.set_xticks(x, [f"{r['preset']}\n{r['topology']}" for r in rows], rotation=60, ha="right", fontsize=7)
    axis.set(ylabel="of a chip's HBM", title="The smallest slice each preset trains on, at its paper's batch size")
    axis.set_ylim(0, 1.25)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(_):
    order = {preset: i for i, preset in enumerate(BATCH)}
    rows = sorted(read(Path(FLAGS.results)), key=lambda r: (r["generation"], order[r["preset"]]))
    print(table(rows))
    picture(rows, HERE / "bytes.png")


if __name__ == "__main__":
    flags.DEFINE_string("results", str(HERE / "results.jsonl"), "What run.py wrote.")
    app.run(main)
