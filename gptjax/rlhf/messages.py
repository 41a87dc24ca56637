"""What a PPO run prints about itself."""

from gptjax.distributed import hosts
from gptjax.parallel import pipeline
from gptjax.rlhf.config import PPOConfig


def summary(line: dict) -> str:
    """A line of metrics.jsonl as text for the progress bar."""
    return (
        f"score {line['objective/score']:.3f}, kl {line['objective/kl']:.2f}, "
        f"length {line['response/length']:.0f}, {line['time/iteration']:.1f} s"
    )


def describe(c: PPOConfig, spec, prompts, slots: int, iterations: int, about: dict):
    """Prints the models, the prompts and the length of the run. slots: of the widest batch of prompts."""
    reward = f"; reward model: {c.reward} at step {about['reward_step']:,}" if c.reward else ""
    group = f", {spec.group_size} of each prompt" if spec.group_size > 1 else ""
    rows = c.ppo.microbatch_size or c.batch_size // c.ppo.minibatches
    hosts.say(
        f"policy and reference: {c.policy} at step {about['policy_step']:,}{reward}\n"
        f"{len(prompts.ids):,} prompts of up to {slots} tokens{prompts.left_out.describe()}; responses of up to "
        f"{spec.response}; {iterations} iterations of {c.batch_size} episodes{group}, {c.ppo.epochs} x "
        f"{c.ppo.minibatches} steps each{pipeline.describe(spec.policy, spec.mesh.shape, rows)}"
    )


def warn_of_warmup(c: PPOConfig, iterations: int):
    """Prints a warning if the learning rate never reaches its peak."""
    if iterations <= c.rate.warmup:
        hosts.say(
            f"warning: the run ends within its warm-up (rate.warmup={c.rate.warmup} iterations): the learning rate "
            f"never exceeds {c.rate.fraction(iterations - 1, iterations):.0%} of its peak."
        )
