"""K-shot prompts: a description, K solved examples, the question (Brown et al. 2020 §2.4, appendix G)."""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np

from gptjax.errors import InputError
from gptjax.tasks.task import Item, Task, find_file, load_items, solved


class Prompts:
    """The K-shot prompts of a task.

    source: where examples come from, in words. dropped: examples left out so far because the prompt was too long."""

    def __init__(self, task: Task, items: Sequence[Item], data: str | None, shots: int, seed: int):
        self.task, self.shots, self.seed, self.dropped = task, shots, seed, 0
        self._own = data is None
        self._pool = items if self._own or not shots else load_items(task, find_file(task, data, task.pool))
        self._index = {id(item): i for i, item in enumerate(items)} if self._own else {}
        pool = "the evaluated items, without the one that is asked" if self._own else ", ".join(task.pool)
        drawn = "anew for each item" if task.fewshot == "per_item" else "once for all items"
        self.source = f"{shots} drawn {drawn} from {pool}" if shots else "none"
        if shots and task.kind == "text":
            raise InputError(f"Task {task.name} scores whole texts, which have no examples: use --num_fewshot=0.")
        if shots > len(self._pool) - self._own:
            raise InputError(
                f"Task {task.name} has {len(self._pool) - self._own} items to draw examples from, fewer than "
                f"--num_fewshot={shots}: ask for fewer."
            )

    def before(self, item: Item, fits: Callable[[str], bool]) -> str:
        """What stands before an item's context: the description and the examples, without the first ones where all of
        them do not fit."""
        examples = [solved(self.task, self._pool[i]) for i in self._drawn(item)]
        for first in range(len(examples) + 1):
            text = self.task.separator.join([*filter(None, [self.task.description]), *examples[first:], ""])
            if fits(text) or first == len(examples):
                self.dropped += first
                return text
        raise AssertionError("the loop returns without examples at the latest")

    def _drawn(self, item: Item) -> list[int]:
        own = self._index.get(id(item), -1)
        if not self.shots:
            return []
        key = own if self.task.fewshot == "per_item" and self._own else item.where
        digest = hashlib.sha256(f"{self.seed}/{self.task.name}/{key}".encode()).digest()
        fixed = self.task.fewshot == "fixed"
        rng = np.random.default_rng(self.seed if fixed else int.from_bytes(digest[:8], "little"))
        drawn = rng.permutation(len(self._pool))[: self.shots + 1]
        return [int(i) for i in drawn if i != own][: self.shots]
