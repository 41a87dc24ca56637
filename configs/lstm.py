"""The LSTM that GPT-1 is compared with, and the byte-level multiplicative LSTM of the sentiment unit.

    python -m gptjax.pretrain --config=configs/lstm.py:gpt1_baseline --workdir=runs/lstm --config.data.source=PATH
    python -m gptjax.pretrain --config=configs/lstm.py:mlstm --workdir=runs/mlstm --config.data.source=PATH

gpt1_baseline: one layer of 2,048 units in GPT-1's own training setup, configs/gpt1.py (Radford et al. 2018 §5, Table
    5). The width of its embedding is not published. Here it is that of the state, so that embedding and output are one
    matrix as in GPT-1: 116,461,568 parameters, as many as GPT-1 to .1 %. Fine-tune it as GPT-1, with
    configs/gpt1_finetune.py.
mlstm: 4,096 units, an embedding of 64, bytes (Radford, Jozefowicz and Sutskever 2017 §3): a million steps of 128
    sequences of 256 bytes, Adam at 5e-4 decaying linearly to 0, weight normalization; 1.12 bits per byte on 82 million
    Amazon reviews. 86,319,360 parameters and a row of either table for end-of-text, which theirs does not have. Probe
    it with `python -m experiments.sentiment_unit`.
"""

from gptjax.config import choose, config_dict
from gptjax.model.lstm import LSTMConfig
from gptjax.model.spec import GPT1
from gptjax.pretrain import PretrainConfig

PRESETS = {"pretrain": ["gpt1_baseline", "mlstm"]}  # by stage, for --help


def gpt1_baseline():
    c = config_dict(PretrainConfig)
    c.model = config_dict(LSTMConfig, units=2048, d_embed=2048, context_length=GPT1.context_length, dropout=0.1)
    c.data.tokenizer = f"bpe:{GPT1.vocab_size}"
    c.epochs, c.batch_size = 100.0, 64
    c.optimizer.update(learning_rate=2.5e-4, b1=0.9, b2=0.999, weight_decay=0.01, clip_norm=1.0)
    c.schedule.update(kind="cosine", warmup_tokens=2000.0 * 64 * 512, final_fraction=0.0)
    c.samples.prompts = ("the meaning of life is",)
    return c


def mlstm():
    c = config_dict(PretrainConfig)
    c.model = config_dict(LSTMConfig, cell="mlstm", units=4096, d_embed=64, context_length=256, tied_head=False)
    c.data.tokenizer = "bpe:257"  # 256 bytes and end-of-text
    c.steps, c.batch_size = 1_000_000, 128
    c.optimizer.update(learning_rate=5e-4, b1=0.9, b2=0.999, weight_decay=0.0, clip_norm=1.0)
    c.schedule.update(kind="linear", final_fraction=0.0)
    c.samples.prompts = ("\n ",)
    return c


def get_config(which="gpt1_baseline"):
    c = choose({"gpt1_baseline": gpt1_baseline, "mlstm": mlstm}, which, "preset")()
    c.mesh.update(data=1, fsdp=-1)
    c.log.every = 10
    c.eval.batches = 100
    return c
