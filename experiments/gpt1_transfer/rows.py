"""The labeled tasks of the study: rows to train on, rows to evaluate on, and the rows of the zero-shot heuristics.

Everything is written to one folder in the forms that gptjax.finetune and gptjax.tasks read. Of the training rows some
are drawn, once for all runs; all of the published development rows are evaluated on.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs import gpt1_finetune
from experiments.docstrings import task as docstrings
from gptjax.data import sources
from gptjax.data.tables import Table
from gptjax.errors import InputError

HERE = Path(__file__).parent
MULTIPLE_CHOICE = str(HERE / "multiple_choice.toml")


class Task(NamedTuple):
    """preset: of configs/gpt1_finetune.py. metric: the score of the table. chance: its value without any skill.
    max_length: tokens that a sequence is cut to. zero_shot: the task that has its heuristic, or None. files: the
    published training and development rows. data: settings where they are not the preset's. choices: sequences of an
    example, so of a task with fewer examples for as many tokens."""

    name: str
    preset: str
    metric: str
    chance: float
    max_length: int
    zero_shot: str | None
    files: tuple[str, str] = ("", "")
    data: dict[str, Any] = {}
    choices: int = 1


def _choice_of(*context: str) -> dict:
    """The settings of rows with a list of four choices. context: the fields that are joined to the text."""
    fields = {"context": ",".join(context), "choices": "choices", "label": "gold"}
    return {"form": "rows", "labels": "0,1,2,3", "fields": fields}


PUBLISHED = (
    Task("cola", "cola", "matthews", 0.0, 32, "cola_zero_shot", ("in_domain_train.tsv", "in_domain_dev.tsv")),
    Task("sst2", "sst2", "accuracy", 0.509, 48, "sst2_zero_shot", ("train_binary_sent.csv", "dev_binary_sent.csv")),
    Task("sick", "sick", "accuracy", 0.564, 48, None, ("SICK_train.txt", "SICK_trial.txt")),
    # The question before the story, which is cut to max_length at its end.
    Task("mctest", "mctest", "accuracy", 0.25, 96, MULTIPLE_CHOICE, ("mc500.train.tsv", "mc500.dev.tsv"),
         _choice_of("question", "story"), choices=4),
)  # chance: the share of the largest class of the development rows (SST-2, SICK), of a choice one in four
STDLIB = (
    Task("match", "rte", "accuracy", 0.5, 64, None, data={
        "labels": "match,mismatch", "fields": {"premise": "signature", "hypothesis": "summary", "label": "label"}}),
    Task("summary", "race", "accuracy", 0.25, 96, MULTIPLE_CHOICE, data=_choice_of("context"), choices=4),
)  # fmt: skip
CHOICES = 4


def prepare(data: str | None, folder: Path, most: int) -> tuple[Task, ...]:
    """Writes the rows of the tasks in the data folder, or of those of the standard library where data is None; returns
    the tasks. most: training examples of a task, of a multiple choice about as many tokens; 0 = all. InputError: the
    folder has none of the tasks, or only one of a task's files."""
    folder.mkdir(parents=True, exist_ok=True)
    if data is None:
        _write_stdlib(folder, most)
        return STDLIB
    tasks = tuple(t for t in PUBLISHED if (Path(data) / t.name).is_dir())
    if not tasks:
        names = ", ".join(t.name for t in PUBLISHED)
        raise InputError(f"{data} has no folder of a task: put the published files into some of {names} there.")
    for task in tasks:
        for split, file in zip(("train", "dev"), task.files, strict=True):
            source = Path(data) / task.name / file
            if not source.exists():
                raise InputError(f"{source} is missing: put the published {split} rows of {task.name} there.")
            _write_published(task, source, folder, split, most if split == "train" else 0)
    return tasks


def train_and_dev(task: Task, folder: Path) -> tuple[str, str]:
    """Paths of a task's rows."""
    return tuple(str(folder / f"{task.name}_{split}.jsonl") for split in ("train", "dev"))


