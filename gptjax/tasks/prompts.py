"""K-shot prompts: a description, K solved examples, the question (Brown et al. 2020 §2.4, appendix G)."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gptjax.errors import InputError
from gptjax.tasks.task import Item, Task, find_pool, load_items, solved


class Prompts:
    """The K-shot prompts of a task.

    pool: the items that examples are drawn from, `items` itself where the pool's file is not there. source: the same in
    words. dropped: examples left out so far because the prompt was too long.
    """

    def __init__(self, task: Task, items: Sequence[Item], data: str, shots: int, seed: int):
        self.task, self.shots, self.seed, self.dropped = task, shots, seed, 0
        self._place = {id(item): i for i, item in enumerate(items)}
        files = find_pool(task, data) if shots or task.kind == "threshold" else []
        self._own = not files
        self.pool = load_items(task, *files) if files else items
        pool = ", ".join(Path(file).name for file in files) or "the evaluated items, without the one that is asked"
        drawn = "anew for each item" if task.fewshot == "per_item" else "once for all items"
        self.source = f"{shots} drawn {drawn} from {pool}" if shots else "none"
        if shots and not task.takes_examples:
            raise InputError(f"Task {task.name} scores whole texts, which have no examples: use --num_fewshot=0.")
        if shots > len(self.pool) - self._own:
            raise InputError(
                f"Task {task.name} has {len(self.pool) - self._own} items to draw examples from, fewer than "
                f"--num_fewshot={shots}: ask for fewer."
            )

    def before(self, item: Item, fits: Callable[[str], bool]) -> str:
        """What stands before an item's context: the description and the examples, without the first ones where all of
        them do not fit."""
        examples = [solved(self.task, self.pool[i]) for i in self._drawn(self._place[id(item)])]
        for first in range(len(examples) + 1):
            text = self.task.separator.join([*filter(None, [self.task.description]), *examples[first:], ""])
            if fits(text) or first == len(examples):
                self.dropped += first
                return text
        raise AssertionError("the loop returns without examples at the latest")

    def _drawn(self, asked: int) -> list[int]:
        """Places in the pool of the examples before the item in place `asked`: a function of the seed and the place."""
        if not self.shots:
            return []
        key = f"{self.seed}/{self.task.name}/{asked if self.task.fewshot == 'per_item' else 'all'}"
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
        drawn = rng.permutation(len(self.pool))[: self.shots + 1]
        return [int(i) for i in drawn if not (self._own and i == asked)][: self.shots]
