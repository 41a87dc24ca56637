"""TL;DR summarization as in The N+ Implementation Details of RLHF with PPO (Huang et al. 2024, arXiv 2403.17031).

    python -m gptjax.sft    --config=configs/nplus.py:sft    --workdir=runs/sft    --config.init_from=runs/gpt ...
    python -m gptjax.reward --config=configs/nplus.py:reward --workdir=runs/reward --config.init_from=runs/sft ...
    python -m gptjax.ppo    --config=configs/nplus.py:ppo    --workdir=runs/ppo    --config.policy=runs/sft \
        --config.reward=runs/reward ...

Prompts end in "TL;DR:" and stand alone (template 'plain'), responses have at most 53 tokens. Published: reward-model
accuracy .628, .669, .689 at 1B, 2.8B, 6.9B; PPO preferred to the reference summaries about 80 % of the time at 6.9B.
Numbers are those of the paper's hyper-parameter tables and of its released sft.py, reward.py and ppo.py.
"""

from gptjax.config import choose, config_dict
from gptjax.ppo import PPOConfig
from gptjax.reward import RewardConfig
from gptjax.sft import SFTConfig

PRESETS = {"sft": ["sft"], "reward": ["reward"], "ppo": ["ppo"]}  # by stage, for --help

ADAM = dict(learning_rate=3e-6, b1=0.9, b2=0.999, eps=1e-5, weight_decay=0.0, clip_norm=0.0)  # all three stages


def sft():
    c = config_dict(SFTConfig)
    c.epochs, c.batch_size = 1.0, 128  # 116,722 demonstrations
    c.data.update(template="plain", packing=False, loss_on="all")  # the loss is on query and response
    c.optimizer.update(ADAM)
    c.schedule.update(kind="cosine", final_fraction=0.0)
    return c


def reward():
    c = config_dict(RewardConfig)
    c.epochs, c.batch_size = 1.0, 64  # 92,858 pairs
    c.normalize = "mean"  # 0 on the demonstrations
    c.optimizer.update(ADAM)
    c.schedule.update(kind="cosine", final_fraction=0.0)
    return c


def ppo():
    c = config_dict(PPOConfig)
    c.episodes, c.batch_size = 1_000_000, 512
    # num_ppo_epochs, num_mini_batches, cliprange, cliprange_value, vf_coef; no moving average
    c.ppo.update(epochs=4, minibatches=1, clip=0.2, value_clip=0.2, value_coefficient=0.1, ema_decay=0.0)
    c.kl.coefficient = 0.05  # kl_coef, fixed
    c.rollout.update(max_new_tokens=53, temperature=0.7, gamma=1.0, lam=0.95, missing_eos=-1.0)
    c.rate.kind = "linear"
    c.optimizer.update(ADAM)
    c.value_optimizer.update(ADAM)
    c.data.max_length = 512  # query_length
    return c


def get_config(stage="ppo"):
    return choose({"sft": sft, "reward": reward, "ppo": ppo}, stage, "stage")()
