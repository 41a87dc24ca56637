"""Direct preference optimization (Rafailov et al. 2023, appendix B) of an SFT run.

    python -m gptjax.dpo --config=configs/dpo.py --workdir=runs/dpo --config.init_from=runs/sft \
        --config.data.source=comparisons.jsonl

Rows are those of the reward model. The paper trains with RMSprop; here it is AdamW with RMSprop's decay of the second
moment, .99. Higher beta stays nearer the reference.
"""

from gptjax.config import config_dict
from gptjax.dpo import DPOConfig

PRESETS = {"dpo": []}  # by stage, for --help


def get_config():
    c = config_dict(DPOConfig)
    c.beta = 0.1  # B
    c.epochs = 1.0  # not stated: ours
    c.batch_size = 64  # B
    c.optimizer.update(learning_rate=1e-6, b1=0.9, b2=0.99, weight_decay=0.0)  # B: 1e-6, RMSprop
    c.schedule.update(kind="constant", warmup_tokens=150 * c.batch_size * 2 * 512)  # B: over 150 steps, of pairs of 512
    c.data.drop_long = True
    c.eval.every = c.checkpoint.every = 100
    return c
