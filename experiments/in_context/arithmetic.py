"""GPT-3's two-digit arithmetic, learned from solved questions in its exact format (Brown et al. 2020 §3.9.1).

A document has one to five solved questions of a task, each drawn uniformly from all pairs of operands but those of an
evaluated question, in either order: where "What is 98 plus 45?" is evaluated, neither 98 plus 45 nor 45 plus 98 is in
any document.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from gptjax.data.bpe import train_bpe
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.tasks import generators
from gptjax.tasks.files import find_files
from gptjax.tasks.generators import Row
from gptjax.tasks.items import load_items
from gptjax.tasks.task import load_task

TASKS = {"arithmetic_2da": "two-digit addition"}
MOST = 5  # questions of a document: the longest prompts are no longer than what was learned
CONTEXT = 100  # tokens, for MOST questions of at most 19
QUESTIONS = 2000  # for each task, where no files of them are given: as many as OpenAI's have
VOCABULARY = 282  # of `make_tokenizer`: 256 bytes, 25 merges, end-of-text


def make_tokenizer() -> Tokenizer:
    """A word is a token and so is a digit, the first one of a number together with the space before it: a question of
    two-digit numbers has 16 tokens, its answer up to 3."""
    return train_bpe([" What is plus minus " + " ".join("0123456789") + " -"] * 2, VOCABULARY)


def contexts(task: str, data: str) -> list[str]:
    """The questions of a task in the folder `data`, as the published task reads them. InputError: they are missing."""
    loaded = load_task(task)
    return [item.pairs[0][0] for item in load_items(loaded, *find_files(loaded, data, loaded.files))]


def write_questions(folder: Path, seed: int):
    """Files of QUESTIONS questions of each task, as OpenAI's."""
    for name in TASKS:
        generators.write(name, generators.arithmetic(name, QUESTIONS, seed), folder)


def operands(context: str) -> tuple[str, ...]:
    """The numbers of a question, the same for both orders."""
    return tuple(sorted(re.findall(r"\d+", context)))


def training_rows(task: str, asked: Iterable[str]) -> list[Row]:
    """All solved questions of a task but those with the operands of an asked one. asked: contexts.
    InputError: none is left."""
    taken = {operands(context) for context in asked}
    rows = [row for row in generators.arithmetic(task, 10**4) if operands(row["context"]) not in taken]
    if not rows:
        raise InputError(f"The questions of {task} leave none to learn from: evaluate fewer.")
    return rows


def documents(rows: Sequence[Row], n: int, seed: int) -> list[dict]:
    """n documents of one to MOST of the rows each, drawn uniformly, as rows {text}."""
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(rows), rng.integers(1, MOST + 1)) for _ in range(n))
    return [{"text": "".join(rows[i]["context"] + rows[i]["completion"] for i in some)} for some in drawn]
