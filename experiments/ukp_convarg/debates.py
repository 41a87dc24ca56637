"""The judgements as pairs, the folds over topics, and the rows that gptjax.reward reads.

UKPConvArg (Habernal & Gurevych 2016): a file for each side of a debate, tab-separated id, label (a1 or a2 convinces
more), a1, a2. The two sides of a debate are one topic, and a topic is held out whole.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np

from gptjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Pair:
    """title: the debate's, what the arguments are about; better, worse: the arguments."""

    topic: str
    title: str
    better: str
    worse: str


def read(directory) -> list[Pair]:
    """Every judgement, in the order of the files. InputError: no such files, or a line of another form."""
    files = sorted(Path(directory).glob("*.csv"))
    if not files:
        raise InputError(f"{directory} holds no .csv files: name the folder of UKPConvArg's with --data.")
    return [pair for file in files for pair in _file_pairs(file)]


def _file_pairs(file: Path) -> list[Pair]:
    topic, _, side = file.stem.partition("_")
    title = f"{_words(topic)}: {_words(side)}"
    pairs = []
    for number, line in enumerate(file.read_text().split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) != 4 or fields[1] not in ("a1", "a2"):
            raise InputError(f"{file}:{number}: expected id, a1 or a2, and two arguments, with tabs between.")
        a1, a2 = (field.replace("<br/>", "\n").strip() for field in fields[2:])
        pairs.append(Pair(topic, title, a1, a2) if fields[1] == "a1" else Pair(topic, title, a2, a1))
    return pairs


def _words(name: str) -> str:
    return " ".join(name.replace("-", " ").split())


def folds(pairs: list[Pair], count: int, seed: int) -> list[tuple[str, ...]]:
    """The topics each fold holds out, every topic in one fold: dealt out in an order drawn from the seed."""
    topics = sorted({p.topic for p in pairs})
    if not 2 <= count <= len(topics):
        raise InputError(f"--folds={count}: there are {len(topics)} topics, so give 2 to {len(topics)}.")
    order = np.random.default_rng(seed).permutation(topics)
    return [tuple(sorted(map(str, order[i::count]))) for i in range(count)]


def write_rows(path: Path, pairs: list[Pair]):
    """The pairs as rows of gptjax.reward."""
    rows = ({"prompt": p.title, "chosen": p.better, "rejected": p.worse} for p in pairs)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
