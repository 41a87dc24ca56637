"""The smallest slice that each preset trains on at its paper's batch size, by the TPU compiler.

    python -m experiments.tpu_fit.run [--presets=gpt2:124m,gpt3:175b] [--generations=v5e,v5p] [--out=FILE]

One line of results.jsonl for each preset and generation; lines that are there are kept, so the command can be given
again. The rule by which mesh, remat and micro-batch are chosen is `candidates`.
"""

import importlib
import json
import sys
from pathlib import Path

import jax
from absl import app, flags
from tqdm import tqdm

from gptjax import config as configs
from gptjax import json_files
from gptjax.aot import check
from gptjax.cost import topology as topologies
from gptjax.errors import InputError
from gptjax.model.spec import parameter_count

HERE = Path(__file__).parent
BATCH = {  # sequences of a step: the papers' batch sizes
    "gpt1": 64, **{f"gpt2:{k}": 512 for k in ("124m", "355m", "774m", "1558m")},
    **dict(zip((f"gpt3:{k}" for k in ("125m", "350m", "760m", "1.3b", "2.7b", "6.7b", "13b", "175b")),
               (256, 256, 256, 512, 512, 1024, 1024, 1600), strict=True)),
}  # fmt: skip
SETTINGS = [("none", 8), ("dots", 8), ("dots", 4), ("full", 8), ("full", 4), ("full", 2), ("full", 1)]
FLAGS = flags.FLAGS


def preset_config(preset: str) -> dict:
    """The recipe of configs/ in bf16."""
    family, _, size = preset.partition(":")
    module = importlib.import_module(f"configs.{family}")
    config = (module.get_config(size) if size else module.get_config()).to_dict()
    model = {**config["model"], "vocab_size": check.PRESETS[preset].vocab_size}
    return {**config, "model": model, "precision": {**config["precision"], "compute": "bfloat16"}}


def candidates(preset: str, generation: str):
    """What is tried, in this order: slices from the smallest; on each fsdp over all chips, then, for heads that divide,
    tensor = 8; for each the SETTINGS (remat, rows a chip has at a time) from the fastest to the leanest.

    Left out without asking the compiler: what our own count says cannot fit (parameters, moments, gradients and the
    residual stream at every layer are together more than HBM).
    """
    model = check.PRESETS[preset]
    for topology in topologies.slices(generation):
        for tensor in (1, 8):
            fsdp = topology.device_count // tensor
            if fsdp * tensor != topology.device_count or model.n_head % tensor or (tensor > 1 and model.d_model < 8192):
                continue
            if model.d_model % fsdp or fsdp > BATCH[preset]:
                continue
            state = 16 * parameter_count(model) / topology.device_count
            for remat, rows in SETTINGS:
                micro = min(rows * fsdp, -(-BATCH[preset] // fsdp) * fsdp)
                tokens = micro // fsdp * model.context_length
                width = {"none": 34, "dots": 10, "full": 1}[remat]  # [tokens, d_model] arrays kept of a layer
                kept = 2 * tokens * model.d_model * model.n_layer * width / tensor
                if state + kept > topology.chip.hbm:
                    continue
                yield topology, {
                    "mesh.data": 1, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "model.remat": remat,
                    "microbatch_size": micro, "batch_size": -(-BATCH[preset] // micro) * micro,
                }  # fmt: skip


def smallest(preset: str, generation: str, status) -> dict:
    """The first candidate that compiles."""
    config, tried = preset_config(preset), []
    for topology, changes in candidates(preset, generation):
        try:
            result = check.check(check.changed(config, changes), topology, status=status)
        except InputError as error:
            result = {"fits": False, "message": str(error), "bytes_per_chip": None}
        if result["fits"]:
            return {"preset": preset, "generation": generation, "settings": changes, "refused": tried, **result}
        tried.append({
            "topology": str(topology), "settings": changes, "bytes": result["bytes_per_chip"],
            "message": result["message"],
        })  # fmt: skip
    return {"preset": preset, "generation": generation, "fits": False, "refused": tried}


def read(path: Path) -> list[dict]:
    return json_files.read_json_lines(path) if path.exists() else []


def main(_):
    jax.config.update("jax_platforms", "cpu")
    out = Path(FLAGS.out)
    done = {(r["preset"], r["generation"]) for r in read(out)}
    for preset in FLAGS.presets:
        configs.choose(check.PRESETS, preset, "preset")
    todo = [(p, g) for g in FLAGS.generations for p in FLAGS.presets if (p, g) not in done]
    bar = tqdm(todo, file=sys.stderr, dynamic_ncols=True)
    for preset, generation in bar:
        row = smallest(preset, generation, lambda text, p=preset: bar.set_postfix_str(f"{p}: {text}"))
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    flags.DEFINE_list("presets", list(BATCH), "Presets.")
    flags.DEFINE_list("generations", ["v5e", "v5p"], "TPU generations.")
    flags.DEFINE_string("out", str(HERE / "results.jsonl"), "Where the lines go.")
    app.run(main)
