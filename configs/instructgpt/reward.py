"""InstructGPT's reward model (Ouyang et al. 2022, §3.5 and appendix C.2).

    python -m gptjax.reward --config=configs/instructgpt/reward.py --workdir=runs/reward --config.init_from=runs/sft \
        --config.data.source=comparisons.jsonl

One 6B model served policies of every size; the paper had 33,207 training prompts of 4 to 9 ranked completions.
Expected on people's rankings: 72.4 % of the pairs of its training labelers, 69.6 % of held-out ones.

Hardware: SLICE fits 6B with 9 completions of 2,048 tokens a prompt (bf16, everything recomputed): 17.66 GiB a chip by
the TPU compiler. On other slices mesh.fsdp takes all the devices, which must divide microbatch_size.
"""

from gptjax.config import config_dict
from gptjax.reward import RewardConfig

PRESETS = {"reward": []}  # by stage, for --help

SLICE = "v5p:2x2x4"  # 16 chips
MODEL = "gpt3:6.7b"  # what init_from is, and aot's --policy


def get_config():
    c = config_dict(RewardConfig)
    c.epochs = 1.0  # C.2: one epoch; more overfits
    c.batch_size = 64  # C.2: distinct prompts, so up to 64 x 36 = 2,304 comparisons
    c.objective = "pairs"  # eq. 1, all C(K, 2) pairs of a prompt in one element
    c.normalize = "mean"  # §3.5: a bias so that demonstrations score 0
    c.optimizer.update(
        learning_rate=9e-6,  # C.2
        b1=0.9, b2=0.95,  # C
        weight_decay=0.0, clip_norm=1.0,  # not stated: ours
    )  # fmt: skip
    c.schedule.update(kind="cosine", final_fraction=0.1, warmup_tokens=0.0)  # C.2: cosine to 10 %
    c.data.drop_long = True
    c.microbatch_size = 16
    c.model.remat = "full"
    c.precision.compute = "bfloat16"
    c.mesh.update(data=1, fsdp=-1)
    c.eval.every = c.checkpoint.every = 100
    return c
