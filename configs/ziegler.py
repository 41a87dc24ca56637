"""Fine-tuning language models from human preferences (Ziegler et al. 2019; openai/lm-human-preferences).

    python -m gptjax.reward --config=configs/ziegler.py:reward --workdir=runs/reward --config.init_from=runs/gpt2-sft \
        --config.data.source=labels.jsonl --config.demonstrations=samples.jsonl
    python -m gptjax.ppo --config=configs/ziegler.py:ppo --workdir=runs/ppo --config.policy=runs/gpt2-sft \
        --config.reward=runs/reward --config.data.source=excerpts.jsonl

The sentiment and descriptiveness tasks on book excerpts: GPT-2 774M, queries of 64 tokens, responses of 24. Departures:
a response ends at end-of-text, where theirs is cut after the first full stop from the 16th token on; the value head
reads the policy's trunk as theirs but is stepped by an optimizer of its own; the reward is normalized after training
only, theirs before it too. Numbers are those of the released code's launch file (sentiment and descriptiveness) and its
hyper-parameter defaults, unless a comment says the paper's section.
"""

from gptjax.config import choose, config_dict
from gptjax.ppo import PPOConfig
from gptjax.reward import RewardConfig

PRESETS = {"reward": ["reward"], "ppo": ["ppo"]}  # by stage, for --help


def reward():
    c = config_dict(RewardConfig)
    c.objective = "best"  # eq. 1: which of four is best
    c.epochs, c.batch_size = 1.0, 32  # 4,992 labels, each seen once
    c.normalize = "mean_std"  # mean 0 and variance 1 on samples of the initial policy: give them as demonstrations
    c.optimizer.update(name="gpt1_adam", learning_rate=5e-5, b2=0.999, eps=1e-5, weight_decay=0.0, clip_norm=0.0)
    c.schedule.update(kind="linear", final_fraction=0.0)
    return c


def ppo():
    c = config_dict(PPOConfig)
    c.episodes, c.batch_size = 1_000_000, 512  # ppo.total_episodes, ppo.batch_size
    # ppo.noptepochs, nminibatches, cliprange, cliprange_value, vf_coef; evaluation uses the last weights, no average
    c.ppo.update(epochs=4, minibatches=1, clip=0.2, value_clip=0.2, value_coefficient=0.1, ema_decay=0.0)
    c.kl.update(coefficient=0.15, target=6.0, horizon=10_000.0)  # adaptive, nats per sequence (§2.2)
    # task.response_length, policy.temperature, ppo.gamma, lam, whiten_rewards, task.penalty_reward_value
    c.rollout.update(
        max_new_tokens=24, temperature=0.7, gamma=1.0, lam=0.95, whiten_rewards=True, missing_eos=-1.0
    )  # fmt: skip
    c.shared_trunk = True  # one network with a zero-initialized value head
    c.data.max_length = 64  # task.query_length
    c.rate.kind = "linear"
    # TensorFlow's Adam adds epsilon before the bias correction: gpt1_adam has that form
    for optimizer in (c.optimizer, c.value_optimizer):
        optimizer.update(
            name="gpt1_adam", learning_rate=1e-5, b1=0.9, b2=0.999, eps=1e-5, weight_decay=0.0, clip_norm=0.0
        )
    return c


def get_config(stage="ppo"):
    return choose({"reward": reward, "ppo": ppo}, stage, "stage")()
