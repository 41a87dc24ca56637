"""GPT-2 (Radford et al. 2019) on any text.

    python -m gptjax.pretrain --config=configs/gpt2.py:124m --workdir=runs/gpt2 --config.data.source=PATH

Sizes: 124m, 355m, 774m, 1558m. Architecture, vocabulary size, context 1,024 and batch 512 are the paper's.
The learning rate, steps and weight decay were not published: these are nanoGPT's for OpenWebText (600k steps
of half a million tokens; there 124m reaches a loss of 2.85) and GPT-3's learning rates for the larger ones.

data.tokenizer trains a byte-level BPE of GPT-2's size on the data; for GPT-2's own, give the directory that
holds encoder.json and vocab.bpe. Hardware: any; the memory need is printed before step 1. Smaller
microbatch_size and model.remat=dots or full need less, mesh.fsdp spreads the larger sizes over devices.
"""

from gptjax.config import choose, config_dict
from gptjax.model.spec import GPT2
from gptjax.pretrain import PretrainConfig

PRESETS = {"pretrain": ["124m", "355m", "774m", "1558m"]}  # by stage, for --help

LEARNING_RATE = {"124m": 6e-4, "355m": 3e-4, "774m": 2.5e-4, "1558m": 2e-4}  # GPT-3 Table 2.1 by width


def get_config(size="124m"):
    c = config_dict(PretrainConfig)
    model = choose(GPT2, size, "GPT-2 size")
    c.model.update(vars(model))
    c.model.remat = "none" if size == "124m" else "dots"
    c.data.tokenizer = f"bpe:{model.vocab_size}"
    c.data.validation = "0.005"
    c.steps = 600_000
    c.batch_size = 512
    c.microbatch_size = 32
    c.optimizer.update(learning_rate=LEARNING_RATE[size], b2=0.95, weight_decay=0.1)
    c.schedule.update(kind="cosine", warmup_tokens=375e6, final_fraction=0.1)
    c.precision.compute = "bfloat16"
    c.mesh.update(data=1, fsdp=-1)
    c.log.every = 10
    c.eval.batches = 100
    c.samples.prompts = ("The meaning of life is",)
    return c
