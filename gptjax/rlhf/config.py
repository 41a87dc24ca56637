"""The settings of PPO that are its own, by what they govern; gptjax/ppo.py gathers them."""

import dataclasses

from gptjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """coefficient: beta of the per-token KL penalty. target: nats per sequence that an adaptive coefficient steers
    to (Ziegler et al. 2019 §2.2), None = fixed; horizon: of that controller, in episodes."""

    coefficient: float = 0.02
    target: float | None = None
    horizon: float = 10_000.0

    def __post_init__(self):
        if self.coefficient < 0 or (self.target is not None and self.target <= 0) or self.horizon <= 0:
            raise InputError("kl: coefficient >= 0, target > 0 or None, horizon > 0.")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """max_new_tokens: R, slots of a response. temperature: of sampling and of every log-probability; there is no top-k
    or top-p: the log-probabilities would be another distribution's. missing_eos: score of a response without
    end-of-text, in place of its own; None = its own. gamma, lam: of GAE. forward_rows: responses scored in one forward
    pass; None = all."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    missing_eos: float | None = -1.0
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    forward_rows: int | None = None

    def __post_init__(self):
        if self.top_k != 0 or self.top_p != 1.0:
            raise InputError(
                f"rollout.top_k={self.top_k} and rollout.top_p={self.top_p}: PPO samples from the whole distribution, "
                "or its log-probabilities are another one's and the KL turns negative. Leave them at 0 and 1."
            )
        if self.max_new_tokens < 1 or not self.temperature > 0:
            raise InputError("rollout: max_new_tokens is at least 1 and temperature above 0.")
        if not (0 <= self.gamma <= 1 and 0 <= self.lam <= 1):
            raise InputError("rollout: gamma and lam lie in [0, 1].")


@dataclasses.dataclass(frozen=True)
class RateConfig:
    """Learning rates over iterations: linear from warmup_start x peak over `warmup` iterations, then 'constant' or
    'linear' to 0 at the end."""

    kind: str = "constant"
    warmup: int = 0
    warmup_start: float = 0.1

    def __post_init__(self):
        if self.kind not in ("constant", "linear") or self.warmup < 0 or not 0 <= self.warmup_start <= 1:
            raise InputError("rate: kind is constant or linear, warmup >= 0, warmup_start in [0, 1].")

    def fraction(self, iteration: int, iterations: int) -> float:
        if iteration < self.warmup:
            return self.warmup_start + (1 - self.warmup_start) * iteration / self.warmup
        if self.kind == "constant":
            return 1.0
        return 1 - (iteration - self.warmup) / max(iterations - self.warmup, 1)


@dataclasses.dataclass(frozen=True)
class PtxConfig:
    """Pre-training text of PPO-ptx. per_episode: sequences for each episode of the minibatch (InstructGPT: 8).
    context_length: tokens of one; None = the model's. source: None = what the policy was pre-trained on. cache: local
    folder for the tokens of `source`, as data.cache of pre-training; None = `data` in the workdir."""

    per_episode: float = 8.0
    context_length: int | None = None
    source: str | None = None
    cache: str | None = None


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """every: iterations between evaluations of the policy's moving average; one more at the start and the end.
    source: held-out prompts; None = some of data's own. prompts: how many. lm_batches: batches of pre-training
    validation text whose loss is measured, where that text is at hand; 0 = none. samples: written to samples.jsonl.
    gold_fn: 'package.module:function' that is measured and never trained on, to see over-optimisation (Gao et al.
    2022)."""

    every: int = 10
    source: str | None = None
    prompts: int = 64
    lm_batches: int = 8
    samples: int = 8
    gold_fn: str | None = None

    def __post_init__(self):
        if self.every < 1 or self.prompts < 1 or self.lm_batches < 0 or self.samples < 0:
            raise InputError("eval: every and prompts are at least 1, lm_batches and samples at least 0.")
