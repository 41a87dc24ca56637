"""Every benchmark that a CPU can run, one after the other, beside its peer: a JSON file and a picture.

    make bench      # or: python -m experiments.benchmarks --trl_python=.venv-trl/bin/python --output=DIR

A ratio above 1 means that gptjax is the faster one; its bar is the spread, from the lower to the upper quartile over
rounds that went A B A B. Nothing else should compute meanwhile.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent
# name -> (module, its flags, {what the picture calls a ratio: (where its quartiles are in the JSON, the bar)})
BENCHMARKS = {
    "train step": ("pretrain_cpu", (), {"train step": (("ratio_quartiles",), 1.25)}),
    "evaluation": ("pretrain_cpu", ("--phase=evaluate",), {"evaluation": (("ratio_quartiles",), None)}),
    "few-shot evaluation": ("evaluation_cpu", (), {
        "zero-shot evaluation": (("0 shots", "ratio_quartiles"), 2.0),
        "5-shot evaluation": (("5 shots", "ratio_quartiles"), 4.0),
    }),
    "decode": ("decode_cpu", (), {
        "decode, batch 1": (("batch 1", "ratio_quartiles"), 2.0),
        "decode, batch 16": (("batch 16", "ratio_quartiles"), 2.0),
    }),
    "checkpoint": ("checkpoint_cpu", (), {
        "checkpoint, what a step waits": (("blocked", "ratio_quartiles"), None),
        "checkpoint, on disk": (("saved", "ratio_quartiles"), None),
        "checkpoint, restored": (("restored", "ratio_quartiles"), None),
    }),
    "loader": ("loader", (), {"loader / bare memmap, [512, 1024]": (("124M on one chip", "ratio_quartiles"), None)}),
    "PPO iteration": ("ppo_cpu", (), {"PPO iteration": (("ratio",), 3.0)}),
}  # fmt: skip
PEERS = {
    "few-shot evaluation": "lm-evaluation-harness's own model for transformers",
    "train step": "Hugging Face on torch eager", "evaluation": "Hugging Face on torch eager",
    "decode": "transformers.generate", "checkpoint": "torch.save, torch.load", "loader": "a bare memmap",
    "PPO iteration": "TRL 0.12.2",
}  # fmt: skip


def run(name: str, trl_python: str | None) -> dict:
    module, flags, *_ = BENCHMARKS[name]
    if module == "ppo_cpu":
        flags = (f"--trl_python={trl_python}",)
    else:
        flags = (*flags, "--json")
    command = [sys.executable, "-m", f"experiments.benchmarks.{module}", *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with status {done.returncode}: see its message above")
    return json.loads(done.stdout)


def ratios(results: dict) -> list[tuple[str, str, list[float], float | None]]:
    """(what, peer, quartiles of the ratio, the bar) of each measured ratio."""
    found = []
    for name, (_, _, places) in BENCHMARKS.items():
        if name not in results:
            continue
        for what, (path, bar) in places.items():
            value = results[name]
            for key in path:
                value = value[key]
            found.append((what, PEERS[name], value, bar))
    return found


def plot(results: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = ratios(results)[::-1]
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.45 * len(rows)), constrained_layout=True)
    for i, (_, _, (low, middle, high), bar) in enumerate(rows):
        axis.barh(i, middle, color="#3b6fb6" if middle >= 1 else "#d1495b", height=0.6)
        axis.errorbar(middle, i, xerr=[[middle - low], [high - middle]], color="black", capsize=3, lw=1)
        axis.text(max(high, bar or 0) + 0.05, i, f"{middle:.2f}×", va="center", fontsize=9)
        if bar:
            axis.plot([bar, bar], [i - 0.4, i + 0.4], color="black", ls=":", lw=1.5)
    axis.set_yticks(range(len(rows)), [f"{what}\nbeside {peer}" for what, peer, *_ in rows], fontsize=8)
    axis.axvline(1, color="gray", lw=1)
    axis.set_xlabel("times as fast as the peer; whiskers: quartiles over rounds; dotted: the bar", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl_python", help="Python of an environment with requirements-trl.txt; none = no PPO")
    parser.add_argument("--output", default=str(HERE / "results"), help="folder of cpu.json and cpu.png")
    parser.add_argument("--only", help="comma-separated: " + ", ".join(BENCHMARKS))
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(BENCHMARKS)
    if wrong := [n for n in names if n not in BENCHMARKS]:
        parser.error(f"there is no benchmark {wrong[0]!r}: choose of {', '.join(BENCHMARKS)}")
    if not args.trl_python:
        names = [n for n in names if n != "PPO iteration"]
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "cpu.json"
    results = json.loads(path.read_text()) if args.only and path.exists() else {}
    for name in (bar := tqdm(names, unit="benchmark")):
        bar.set_postfix_str(name)
        results[name] = run(name, args.trl_python)
        path.write_text(json.dumps(results, indent=1) + "\n")
    plot(results, output / "cpu.png")
    for what, peer, (low, middle, high), goal in ratios(results):
        goal = f"; the bar is {goal:.2f}" if goal else ""
        print(f"{what:<36}{middle:6.2f}x {peer} (quartiles {low:.2f}-{high:.2f}{goal})")
    print(f"{path}, {output / 'cpu.png'}")


if __name__ == "__main__":
    main()
