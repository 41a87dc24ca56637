"""Length of a run, and batch size and learning rate as pure functions of the step.

All of it is closed-form arithmetic in Python floats: there is no state to save, and every host gets the same values.
"""

import bisect
import dataclasses
import math

from gptjax.errors import InputError
from gptjax.ranges import BelowOne, Positive, PositiveShare, Share

FEW_STEPS = 20  # Adam moves a weight by about the learning rate per step: with fewer a model hardly changes


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over tokens, and the batch-size ramp.

    kind: what follows the warm-up: 'cosine', 'linear' (both fall to final_fraction) or 'constant'; 'wsd' (warm-up,
        stable, decay: Hu et al. 2024 §4), which is constant and falls linearly over the last decay_fraction, so that
        runs of all lengths are one until they decay; or 'gpt1_linear', the schedule of GPT-1's fine-tuning code:
        x / warmup_fraction in the warm-up, then 1, all of it times 1 - x, where x is the fraction of the steps before
        this one. Its first step has a rate of 0.
    warmup_tokens: tokens over which the learning rate rises linearly from 0; 0 = no warm-up.
    warmup_fraction: the same as a fraction of the run, where warmup_tokens is 0.
    decay_tokens: where the decay ends, counted from the first token (GPT-3: 260B of 300B); None = the end of the run:
        the rate reaches final_fraction in the step after the last, so that no step of a decay to 0 has a rate of 0.
    decay_fraction: of 'wsd': the share of the run in which the rate falls.
    final_fraction: fraction of the peak learning rate at which the decay ends.
    ramp_tokens: tokens over which the batch grows linearly in tokens (GPT-3 appendix B: 4-12B); 0 = none.
    ramp_start_batch_tokens: tokens of a batch at the start of the ramp.
    ramp_full_batch_tokens: tokens of a batch at the end of the ramp, at most batch_size x context_length, which None
        stands for.
    """

    kind: str = "cosine"
    warmup_tokens: float = 0.0
    warmup_fraction: BelowOne = 0.0
    decay_tokens: Positive | None = None
    decay_fraction: PositiveShare = 0.1
    final_fraction: Share = 0.1
    ramp_tokens: float = 0.0
    ramp_start_batch_tokens: Positive = 32_000.0
    ramp_full_batch_tokens: Positive | None = None

    def __post_init__(self):
        if self.kind not in ("cosine", "linear", "constant", "wsd", "gpt1_linear"):
            raise InputError(f"schedule.kind={self.kind!r}: choose cosine, linear, constant, wsd or gpt1_linear.")
        if self.warmup_tokens and self.warmup_fraction:
            raise InputError("schedule has warmup_tokens and warmup_fraction: set one of them to 0.")
        if self.kind == "gpt1_linear" and self.warmup_tokens:
            raise InputError("schedule.kind='gpt1_linear' has its warm-up as schedule.warmup_fraction: give that.")
        if self.warmup_tokens < 0 or self.ramp_tokens < 0 or not 0 <= self.final_fraction <= 1:
            raise InputError("schedule: warmup_tokens and ramp_tokens are >= 0, final_fraction is in [0, 1].")


class Schedule:
    """Steps are counted from 0; a step's batch is sequences_before(step) .. sequences_before(step + 1).

    Under the ramp the batch B(n) after n tokens grows linearly, dB/dn = (B1 - B0)/T. The tokens seen after t
    steps solve dn/dt = B(n): n(t) = T B0/(B1 - B0) (exp(t (B1 - B0)/T) - 1). The ramp therefore takes
    T/(B1 - B0) ln(B1/B0) steps: 17,444 for GPT-3 175B. Offsets are rounded to whole sequences, so no token
    is dropped or doubled and any step's batch can be found without the ones before it.
    """

    def __init__(self, config: ScheduleConfig, *, batch_size, context_length, learning_rate, steps=None, tokens=None):
        self.config, self.context_length, self.batch_size = config, context_length, batch_size
        self.peak = learning_rate
        capacity = float(batch_size * context_length)
        self.full = capacity
        if config.ramp_tokens:
            self.full = min(config.ramp_full_batch_tokens or capacity, capacity)
        self.start = min(config.ramp_start_batch_tokens, self.full)
        if config.ramp_tokens and self.start < context_length:
            raise InputError("schedule.ramp_start_batch_tokens is less than one sequence (model.context_length).")
        self.ramping = bool(config.ramp_tokens) and self.start < self.full
        self.ramp_steps = self._ramp_length() if self.ramping else 0.0
        if steps is None:
            if tokens is None:
                raise InputError("Say how long to train: --config.steps, --config.tokens or --config.epochs.")
            steps = math.ceil(self._steps_for(tokens) - 1e-9)
        if steps < 1:
            raise InputError(f"The run has {steps} steps; it needs at least one.")
        self.steps = int(steps)
        self.warmup_tokens = config.warmup_tokens or config.warmup_fraction * self.total_tokens

    def _ramp_length(self):
        grow = self.full - self.start
        return self.config.ramp_tokens / grow * math.log1p(grow / self.start)  # exact for nearly equal ends too

    def _steps_for(self, tokens):
        if not self.ramping:
            return tokens / self.full
        if tokens >= self.config.ramp_tokens:
            return self.ramp_steps + (tokens - self.config.ramp_tokens) / self.full
        grow = (self.full - self.start) / self.config.ramp_tokens
        return math.log1p(tokens * grow / self.start) / grow

    def _tokens_at(self, step):
        if not self.ramping:
            return step * self.full
        if step >= self.ramp_steps:
            return self.config.ramp_tokens + (step - self.ramp_steps) * self.full
        grow = (self.full - self.start) / self.config.ramp_tokens
        return self.start / grow * math.expm1(step * grow)

    def sequences_before(self, step: int) -> int:
        return round(self._tokens_at(step) / self.context_length)

    def sequences(self, step: int) -> int:
        return self.sequences_before(step + 1) - self.sequences_before(step)

    def tokens_before(self, step: int) -> int:
        return self.sequences_before(step) * self.context_length

    @property
    def total_tokens(self) -> int:
        return self.tokens_before(self.steps)

    def learning_rate(self, step: int) -> float:
        """The rate of a step. In the warm-up it depends on the tokens seen after the step, so that the first rate is
        above 0; later on those seen before it, so that the last is too (as in torch and nanoGPT: 1 - t/T, t < T)."""
        if self.config.kind == "gpt1_linear":
            return self.peak * gpt1_linear(step / self.steps, self.config.warmup_fraction)
        after = self.tokens_before(step + 1)
        if after >= self.warmup_tokens:
            after = max(self.tokens_before(step), self.warmup_tokens)
        return self.peak * self.fraction(after)

    def warnings(self) -> list[str]:
        """Warnings, a sentence each: few steps, a run within its warm-up, a learning rate of 0."""
        found = []
        if self.steps < FEW_STEPS:
            found.append(
                f"the run has only {self.steps} optimizer step{'s' * (self.steps > 1)}, which hardly move the weights "
                "from where they began: give more data, more epochs (--config.epochs) or a smaller --config.batch_size."
            )
        top = self.fraction(self.total_tokens)
        if self.total_tokens < self.warmup_tokens:
            found.append(
                f"the run ends within its warm-up (schedule.warmup_tokens={self.warmup_tokens:,.0f}, "
                f"{self.total_tokens:,} in all): the learning rate never exceeds {top:.1%} of its peak."
            )
        if self.learning_rate(self.steps - 1) == 0:
            first = bisect.bisect_left(range(self.steps), True, key=lambda step: self.learning_rate(step) == 0)
            found.append(
                f"the learning rate is 0 from step {first + 1:,} of {self.steps:,} on, which change nothing: raise "
                "schedule.decay_tokens or schedule.final_fraction, or train for fewer steps."
            )
        return found

    def fraction(self, tokens: float) -> float:
        """Learning rate as a fraction of its peak after `tokens` tokens; the decay starts at the end of the warm-up, of
        'wsd' not before the last decay_fraction."""
        c, warmup = self.config, self.warmup_tokens
        if tokens < warmup:
            return tokens / warmup
        if c.kind == "constant":
            return 1.0
        end = c.decay_tokens or self.total_tokens
        begin = max(warmup, end * (1 - c.decay_fraction)) if c.kind == "wsd" else warmup
        x = min(max((tokens - begin) / max(end - begin, 1e-9), 0.0), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * x)) if c.kind == "cosine" else 1 - x
        return c.final_fraction + (1 - c.final_fraction) * fall


def gpt1_linear(x: float, warmup: float) -> float:
    """`warmup_linear` of openai/finetune-transformer-lm: the factor 1 - x applies within the warm-up too. x: fraction
    of the steps done."""
    return (x / warmup if x <= warmup and warmup else 1.0) * (1 - x)
