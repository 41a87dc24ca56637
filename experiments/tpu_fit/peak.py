"""Our own count of a step's peak (gptjax/cost/memory.py) beside the TPU compiler's, over models, remat, meshes.

    python -m experiments.tpu_fit.peak [--cases=gpt2:1] [--out=FILE]       asks about what is not in peak.jsonl yet
    python -m experiments.tpu_fit.peak --nocompile                         the table, from the count as it is now

One line of peak.jsonl a case: the settings and the compiler's peak. To have many of them, a compiler is stopped as soon
as it has assigned buffers, before it writes code, and the peak is read off the assignment it dumps; those of
results.jsonl and compiled.jsonl, also in the table, are peak_memory_in_bytes of whole compilations. Where a case was
had both ways they agree to .05 %. tests/test_aot.py holds the count to 10 % of every line.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from absl import app, flags
from tqdm import tqdm

from experiments.tpu_fit.run import HERE, preset_config, read
from gptjax.aot import check
from gptjax.cost import topology as topologies
from gptjax.describe import describe

FLAGS = flags.FLAGS
CASES = [  # preset, slice, remat, rows of a micro-batch, rows of a step, mesh
    ("gpt2:124m", "v5e:1x1", "none", 8, 64, {}),
    ("gpt2:124m", "v5e:1x1", "dots", 8, 8, {}),
    ("gpt2:124m", "v5e:1x1", "dots", 8, 64, {}),
    ("gpt2:124m", "v5e:1x1", "full", 1, 64, {}),
    ("gpt2:124m", "v5e:1x1", "full", 32, 64, {}),
    ("gpt2:124m", "v5e:1x1", "offload", 8, 64, {}),
    ("gpt2:124m", "v5e:2x2", "dots", 32, 64, {"data": 4}),
    ("gpt2:124m", "v5e:2x2", "none", 32, 64, {"fsdp": 4}),
    ("gpt2:124m", "v5e:2x2", "dots", 4, 64, {"fsdp": 4}),
    ("gpt2:124m", "v5e:2x2", "dots", 32, 32, {"fsdp": 4}),
    ("gpt2:124m", "v5e:4x4", "full", 16, 64, {"fsdp": 16}),
    ("gpt2:124m", "v5p:2x2x1", "full", 128, 256, {"fsdp": 4}),
    ("gpt2:355m", "v5e:2x2", "none", 16, 64, {"fsdp": 4}),
    ("gpt2:355m", "v5e:2x2", "full", 64, 64, {"fsdp": 4}),
    ("gpt2:355m", "v5e:2x4", "full", 16, 32, {"data": 2, "fsdp": 2, "tensor": 2}),
    ("gpt2:355m", "v5e:2x2", "full", 32, 64, {"fsdp": 2, "stage": 2}),
    ("gpt2:355m", "v5e:2x2", "dots", 32, 64, {"fsdp": 2, "stage": 2}),
    ("gpt2:355m", "v5p:2x2x1", "full", 32, 64, {"fsdp": 2, "stage": 2, "rounds": 2}),
    ("gpt2:355m", "v5p:2x2x1", "dots", 32, 64, {"stage": 4}),
    ("gpt2:355m", "v5p:2x2x1", "none", 16, 32, {"fsdp": 2, "stage": 2}),
    ("gpt2:774m", "v5e:2x2", "none", 8, 64, {"fsdp": 4}),
    ("gpt2:774m", "v5e:2x2", "dots", 8, 64, {"fsdp": 2, "tensor": 2}),
    ("gpt2:774m", "v5e:2x4", "full", 64, 128, {"fsdp": 8}),
    ("gpt2:774m", "v5e:4x4", "full", 32, 64, {"fsdp": 4, "tensor": 4}),
    ("gpt2:1558m", "v5e:2x4", "full", 32, 64, {"fsdp": 8}),
    ("gpt2:1558m", "v5p:2x2x1", "none", 8, 32, {"fsdp": 4}),
    ("gpt2:1558m", "v5p:2x2x1", "dots", 32, 64, {"fsdp": 4}),
    ("gpt3:350m", "v5e:2x2", "dots", 8, 64, {"fsdp": 2, "seq": 2}),
    ("gpt3:1.3b", "v5p:2x2x1", "none", 32, 128, {"fsdp": 4}),
    ("gpt3:1.3b", "v5p:2x2x1", "full", 64, 128, {"fsdp": 4}),
    ("gpt3:1.3b", "v5p:2x2x2", "offload", 32, 64, {"fsdp": 8}),
    ("gpt3:1.3b", "v5e:2x2", "full", 16, 64, {"fsdp": 2, "tensor": 2}),
    ("gpt3:1.3b", "v5e:4x4", "full", 32, 64, {"fsdp": 16}),
    ("gpt3:1.3b", "v5e:4x4", "dots", 16, 64, {"fsdp": 4, "tensor": 4}),
    ("gpt3:1.3b", "v5e:4x4", "dots", 32, 64, {"fsdp": 8, "seq": 2}),
    ("gpt3:1.3b", "v5p:2x2x4", "full", 64, 128, {"fsdp": 4, "seq": 4}),
    ("gpt3:1.3b", "v5p:2x2x2", "full", 32, 64, {"fsdp": 2, "tensor": 2, "stage": 2}),
    ("gpt3:1.3b", "v5e:4x8", "full", 32, 64, {"fsdp": 32}),
    ("gpt3:760m", "v5e:4x8", "full", 64, 128, {"fsdp": 32}),
    ("gpt2:124m", "v5e:4x8", "dots", 64, 128, {"fsdp": 32}),
    ("gpt3:2.7b", "v5p:2x2x1", "dots", 16, 64, {"fsdp": 4}),
    ("gpt3:2.7b", "v5p:2x2x2", "none", 16, 32, {"fsdp": 4, "tensor": 2}),
    ("gpt3:2.7b", "v5p:2x2x2", "full", 8, 8, {"fsdp": 8}),
    ("gpt3:2.7b", "v5p:2x2x2", "dots", 32, 64, {"fsdp": 4, "stage": 2}),
    ("gpt3:2.7b", "v5e:8x8", "full", 64, 128, {"fsdp": 64}),
    ("gpt3:6.7b", "v5p:2x2x4", "full", 64, 128, {"fsdp": 4, "tensor": 4}),
]


def settings(case) -> dict:
    _, _, remat, rows, batch, axes = case
    axes = {"data": 1, "fsdp": 1} | axes
    rounds = axes.pop("rounds", 1)
    pipeline = {"model.pipeline_virtual_stages": rounds}
    return pipeline | {"model.remat": remat, "microbatch_size": rows, "batch_size": batch} | {
        f"mesh.{k}": v for k, v in axes.items()
    }


def recorded() -> list[tuple[str, str, dict, int]]:
    """(preset, slice, settings, the compiler's peak in bytes) of every line of the three files."""
    lines = [(r["preset"], r["topology"], r["settings"], r["bytes_per_chip"]) for name in ("peak", "results")
             for r in read(HERE / f"{name}.jsonl")]  # fmt: skip
    for r in read(HERE / "compiled.jsonl"):
        mesh = {f"mesh.{k}": v for k, v in r["mesh"].items()}
        rows = {"microbatch_size": r["micro_rows"], "batch_size": r["tokens"] // 2048, "model.remat": "full"}
        lines.append(("gpt3:175b", r["topology"], mesh | rows, r["bytes_per_chip"]))
    return lines


def ours(preset: str, changes: dict) -> int:
    """The count, as describe prints it."""
    return sum(describe(check.changed(preset_config(preset), changes))["peak_per_tpu_chip"].values())


def table() -> str:
    lines = ["| preset | slice | mesh | remat | rows x micro-batches | ours | compiler | ours / compiler |",
             "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for preset, topology, s, peak in recorded():
        rounds = s.get("model.pipeline_virtual_stages", 1)
        mesh = " x ".join(f"{k.removeprefix('mesh.')} {v}" for k, v in s.items() if k.startswith("mesh.") and v > 1)
        mesh = (mesh or "one chip") + (f", {rounds} rounds" if rounds > 1 else "")
        count, rows = ours(preset, s), s["microbatch_size"]
        lines.append(f"| {preset} | {topology} | {mesh} | {s['model.remat']} | {rows} x {s['batch_size'] // rows} | "
                     f"{count / 2**30:.2f} | {peak / 2**30:.2f} | {count / peak:.3f} |")  # fmt: skip
    return "\n".join(lines)


# --- the compiler's buffer assignment -------------------------------------------------------------------------


def assigned_peak(folder: Path, module: str = "jit_steps") -> int | None:
    """Bytes in use when most are, from the dump of a module's buffer assignment; None while it is not there: the
    arguments, and of the temporaries' one allocation what is taken by values alive at the same time."""
    if not list(folder.glob(f"*{module}*memory-usage-report.txt")):
        return None
    spans = {}
    text = next(folder.glob(f"*{module}*live-range.txt")).read_text()
    for name, index, first, last in re.findall(r"^ +(\S+?)\{([\d,]*)\}:(\d+)-(\d+)$", text, re.M):
        spans[name, index] = int(first), int(last)
    arguments, of_temporaries, values = 0, False, []
    for line in next(folder.glob(f"*{module}*optimizations-buffer-assignment.txt")).read_text().splitlines():
        if found := re.match(r"allocation \d+: size (\d+), (.*)", line):
            in_hbm = "color" not in found[2]  # the other colors are memories on the chip
            arguments += int(found[1]) if in_hbm and "parameter" in found[2] else 0
            of_temporaries = in_hbm and "preallocated-temp" in found[2]
        elif of_temporaries and (
            found := re.match(
                r" value: <\d+ (\S+?)(?:\{([\d,]*)\})?(?: \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\)", line
            )
        ):
            values.append((*spans[found[1], found[2] or ""], int(found[4]), int(found[4]) + int(found[3])))

    def in_use(moment: int) -> int:
        total = end = 0
        for start, stop in sorted((a, b) for first, last, a, b in values if first <= moment <= last):
            total, end = total + max(0, stop - max(start, end)), max(end, stop)
        return total

    return arguments + max(in_use(first) for first in {v[0] for v in values})


def ask(arguments: list[str], module: str = "jit_steps", limit: int = 600) -> int:
    """The peak by a compiler in a process of its own, `python -m` these arguments, also of what does not fit."""
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_module_re={module}"}
        log = Path(folder) / "log"
        with log.open("w") as file:
            child = subprocess.Popen([sys.executable, "-m", *arguments], env=env, stdout=file, stderr=file)
        began = time.time()
        try:
            while (peak := assigned_peak(Path(folder), module)) is None:
                if child.poll() is not None or time.time() - began > limit:
                    raise RuntimeError(f"{arguments}: {log.read_text()[-2000:]}")
                time.sleep(2)  # and then the dump is whole
            return peak
        finally:
            child.kill()
            child.wait()


def main(_):
    jax.config.update("jax_platforms", "cpu")
    if FLAGS.one is not None:
        preset, topology = (case := CASES[FLAGS.one])[:2]
        answer = check.check(check.changed(preset_config(preset), settings(case)), topologies.parse(topology))
        print(json.dumps(answer))
        return
    out = Path(FLAGS.out)
    done = [(r["preset"], r["topology"], r["settings"]) for r in read(out)]
    todo = [c for c in CASES if c[0].startswith(FLAGS.cases) and (c[0], c[1], settings(c)) not in done]
    for case in tqdm(todo if FLAGS.compile else [], file=sys.stderr, dynamic_ncols=True):
        peak = ask(["experiments.tpu_fit.peak", f"--one={CASES.index(case)}"])
        row = {"preset": case[0], "topology": case[1], "settings": settings(case), "bytes_per_chip": peak}
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table())


if __name__ == "__main__":
    flags.DEFINE_string("cases", "", "How the presets' names begin.")
    flags.DEFINE_bool("compile", True, "Ask the compiler about the cases that peak.jsonl lacks.")
    flags.DEFINE_integer("one", None, "Compile this one of CASES to the end and print aot's answer.")
    flags.DEFINE_string("out", str(HERE / "peak.jsonl"), "Where the lines go.")
    app.run(main)
