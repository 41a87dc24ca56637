"""The demo's pre-training: a small GPT on the source code and documentation of Python's standard library.

    make demo      # this, and every stage after it: experiments/docstrings

The corpus is on every machine that can run this, about 12 MB in 800 files, split by file; a byte-level BPE is
trained on it. On a GPU or TPU the same command trains a larger model on more tokens, in bf16, over all devices.
"""

import jax

from gptjax.config import config_dict
from gptjax.pretrain import PretrainConfig

PRESETS = {"pretrain": []}  # by stage, for --help

PROMPTS = (
    'def read(self, size=-1):\n    """',
    "import os\nimport sys\n\nclass ",
    "    def __init__(self",
    "The following example shows how to",
)


def get_config():
    c = config_dict(PretrainConfig)
    c.data.source = "stdlib"
    c.data.validation = "0.05"
    c.samples.update(prompts=PROMPTS, max_new_tokens=80, temperature=0.7)
    c.schedule.update(kind="cosine", final_fraction=0.1)
    c.optimizer.update(b2=0.95, weight_decay=0.1)
    if jax.default_backend() == "cpu":
        c.data.tokenizer = "bpe:4096"
        c.model.update(n_layer=4, n_head=5, d_model=160, context_length=128)
        c.optimizer.learning_rate = 2e-3
        c.steps, c.batch_size = 300, 16
        c.eval.update(every=150, batches=16)
    else:
        c.data.tokenizer = "bpe:8192"
        c.model.update(n_layer=8, n_head=8, d_model=512, context_length=512, dropout=0.1)
        c.optimizer.learning_rate = 1e-3
        c.precision.compute = "bfloat16"
        c.mesh.update(data=1, fsdp=-1)
        c.steps, c.batch_size = 2000, 64
        c.eval.update(every=500, batches=20)
    c.checkpoint.every = c.checkpoint.keep_every = c.eval.every  # all are kept, for skill over training
    c.schedule.warmup_tokens = 0.05 * c.steps * c.batch_size * c.model.context_length
    return c