def _write_published(task: Task, source: Path, folder: Path, split: str, most: int):
    if task.preset == "mctest":
        rows = list(_mctest_questions(source))
        if split == "dev":
            _write(folder / "multiple_choice.jsonl", ({**r, "context": f"{r['story']} {r['question']}"} for r in rows))
    else:
        settings = gpt1_finetune.TASKS[task.preset]
        columns = settings.get("columns")
        table = Table(settings.get("format"), columns and tuple(columns.split(",")))
        rows = [row.value for row in sources.rows(str(source), table=table)]
    _write(folder / f"{task.name}_{split}.jsonl", drawn(rows, share(task, most)))


def share(task: Task, most: int) -> int:
    """Examples of a task that have about as many tokens as `most` pairs of sentences; 0 = all. A choice's sequences
    are twice as long."""
    return -(-most // (2 * task.choices)) if task.choices > 1 else most


def _mctest_questions(source: Path) -> Iterable[dict]:
    """{story, question, choices, gold} of each of the four questions of each story."""
    answers = [line.split() for line in source.with_suffix(".ans").read_text().splitlines()]
    for line, letters in zip(source.read_text().splitlines(), answers, strict=True):
        _, _, story, *cells = line.split("\t")
        for i, letter in enumerate(letters):
            question, *choices = cells[5 * i : 5 * i + 5]
            question = question.partition(": ")[2] or question  # 'one: ' or 'multiple: '
            yield {"story": story.replace("\\newline", "\n"), "question": question, "choices": choices,
                   "gold": "ABCD".index(letter)}  # fmt: skip


def _write_stdlib(folder: Path, most: int):
    """Signatures and the summary lines of their docstrings: of one pair whether they belong together, and of four
    summaries which one does. The held-out ones are in files that pre-training on the same text holds out."""
    parts = docstrings.split(docstrings.examples(), seed=0)
    train = [e for name in docstrings.SHARES for e in parts[name]]
    for split, examples, number in (("train", train, most), ("dev", parts["evaluation"], 0)):
        pairs = [(e.prompt, e.summary) for e in examples]
        _write(folder / f"match_{split}.jsonl", drawn(matches(pairs), number))
        choices = drawn(multiple_choice(pairs), share(STDLIB[1], number))
        _write(folder / f"summary_{split}.jsonl", choices)
        if split == "dev":
            _write(folder / "multiple_choice.jsonl", choices)


def matches(pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """Half of the pairs as they are, and half with the summary of another one."""
    other = _others(pairs, 1)
    return [
        {"signature": signature, "summary": (summary, pairs[other[i, 0]][1])[i % 2],
         "label": ("match", "mismatch")[i % 2]}
        for i, (signature, summary) in enumerate(pairs)
    ]  # fmt: skip


def multiple_choice(pairs: Sequence[tuple[str, str]]) -> list[dict]:
    """Each pair's summary among three others, in place i % 4."""
    other, rows = _others(pairs, CHOICES - 1), []
    for i, (signature, summary) in enumerate(pairs):
        choices = [pairs[j][1] for j in other[i]]
        choices.insert(i % CHOICES, summary)
        rows.append({"context": signature, "choices": choices, "gold": i % CHOICES})
    return rows


def _others(pairs: Sequence, number: int) -> np.ndarray:
    """Places [pairs, number] of other pairs, no one twice in a row."""
    rng, n = np.random.default_rng(0), len(pairs)
    steps = np.stack([rng.choice(n - 1, number, replace=False) + 1 for _ in range(n)])
    return (np.arange(n)[:, None] + steps) % n


def drawn(rows: list, most: int) -> list:
    """`most` of the rows, at random but in order; all if most is 0."""
    if not most or most >= len(rows):
        return rows
    return [rows[i] for i in np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False))]


def _write(path: Path, rows: Iterable[dict]):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
