"""PPOConfig, the config of gptjax/ppo.py, and the sections that only it has."""

import dataclasses
import math

from gptjax import paths
from gptjax.data.prompts import PromptConfig
from gptjax.errors import InputError
from gptjax.model.spec import ModelOptions
from gptjax.objectives.ppo import MOST_KL_ERROR
from gptjax.ranges import BelowOne, Count, Positive, PositiveShare, Real, Share
from gptjax.training.checkpoint import CheckpointConfig
from gptjax.training.optimizer import OptimizerConfig
from gptjax.training.stage import RunConfig

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
class UpdateConfig:
    """The update: epochs x minibatches optimizer steps per iteration.

    epochs: passes over the episodes of an iteration.
    minibatches: optimizer steps of an epoch.
    microbatch_size: episodes whose gradients are computed at a time; None = the whole minibatch.
    clip: epsilon of the clipped policy loss.
    value_clip: epsilon of the clipped value loss.
    value_coefficient: weight of the value loss; it matters when policy and value share a trunk.
    normalize: what the policy and value losses are means over: 'token' (all actions of the minibatch) or 'sequence'
        (sums over each response, averaged over responses).
    ptx_coefficient: gamma of PPO-ptx; 0 = plain PPO.
    ptx_normalize: log pi(x) is a mean over tokens ('token') or summed over a sequence ('sequence'). The paper does not
        say which; the right scale of gamma depends on it.
    ema_decay: decay per iteration of the policy's exponential moving average, which evaluations and later stages use;
        0 = no average.
    """

    epochs: Count = 4
    minibatches: Count = 1
    microbatch_size: Count | None = None
    clip: Positive = 0.2
    value_clip: Positive = 0.2
    value_coefficient: float = 1.0
    normalize: str = "token"
    ptx_coefficient: float = 0.0
    ptx_normalize: str = "token"
    ema_decay: BelowOne = 0.992

    def __post_init__(self):
        if self.epochs < 1 or self.minibatches < 1:
            raise InputError("ppo.epochs and ppo.minibatches are at least 1.")
        if self.clip <= 0 or self.value_clip <= 0 or self.ptx_coefficient < 0 or not 0 <= self.ema_decay < 1:
            raise InputError("ppo: clip and value_clip > 0, ptx_coefficient >= 0, ema_decay in [0, 1).")
        for name in ("normalize", "ptx_normalize"):
            if getattr(self, name) not in ("token", "sequence"):
                raise InputError(f"ppo.{name}={getattr(self, name)!r}: choose token or sequence.")


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig(RunConfig):
    """Reinforcement learning. How long: steps (iterations), or episodes. Give `reward`, `reward_fn`, or both.

    steps: iterations of the run.
    batch_size: episodes (sampled responses) of an iteration.
    policy: workdir of the SFT run whose model is the initial policy and the reference.
    reward: workdir of the reward model.
    reward_fn: 'package.module:function', alone or added to the reward model's score.
    reward_on: what reward_fn gets, 'text' or 'tokens'.
    optimizer: of the policy.
    value_optimizer: of the separate value network, which is initialized from the reward model.
    shared_trunk: a value head on the policy's trunk, in place of a separate value network.
    offload: keep the two frozen models in host memory and bring them to the device to score.
    episodes: length of the run in sampled responses, if steps is not given.
    loss_chunk: time steps whose logits are held at once.
    """

    policy: str | None = paths.field()
    reward: str | None = paths.field()
    reward_fn: str | None = None
    reward_on: str = "text"
    model: ModelOptions = ModelOptions()
    data: PromptConfig = PromptConfig()
    rollout: RolloutConfig = RolloutConfig()
    ppo: UpdateConfig = UpdateConfig()
    kl: KLConfig = KLConfig()
    ptx: PtxConfig = PtxConfig()
    rate: RateConfig = RateConfig()
    optimizer: OptimizerConfig = OptimizerConfig(learning_rate=5e-6, weight_decay=0.0)
    value_optimizer: OptimizerConfig = OptimizerConfig(learning_rate=9e-6, weight_decay=0.0)
    shared_trunk: bool = False
    offload: bool = False
    checkpoint: CheckpointConfig = CheckpointConfig(every=10)
    eval: EvaluationConfig = EvaluationConfig()
    episodes: Count | None = None
    batch_size: Count = 512
    loss_chunk: Count = 128

    def __post_init__(self):
        rows, group = self.batch_size // self.ppo.minibatches, self.rollout.group_size
        if self.batch_size % self.ppo.minibatches:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of ppo.minibatches={self.ppo.minibatches}: change one."
            )
        if rows % (self.ppo.microbatch_size or rows):
            raise InputError(
                f"A minibatch of {rows} episodes is not a multiple of ppo.microbatch_size={self.ppo.microbatch_size}: "
                "change it, batch_size or ppo.minibatches."
            )
        if self.rollout.forward_rows is not None and self.batch_size % self.rollout.forward_rows:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of rollout.forward_rows={self.rollout.forward_rows}: "
                "change one."
            )
        if self.batch_size % group:
            raise InputError(
                f"batch_size={self.batch_size} is not a multiple of rollout.group_size={group}: change one."
            )
        if group > 1 and self.shared_trunk:
            raise InputError(f"rollout.group_size={group} is GRPO, which has no values: set shared_trunk to False.")
        if self.precision.scaled:
            raise InputError("PPO computes in float32 or bfloat16: set --config.precision.compute to one of them.")
        self.kl.check_batch(self.batch_size)
        if self.reward_on not in ("text", "tokens"):
            raise InputError(f"reward_on={self.reward_on!r}: choose text or tokens.")
