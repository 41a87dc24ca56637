"""nanoGPT's character-level Shakespeare.

    python -m gptjax.pretrain --config=configs/shakespeare_char.py --workdir=runs/shakespeare \
        --config.data.source=input.txt

cpu (default): 4 layers, 128 wide, 4 heads, context 64, 2,000 steps of 12 sequences, no dropout.
    Expected validation loss 1.88 nats/character (nanoGPT's README), about a minute on 2 CPU cores.
gpu: 6 layers, 384 wide, 6 heads, context 256, 5,000 steps of 64, dropout .2. Expected best 1.4697.

input.txt is https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
"""

from gptjax.config import choose, config_dict
from gptjax.pretrain import PretrainConfig

PRESETS = {"pretrain": ["cpu", "gpu"]}  # by stage, for --help

SIZES = {
    "cpu": dict(n_layer=4, n_head=4, d_model=128, context_length=64, dropout=0.0),
    "gpu": dict(n_layer=6, n_head=6, d_model=384, context_length=256, dropout=0.2),
}


def get_config(size="cpu"):
    c = config_dict(PretrainConfig)
    c.model.update(choose(SIZES, size, "size"))
    c.data.tokenizer = "char"
    c.data.validation = "0.1"  # the last tenth of the file
    c.steps, c.batch_size = (2000, 12) if size == "cpu" else (5000, 64)
    tokens_per_step = c.batch_size * c.model.context_length
    c.schedule.warmup_tokens = 100.0 * tokens_per_step
    c.optimizer.update(learning_rate=1e-3, b2=0.99, weight_decay=0.1)
    c.seed = 1337
    c.eval.every = c.checkpoint.every = 250
    if size == "cpu":
        c.model.unroll = c.model.get_oneway_ref("n_layer")  # no loop over layers: a tenth faster at this size
        c.steps_per_dispatch = 10  # a step is milliseconds: dispatching and logging would cost as much
    else:
        c.precision.compute = "bfloat16"
    c.samples.update(prompts=("\n",), max_new_tokens=200)
    return c
