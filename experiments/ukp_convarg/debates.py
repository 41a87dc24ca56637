"""The judgments as pairs, the folds over topics, and the rows that gptjax.reward reads.

UKPConvArg (Habernal & Gurevych 2016): a file for each side of a debate, tab-separated id, label (a1 or a2 convinces
more), a1, a2. The two sides of a debate are one topic, and a topic is held out whole.
"""

import dataclasses
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np

from gptjax import json_files
from gptjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Pair:
    """title: the debate's, what the arguments are about; better, worse: the arguments."""

    topic: str
    title: str
    better: str
    worse: str


def read(directory) -> list[Pair]:
    """Every judgment, in the order of the files. InputError: no such files, or a line of another form."""
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


def arguments(pairs: list[Pair]) -> list[str]:
    """Each text once."""
    return sorted({text for p in pairs for text in (p.better, p.worse)})


def folds(pairs: list[Pair], count: int, seed: int) -> list[tuple[str, ...]]:
    """The topics each fold holds out, every topic in one fold: dealt out in an order drawn from the seed."""
    topics = sorted({p.topic for p in pairs})
    if not 2 <= count <= len(topics):
        raise InputError(f"--folds={count}: there are {len(topics)} topics, so give 2 to {len(topics)}.")
    order = np.random.default_rng(seed).permutation(topics)
    return [tuple(sorted(map(str, order[i::count]))) for i in range(count)]


def ranked_lists(pairs: list[Pair], k: int, seed: int) -> list[dict]:
    """Rows of gptjax.reward: up to k arguments of which every two were judged, in the order of the judgments.

    The lists hold every judgment at least once and no other, so that an argument is forwarded once for up to k - 1 of
    its judgments. Left out are pairs of texts that were judged both ways.
    """
    by_title = defaultdict(set)
    for p in pairs:
        by_title[p.title].add((p.better, p.worse))
    rng = np.random.default_rng(seed)
    rows = []
    for title, beats in sorted(by_title.items()):
        beats = {(a, b) for a, b in beats if (b, a) not in beats}
        rows += [{"prompt": title, "completions": texts, "ranks": list(range(len(texts)))}
                 for texts in _lists(beats, k, rng)]  # fmt: skip
    return rows


def _lists(beats: set, k: int, rng):
    """Greedily: a pair that is in no list yet, and by and by the argument that brings most such pairs."""
    judged = defaultdict(set)
    for a, b in beats:
        judged[a].add(b)
        judged[b].add(a)
    order, left = sorted(beats), {frozenset(pair) for pair in beats}
    for number in rng.permutation(len(beats)):
        texts = list(order[number])
        if frozenset(texts) not in left:
            continue
        while len(texts) < k:
            fitting = [t for t in sorted(set.intersection(*(judged[x] for x in texts))) if in_order([*texts, t], beats)]
            gains = [sum(frozenset((t, x)) in left for x in texts) for t in fitting]
            if max(gains, default=0) == 0:
                break
            texts.append(fitting[int(np.argmax(gains))])
        left -= {frozenset(pair) for pair in itertools.combinations(texts, 2)}
        yield in_order(texts, beats)


def in_order(texts, beats) -> list[str] | None:
    """From best to worst, or None where the judgments go round in a circle."""
    wins = {t: sum((t, other) in beats for other in texts) for t in texts}
    ordered = sorted(texts, key=wins.get, reverse=True)
    return ordered if sorted(wins.values()) == list(range(len(texts))) else None


def write_rows(path: Path, rows: list[dict]):
    path.parent.mkdir(parents=True, exist_ok=True)
    json_files.write_json_lines(path, rows)
