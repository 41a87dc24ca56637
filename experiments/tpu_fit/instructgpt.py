"""Whether InstructGPT's presets fit the slices that their docstrings name, by the TPU compiler.

    python -m experiments.tpu_fit.instructgpt [--only=ppo:1.3b]      # one line of instructgpt.jsonl for each program

Lines that are there are kept, so the command can be given again. No setting of the command line: the presets as they
are, on their own slices.
"""

import json
import sys
from pathlib import Path

import jax
from absl import app, flags
from tqdm import tqdm

from configs.instructgpt import ppo, reward, sft
from experiments.tpu_fit.run import read
from gptjax.aot.check import PRESETS, Request, check
from gptjax.cost import topology as topologies

HERE = Path(__file__).parent
KEEP = ("program", "topology", "fits", "message", "hbm_per_chip", "bytes_per_chip", "argument_bytes_per_chip",
        "ours_per_chip", "compile_seconds")  # fmt: skip


def programs():
    """(name, config, slice, Request) of each program of each preset."""
    for size in sft.SIZES:
        yield f"sft:{size}", sft.get_config(size), sft.SLICES[size], Request(policy=PRESETS[sft.MODELS[size]])
    yield "reward:6b", reward.get_config(), reward.SLICE, Request(policy=PRESETS[reward.MODEL])
    for size in ppo.SIZES:
        models = {"policy": PRESETS[ppo.MODELS[size]], "reward": PRESETS[ppo.REWARD]}
        for program in ("ppo_collect", "ppo_update"):
            yield f"ppo:{size}", ppo.get_config(size), ppo.SLICES[size], Request(program, **models)


def main(_):
    jax.config.update("jax_platforms", "cpu")
    out = Path(FLAGS.out)
    done = {(row["preset"], row["program"]) for row in read(out)}
    todo = [p for p in programs() if (p[0], p[3].program) not in done and FLAGS.only in (None, p[0])]
    for name, config, slice_, request in tqdm(todo, file=sys.stderr, dynamic_ncols=True):
        found = check(config.to_dict(), topologies.parse(slice_), request)
        row = {"preset": name, **{k: found[k] for k in KEEP if k in found}}
        print(json.dumps(row), flush=True)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    flags.DEFINE_string("only", None, "One preset, as ppo:1.3b; all if not given.")
    flags.DEFINE_string("out", str(HERE / "instructgpt.jsonl"), "Where the lines go.")
    app.run(main)
