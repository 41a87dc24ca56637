"""InstructGPT's supervised stage (Ouyang et al. 2022, appendix C.1 and C.3).

    python -m gptjax.sft --config=configs/instructgpt/sft.py:1.3b --workdir=runs/sft --config.init_from=runs/gpt3 \
        --config.data.source=demonstrations.jsonl

1.3b, 6b, 175b: the SFT baseline of C.1. With ',rl' (1.3b,rl): the model that RL starts from and that is its KL
reference, C.3: 2 epochs with a tenth of pre-training text. The paper's were trained on about 13,000 prompts.

Hardware: SLICES says which TPU slice each size is laid out for (bf16, everything recomputed). It fits by our own count
of bytes (tests/test_presets.py), 1.3b also by the TPU compiler: 4.58 GiB a chip. On other slices mesh.fsdp takes all
the devices, which must divide batch_size (with 175b: devices / 16).
"""

from gptjax.config import choose, config_dict
from gptjax.sft import SFTConfig

PRESETS = {"sft": ["1.3b", "6b", "175b", "1.3b,rl", "6b,rl", "175b,rl"]}  # by stage, for --help

SIZES = {  # C.1: learning rate, batch; C.3: learning rate of the RL initialization
    "1.3b": (9.65e-6, 32, 5e-6),
    "6b": (9.65e-6, 32, 1.04e-5),
    "175b": (5.03e-6, 8, 2.45e-6),
}

SLICES = {"1.3b": "v5p:2x2x2", "6b": "v5p:2x2x4", "175b": "v5p:4x4x8"}  # 8, 16 and 128 chips
MODELS = {"1.3b": "gpt3:1.3b", "6b": "gpt3:6.7b", "175b": "gpt3:175b"}  # what init_from is, and aot's --policy


def get_config(arg="1.3b"):
    size, _, variant = arg.partition(",")
    rate, batch, rate_rl = choose(SIZES, size, "size")
    rl = choose({"": False, "rl": True}, variant, "variant")
    c = config_dict(SFTConfig)
    c.batch_size = batch
    c.optimizer.update(
        learning_rate=rate_rl if rl else rate,
        b1=0.9, b2=0.95,  # C: "Adam optimizer, with beta_1 = 0.9 and beta_2 = 0.95"
        weight_decay=0.0, clip_norm=1.0,  # not stated: ours
    )  # fmt: skip
    c.schedule.update(kind="cosine", final_fraction=0.1, warmup_tokens=0.0)  # C.1: cosine to 10 %, no warm-up
    c.data.packing = False  # the batch is counted in demonstrations
    c.data.drop_long = True  # C: prompts over 1k tokens filtered, context 2k
    c.model.remat = "full"
    c.precision.compute = "bfloat16"
    c.mesh.update(data=1, fsdp=-1, tensor=16 if size == "175b" else 1)  # a batch of 8 is cut over 8 devices at the most
    if rl:
        c.epochs = 2.0  # C.3
        c.mix.fraction = 0.1  # C.3: 10 % pre-training data
    else:
        c.epochs = 16.0  # C.1
        c.model.update(dropout=0.2, dropout_sites="residual")  # C.1: residual dropout of 0.2
    return c
