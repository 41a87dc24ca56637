"""PPO's own config sections, one dataclass each; gptjax/ppo.py puts them together."""

import dataclasses
import math

from gptjax import paths
from gptjax.errors import InputError
from gptjax.objectives.ppo import MOST_KL_ERROR
from gptjax.ranges import Count, Positive, PositiveShare, Real, Share

# Below it log-probabilities are 0 or very negative, and their gradients overflow.
_LEAST_TEMPERATURE = 0.01


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """KL penalty against the reference model.

    coefficient: beta of the per-token KL penalty; 0 = none.
    target: nats per sequence that an adaptive coefficient steers to (Ziegler et al. 2019 §2.2); None = fixed.
    horizon: time constant of the adaptive coefficient, in episodes; it must exceed a fifth of batch_size.
    """

    coefficient: float = 0.02
    target: Positive | None = None
    horizon: Positive = 10_000.0

    def __post_init__(self):
        if not 0 <= self.coefficient < math.inf:  # NaN fails these comparisons too
            raise InputError(f"kl.coefficient={self.coefficient}: give a finite number, 0 for no penalty.")
        if not 0 < self.horizon < math.inf:
            raise InputError(f"kl.horizon={self.horizon}: give a number of episodes above 0.")
        if self.target is not None and not 0 < self.target < math.inf:
            raise InputError(f"kl.target={self.target}: give nats per sequence above 0; None keeps the coefficient.")
        if self.target is not None and self.coefficient == 0:
            raise InputError(
                "kl.target with kl.coefficient=0: the coefficient is multiplied by a factor, so it would stay 0; give "
                "one to start from, as --config.kl.coefficient=0.02."
            )

    def check_batch(self, episodes: int):
        """Raises InputError if an iteration of so many episodes could multiply the adaptive coefficient by 0 or less,
        which would reward the policy for leaving the reference."""
        if self.target is not None and MOST_KL_ERROR * episodes >= self.horizon:
            raise InputError(
                f"kl.horizon={self.horizon:g} with batch_size={episodes}: one iteration could turn the adaptive KL "
                f"coefficient negative; give a horizon above {MOST_KL_ERROR * episodes:g} episodes (Ziegler et al. "
                "2019 have 10,000 for batches of 512), or a smaller batch_size."
            )


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Sampling and advantages. Top-k and top-p are not supported: sampled tokens would not follow the policy's
    log-probabilities.

    max_new_tokens: R, slots of a response.
    group_size: samples of each prompt; more than 1 makes it GRPO (Shao et al. 2024): advantages against the others of a
        prompt, no value network, the KL penalty in the loss.
    temperature: of sampling and of every log-probability.
    top_k: must be 0.
    top_p: must be 1.
    missing_eos: score of a response without end-of-text, in place of its own; None = its own.
    gamma: discount of GAE.
    lam: lambda of GAE.
    whiten_rewards: rewards are divided by their standard deviation (Ziegler et al. 2019).
    whiten_advantages: advantages get mean 0 and standard deviation 1.
    forward_rows: responses scored in one forward pass; None = all.
    """

    max_new_tokens: Count = 64
    group_size: Count = 1
    temperature: Positive = 1.0
    top_k: int = 0
    top_p: PositiveShare = 1.0
    missing_eos: Real | None = -1.0
    gamma: Share = 1.0
    lam: Share = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    forward_rows: Count | None = None

    def __post_init__(self):
        if self.top_k != 0 or self.top_p != 1.0:
            raise InputError(
                f"rollout.top_k={self.top_k} and rollout.top_p={self.top_p}: PPO samples from the whole distribution, "
                "because otherwise its log-probabilities are wrong and the KL turns negative. Leave them at 0 and 1."
            )
        if self.max_new_tokens < 1:
            raise InputError(f"rollout.max_new_tokens={self.max_new_tokens}: give at least 1.")
        if not _LEAST_TEMPERATURE <= self.temperature < math.inf:
            raise InputError(
                f"rollout.temperature={self.temperature}: give at least {_LEAST_TEMPERATURE}; PPO needs samples that "
                "differ and log-probabilities that are finite."
            )
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise InputError("rollout: gamma and lam are in [0, 1].")


@dataclasses.dataclass(frozen=True)
class RateConfig:
    """Learning rates over iterations. No iteration has a rate of 0.

    kind: what follows the warm-up: 'constant', or 'linear', which would reach 0 in the iteration after the last.
    warmup: iterations over which the rate rises linearly to its peak; 0 = no warm-up.
    warmup_start: fraction of the peak at which the warm-up starts.
    """

    kind: str = "constant"
    warmup: int = 0
    warmup_start: Share = 0.1

    def __post_init__(self):
        if self.kind not in ("constant", "linear") or self.warmup < 0 or not 0 <= self.warmup_start <= 1:
            raise InputError("rate: kind is constant or linear, warmup >= 0, warmup_start in [0, 1].")
        if self.warmup and not self.warmup_start:
            raise InputError("rate.warmup_start=0: the first iteration would change nothing. Set it above 0.")

    def fraction(self, iteration: int, iterations: int) -> float:
        if iteration < self.warmup:
            return self.warmup_start + (1 - self.warmup_start) * iteration / self.warmup
        if self.kind == "constant":
            return 1.0
        return 1 - (iteration - self.warmup) / max(iterations - self.warmup, 1)


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """Pre-training text of PPO-ptx, which ppo.ptx_coefficient turns on.

    per_episode: sequences for each episode of the minibatch (InstructGPT: 8).
    context_length: tokens of a sequence; None = the model's.
    source: None = what the policy was pre-trained on.
    cache: local folder for the tokens, as data.cache of pre-training; None = `data` in the workdir, or the folder of
        that pre-training if there is no `source`.
    """

    per_episode: Positive = 8.0
    context_length: Count | None = None
    source: str | None = paths.field(paths.SOURCE)
    cache: str | None = paths.field()


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out prompts, if `source` names some.

    every: iterations between evaluations of the policy's moving average; it is also evaluated at the start and the end.
    source: held-out prompts; None = the prompts that are trained on, of which none are held out.
    prompts: how many prompts are answered, rounded up to a number that divides over the devices and groups.
    lm_batches: batches of pre-training validation text whose loss is measured, if that text is available; 0 = none.
    samples: how many responses are written to samples.jsonl.
    gold_fn: 'package.module:function', a reward that is measured but not trained on, to detect over-optimization (Gao
        et al. 2022).
    """

    every: Count = 10
    source: str | None = paths.field(paths.SOURCE)
    prompts: Count = 64
    lm_batches: int = 8
    samples: int = 8
    gold_fn: str | None = None

    def __post_init__(self):
        if self.every < 1 or self.prompts < 1 or self.lm_batches < 0 or self.samples < 0:
            raise InputError("eval: every and prompts are at least 1, lm_batches and samples at least 0.")
