"""GRPO, group relative policy optimization (Shao et al. 2024, §4.2), of an SFT run.

    python -m gptjax.ppo --config=configs/grpo.py --workdir=runs/grpo --config.policy=runs/sft \
        --config.data.source=prompts.jsonl --config.reward=runs/reward      # or --config.reward_fn=package.module:f

The RL loop of PPO with groups of samples of each prompt in place of a value network, and the KL penalty in the loss. A
reward model, a rule, or both. The paper: 64 samples of each of 16 prompts, one step on them.
"""

from gptjax.config import config_dict
from gptjax.ppo import PPOConfig

PRESETS = {"ppo": []}  # by stage, for --help


def get_config():
    c = config_dict(PPOConfig)
    c.rollout.update(
        group_size=64,  # §4.2
        max_new_tokens=1024,  # §4.2
        temperature=1.0,
        missing_eos=None,  # a rule says what a response without an end is worth
    )
    c.batch_size = 1024  # §4.2: episodes
    c.ppo.update(epochs=1, minibatches=1, clip=0.2)  # §4.2: a single update of each exploration
    c.kl.update(coefficient=0.04, target=None)  # §4.2
    c.optimizer.update(learning_rate=1e-6, b2=0.95, weight_decay=0.0)  # §4.2
    c.steps = 1000  # not stated: ours; the paper has 144,000 questions
    c.data.drop_long = True
    c.eval.every = c.checkpoint.every = 50
    return c
