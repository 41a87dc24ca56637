"""Does it fit, and how fast can it be? Compiles any config for any TPU slice with the TPU compiler; needs no TPU.

    python -m gptjax.aot --config=configs/gpt3.py:175b --topology=v5p:8x8x16 [--json]

--topology: libtpu's name or Cloud's (v5p-1024, v5litepod-16; --num_slices for several). --program: train or decode,
and with a PPO config ppo_collect or ppo_update, which both have to fit; --policy and --reward name the models, and no
workdir is needed. For SFT, DPO and a reward model --policy is the model that they begin with:

    python -m gptjax.aot --config=configs/instructgpt/ppo.py:1.3b --policy=gpt3:1.3b --reward=gpt3:6.7b \
        --program=ppo_update --topology=v5p:2x2x2

A mesh smaller than the slice grows along fsdp, and rows that do not divide over it are rounded: `adjusted` lists what
was changed.

Exit code 0: it fits. 3: it does not; then the largest buffers and the nearest change that compiles are printed. FLOPs
are counted by model/flops.py, collectives from the compiled program (cost/hlo.py), bounds by cost/roofline.py.
"""

import sys

import jax
from absl import flags
from ml_collections import config_flags

from gptjax import command_line, json_files
from gptjax import config as configs
from gptjax.aot.check import PRESETS, PROGRAMS, Request, check
from gptjax.aot.remedies import find_remedy
from gptjax.aot.table import table
from gptjax.cost import topology as topologies


def main(_):
    jax.config.update("jax_platforms", "cpu")  # of libtpu only the compiler is used
    config = FLAGS.config.to_dict()
    slices = config["mesh"]["dcn_data"] if FLAGS.num_slices is None else FLAGS.num_slices
    topology = topologies.parse(FLAGS.topology, slices)
    preset = lambda name: name and configs.choose(PRESETS, name, "model preset")
    request = Request(
        FLAGS.program, FLAGS.rows, FLAGS.prompt_length, FLAGS.new_tokens, preset(FLAGS.policy), preset(FLAGS.reward)
    )
    status = lambda text: print(f"{text} …", file=sys.stderr, flush=True)
    result = check(config, topology, request, status)
    if not result["fits"] and FLAGS.remedy:
        result["remedy"] = find_remedy(config, topology, request, result, status)
    print(json_files.dumps(result) if FLAGS.json else table(result))
    if not result["fits"]:
        sys.exit(3)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "A config file, as configs/gpt3.py:175b.", lock_config=True)
    flags.DEFINE_string("topology", None, "A TPU slice: v5p:8x8x8, v5p-1024, v5litepod-16.")
    flags.DEFINE_integer("num_slices", None, "Slices joined by the data-center network; else the config's dcn_data.")
    flags.DEFINE_string("program", "train", "What to compile: " + ", ".join(PROGRAMS))
    flags.DEFINE_string("policy", None, "Preset of the stage's base model (PPO: of the policy), as gpt3:1.3b.")
    flags.DEFINE_string("reward", None, "Preset of PPO's reward model, as gpt3:6.7b; not given = no reward model.")
    flags.DEFINE_integer("rows", 8, "Prompts decoded together (decode).")
    flags.DEFINE_integer("prompt_length", None, "Tokens of a prompt (decode); half the context if not given.")
    flags.DEFINE_integer("new_tokens", None, "Tokens decoded (decode); half the context if not given.")
    flags.DEFINE_bool("remedy", True, "If it does not fit, search for the nearest change that does.")
    flags.DEFINE_bool("json", False, "Print the result as one JSON object.")
    flags.mark_flags_as_required(["config", "topology"])
    command_line.run(main)
