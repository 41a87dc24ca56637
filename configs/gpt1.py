"""GPT-1 (Radford et al. 2018): 12 post-LN layers, 116,534,784 parameters, Adam with cosine to zero.

    python -m gptjax.pretrain --config=configs/gpt1.py --workdir=runs/gpt1 --config.data.source=PATH

The paper: 100 epochs of BooksCorpus, 64 sequences of 512 tokens a step, 2.5e-4 after 2,000 updates of linear
warm-up, dropout .1, decoupled weight decay .01 on all weights but biases and gains, token perplexity 18.4.
Here AdamW is the decoupled decay the paper cites; --config.optimizer.name=gpt1_adam is its released code's own.

data.tokenizer: the paper's is lower-casing with 40,000 merges: give the directory with
encoder_bpe_40000.json and vocab_40000.bpe (needs `pip install spacy`). The default trains a byte-level BPE
of the same size on the data.
"""

from gptjax.config import config_dict
from gptjax.model.spec import GPT1
from gptjax.pretrain import PretrainConfig

PRESETS = {"pretrain": []}  # by stage, for --help


def get_config():
    c = config_dict(PretrainConfig)
    c.model.update(vars(GPT1))
    c.data.tokenizer = f"bpe:{GPT1.vocab_size}"
    c.epochs = 100.0
    c.batch_size = 64
    c.optimizer.update(learning_rate=2.5e-4, b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
    c.schedule.update(kind="cosine", warmup_tokens=2000.0 * 64 * 512, final_fraction=0.0)
    c.mesh.update(data=1, fsdp=-1)
    c.log.every = 10
    c.eval.batches = 100
    c.samples.prompts = ("the meaning of life is",)
    return c
