"""InstructGPT's PPO-ptx by the TPU compiler: what collecting and updating need of a chip.

    python -m experiments.tpu_fit.ppo        one line of ppo.jsonl for each of CASES that it lacks, and the table

configs/instructgpt/ppo.py in bf16 (512 episodes, minibatches of 64, 1,000 tokens of prompt and response each, 8
sequences of pre-training text an episode), fsdp over the slice, full remat, a row a chip (of a tensor pair) at a time;
GPT-2's context of 1,024 takes half of it for each. A compiler is stopped when it has assigned buffers (peak.py). Whole:

    python -m gptjax.aot --config=configs/instructgpt/ppo.py:1.3b --policy=gpt3:1.3b --reward=gpt3:6.7b \\
        --program=ppo_update --topology=v5p:2x2x1 --config.precision.compute=bfloat16 --config.model.remat=full \\
        --config.mesh.data=1 --config.mesh.fsdp=4 --config.ppo.microbatch_size=4 --config.rollout.forward_rows=4
"""

import json
import sys

from absl import app
from tqdm import tqdm

from experiments.tpu_fit.peak import ask
from experiments.tpu_fit.run import HERE, read
from gptjax.cost import topology as topologies

KEYS = ("policy", "reward", "topology", "tensor")
MODULES = {"ppo_collect": "jit_collect", "ppo_update": "jit__lambda"}
CASES = [  # policy, reward model and value network, slice, tensor
    ("gpt2:355m", "gpt2:355m", "v5e:2x2", 1),
    ("gpt2:355m", "gpt2:355m", "v5e:2x4", 1),
    ("gpt2:355m", "gpt2:355m", "v5e:4x4", 1),
    ("gpt3:1.3b", "gpt3:6.7b", "v5p:2x2x1", 1),
    ("gpt3:13b", "gpt3:6.7b", "v5p:2x2x4", 1),
    ("gpt2:1558m", "gpt2:1558m", "v5e:4x8", 1),
    ("gpt2:1558m", "gpt2:1558m", "v5e:8x8", 1),
    ("gpt3:175b", "gpt3:6.7b", "v5p:4x4x8", 2),
]


def arguments(policy: str, reward: str, slice_: str, tensor: int, program: str) -> list[str]:
    fsdp = topologies.parse(slice_).device_count // tensor
    short = ["--config.data.max_length=512", "--config.rollout.max_new_tokens=512"]
    return [
        "gptjax.aot", "--config=configs/instructgpt/ppo.py:1.3b", f"--policy={policy}", f"--reward={reward}",
        f"--topology={slice_}", f"--program={program}", "--noremedy", "--config.precision.compute=bfloat16",
        "--config.model.remat=full", "--config.mesh.data=1", f"--config.mesh.fsdp={fsdp}",
        f"--config.mesh.tensor={tensor}", f"--config.ppo.microbatch_size={fsdp}",
        f"--config.rollout.forward_rows={fsdp}", *(() if policy.startswith("gpt3") else short),
    ]  # fmt: skip


def table() -> str:
    gib = lambda n, hbm: f"{n / 2**30:.2f}{', too much' if n > hbm else ''}"
    lines = ["| policy | reward model, value network | slice | mesh | HBM | collect | update |", "|---" * 7 + "|"]
    for r in sorted(read(HERE / "ppo.jsonl"), key=lambda r: CASES.index(tuple(r[k] for k in KEYS))):
        t, tensor = topologies.parse(r["topology"]), r["tensor"]
        mesh = f"fsdp {t.device_count // tensor}" + (f" x tensor {tensor}" if tensor > 1 else "")
        needs = " | ".join(gib(r[program], t.chip.hbm) for program in MODULES)
        lines.append(f"| {r['policy']} | {r['reward']} | {t} | {mesh} | {t.chip.hbm / 2**30:.2f} | {needs} |")
    return "\n".join(lines)


def main(_):
    done = [tuple(r[k] for k in KEYS) for r in read(HERE / "ppo.jsonl")]
    for case in tqdm([c for c in CASES if c not in done], file=sys.stderr, dynamic_ncols=True):
        row = dict(zip(KEYS, case, strict=True))
        row |= {program: ask(arguments(*case, program), module) for program, module in MODULES.items()}
        with (HERE / "ppo.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    print(table())


if __name__ == "__main__":
    app.run(main)
