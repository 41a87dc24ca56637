"""Wall time of each phase of an iteration."""

import time

import jax


class Clock:
    """Seconds of each phase of an iteration. Each lap waits for its arrays, which costs little: an iteration takes
    seconds."""

    def __init__(self):
        self._began = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, phase: str, arrays):
        jax.block_until_ready(arrays)
        now = time.perf_counter()
        self.seconds[phase], self._last = now - self._last, now

    @property
    def total(self) -> float:
        return self._last - self._began

    def figures(self, mask, tokens) -> dict:
        """time/* in seconds; tokens_per_second/rollout counts sampled tokens, that of other phases all tokens."""
        sampled, all_tokens = float(mask.sum()), tokens.size
        result = {f"time/{k}": v for k, v in self.seconds.items()} | {"time/iteration": self.total}
        for phase, v in self.seconds.items():
            result[f"tokens_per_second/{phase}"] = (sampled if phase == "rollout" else all_tokens) / v
        return result
