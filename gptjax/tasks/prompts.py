"""K-shot prompts: a description, K solved examples, the question (Brown et al. 2020 §2.4, appendix G)."""

import bisect
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from gptjax.errors import InputError
from gptjax.tasks.files import find_pool
from gptjax.tasks.items import load_items
from gptjax.tasks.task import Item, Task, solved


class Prompts:
    """The K-shot prompts of a task.

    pool: the items that examples are drawn from, `items` itself where the pool's file is not there (own). source: the
    same in words. dropped: examples left out so far because the prompt was too long. An example is an item, or a whole
    group of them (Item.group).
    """

    def __init__(self, task: Task, items: Sequence[Item], data: str, shots: int, seed: int):
        self.task, self.shots, self.seed, self.dropped = task, shots, seed, 0
        self._place = {id(item): i for i, item in enumerate(items)}
        files = find_pool(task, data) if shots or task.kind == "threshold" else []
        self.own = not files
        self.pool = load_items(task, *files) if files else items
        self._groups, self._group = grouped(self.pool), group_numbers(items)
        pool = ", ".join(Path(file).name for file in files) or "the evaluated items, without the one that is asked"
        drawn = "anew for each item" if task.fewshot == "per_item" else "once for all items"
        self.source = f"{shots} drawn {drawn} from {pool}" if shots else "none"
        if shots and not task.takes_examples:
            raise InputError(f"Task {task.name} has no solved examples to show: use --num_fewshot=0.")
        if shots > (there := len(self._groups) - self.own):
            raise InputError(
                f"Task {task.name} has {there} items to draw examples from, fewer than "
                f"--num_fewshot={shots}: ask for fewer."
            )

    def before(self, item: Item, fits: Callable[[str], bool]) -> str:
        """What stands before an item's context: the description and the examples, without the first ones where all of
        them do not fit."""
        examples = [solved(self.task, group) for group in self._drawn(item)]
        text = lambda first: self.task.separator.join([*filter(None, [self.task.description]), *examples[first:], ""])
        if not examples or fits(text(0)):
            return text(0)
        # Bisection, as every trial encodes the whole prompt; without examples it is taken as it is.
        first = 1 + bisect.bisect_left(range(1, len(examples)), True, key=lambda first: fits(text(first)))
        self.dropped += first
        return text(first)

    def _drawn(self, asked: Item) -> list[list[Item]]:
        """The groups that are the examples of an item, never its own: a function of the seed and the item's place."""
        if not self.shots:
            return []
        place = self._place[id(asked)]
        key = f"{self.seed}/{self.task.name}/{place if self.task.fewshot == 'per_item' else 'all'}"
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little"))
        drawn = rng.permutation(len(self._groups))[: self.shots + 1]
        own = self._group[place] if self.own else None
        return [self._groups[i] for i in drawn if i != own][: self.shots]


def grouped(items: Sequence[Item]) -> list[list[Item]]:
    """Items by their group, in the order of their first ones; an item without a group is one by itself."""
    groups: dict = {}
    for i, item in enumerate(items):
        groups.setdefault(item.group or i, []).append(item)
    return list(groups.values())


def group_numbers(items: Sequence[Item]) -> np.ndarray:
    """int [items]: the place of each one's group in `grouped`."""
    return _numbered([item.group or i for i, item in enumerate(items)])


def cluster_numbers(items: Sequence[Item]) -> np.ndarray:
    """int [items]: the unit of the standard errors that each one is part of, from 0."""
    return _numbered([item.cluster or item.group or i for i, item in enumerate(items)])


def _numbered(names: Sequence) -> np.ndarray:
    numbers: dict = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])
