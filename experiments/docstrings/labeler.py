"""The labeler: how good a summary line is for a signature, by rules; its scores are the gold truth.

The rules are what PEP 257 (docstring conventions) and PEP 8 ask for and a program can check, and a few of ours
against degenerate text. They score the form and whether the line is about its signature, not whether it is true.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import numpy as np

from gptjax.errors import InputError

LOWEST, HIGHEST = -2.0, 2.0

# Base forms that open the summaries of the standard library, and common ones besides.
VERBS = frozenset(
    """
    abort accept accumulate acquire activate adapt add adjust advance allow append apply arrange ask assemble assert
    assign assume attach attempt authenticate begin bind block bootstrap build bump cache calculate call cancel
    capture chain change check choose clean clear clone close coerce collapse collect combine comment compare compile
    compress compute concatenate configure connect construct consume convert copy count create customize deactivate
    decide declare decode decompress decrement decrypt define delegate delete describe deserialize destroy detach
    detect determine disable disassemble discard disconnect dismiss dispatch display divide do download draw dump emit
    enable encode encrypt ensure enter enumerate escape evaluate examine execute exit expand export express extend
    extract fail feed fetch fill filter finalize find finish flush fold force format free gather generate get give go
    group guess handle hash help hide highlight identify ignore implement import increment indent indicate inform
    inherit initialize initialize initiate inject insert inspect install instantiate instruct interleave interpret
    intersect invalidate invert invoke issue iterate join keep kill launch leave let limit link list load locate lock
    log look lower make manage map mark match measure merge modify move multiply negate normalize notify observe
    obtain open optimize output overload override pack pad parse pass patch pause peek perform permit pickle place pop
    populate post prepare prepend print process produce prompt provide prune pull push put quantize query quote raise
    read reap rebuild recalculate receive recompute reconfigure record redirect reduce refactor reformat refresh
    register reject release reload remember remove rename render reopen repeat replace report represent request
    require reschedule reset resize resolve restart restore resume retrieve return reverse rewind rewrite rotate round
    run sanitize save scale scan schedule scroll search seek select send separate serialize serve set shift show
    shrink shuffle shut shutdown signal simulate skip sleep slice sort spawn specify split start stop store strip
    submit subscribe substitute subtract suggest sum supply support suspend swap switch synchronize take tell
    terminate test throw toggle tokenize track transfer transform translate transmit traverse trigger trim truncate
    try turn unbind undo uninstall unlock unmap unpack unquote unregister unset unwrap update upgrade upload use
    validate verify visit wait wake walk warn work wrap write yield zip
    """.split()
)
_FUNCTION_WORDS = frozenset("a an and are as at be by for from if in is it its of on or that the this to with".split())
_TOKEN = re.compile(
    r"""[("'`\[<*]*_{0,2}[A-Za-z0-9]+(?:[-'_./=]+[A-Za-z0-9]+)*_{0,2}(?:\(\))?["'`)\]>*]*[.,;:!?]{0,3}["')]?"""
)
_WORD = re.compile(r"[A-Za-z]+")
_PARTS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_DEFINITION = re.compile(r"(?:class (?P<owner>\w+): )?(?P<kind>async def|def|class) (?P<name>\w+)")
_ARGUMENT = re.compile(r"[(,]\s*\*{0,2}(\w+)")


def imperative(signature: str, summary: str) -> float:
    """A command ('Return', 'Close'), maybe after an adverb, begins it: a base form, not 'Returns' or 'Returning'.

    A class has no effect to command: its summary may begin with anything but a verb's other form or 'This'.
    """
    words = [word.lower() for word in _WORD.findall(summary)[:2]]
    if len(words) == 2 and words[0].endswith("ly") and words[0] not in VERBS:
        del words[0]
    if not words:
        return 0.0
    if _about(signature).is_class:
        return float(words[0] != "this" and (words[0] in VERBS or not _base_forms(words[0]) & VERBS))
    return float(words[0] in VERBS)


def capital(signature: str, summary: str) -> float:
    """Its first character is a capital letter."""
    return float(summary[:1].isupper())


def full_stop(signature: str, summary: str) -> float:
    """It ends with one full stop."""
    return float(summary.endswith(".") and not summary.endswith(".."))


def one_line(signature: str, summary: str) -> float:
    """It fits on one line."""
    return float(bool(summary) and len(summary.splitlines()) == 1)


def length(signature: str, summary: str) -> float:
    """1 at 20 to 72 characters (PEP 8's limit for docstring lines), falling to 0 at 5 and at 120."""
    return float(np.interp(len(summary), (5, 20, 72, 120), (0.0, 1.0, 1.0, 0.0)))


def no_repetition(signature: str, summary: str) -> float:
    """1 less twice the share of repeated words ('the' and its like aside) or of repeated pairs of words."""
    words = _WORD.findall(summary.lower())
    content = [word for word in words if word not in _FUNCTION_WORDS]
    pairs = list(zip(words, words[1:], strict=False))
    shares = [1 - len(set(items)) / len(items) for items in (content, pairs) if items]
    return max(0.0, 1 - 2 * max(shares)) if shares else 0.0


def about_signature(signature: str, summary: str) -> float:
    """Words of the name and arguments that it mentions, of half as many as the name has; 1 once so many are there."""
    about = _about(signature)
    stems = {_stem(word) for word in _PARTS.findall(summary)}
    mentioned = sum(any(_alike(word, stem) for stem in stems) for word in about.name | about.arguments)
    return min(1.0, mentioned / max(1.0, len(about.name) / 2))


def prose(signature: str, summary: str) -> float:
    """The share of its tokens that look like words, halved by an open bracket or quote; 0 if not ASCII."""
    tokens = summary.split()
    if not tokens or not summary.isascii():
        return 0.0
    balanced = all(summary.count(a) == summary.count(b) for a, b in ("()", "[]", "{}"))
    balanced = balanced and summary.count('"') % 2 == summary.count("`") % 2 == 0
    share = sum(bool(_TOKEN.fullmatch(token)) for token in tokens) / len(tokens)
    return share if balanced else share / 2


# (name, weight, function of signature and summary to [0, 1])
RULES = [
    # PEP 257: it "prescribes the function or method's effect as a command"; what holds for a class is ours
    ("imperative", 3.0, imperative),
    # PEP 8, on comments: "its first word should be capitalized"
    ("capital", 1.0, capital),
    # PEP 257: "a phrase ending in a period"
    ("full_stop", 2.0, full_stop),
    # PEP 257: "it is important that it fits on one line"
    ("one_line", 1.0, one_line),
    # PEP 8: the line length of docstrings "should be limited to 72 characters"; that it not be too short is ours
    ("length", 1.0, length),
    # Ours
    ("no_repetition", 2.0, no_repetition),
    # Ours; PEP 257 only asks that it not be "a signature reiterating the function/method parameters"
    ("about_signature", 3.0, about_signature),
    # Ours; PEP 8 asks comments to be "complete sentences"
    ("prose", 2.0, prose),
]


def gold_score(signature: str, summary: str) -> float:
    """The weighted mean of RULES scaled to [-2, 2]: 2 keeps every rule, -2 none, as does an empty summary."""
    if not summary.strip():
        return LOWEST
    values = explain(signature, summary)
    mean = sum(weight * values[name] for name, weight, _ in RULES) / sum(weight for _, weight, _ in RULES)
    return LOWEST + (HIGHEST - LOWEST) * mean


def gold_scores(prompts: Sequence[str], summaries: Sequence[str]) -> list[float]:
    """gold_score of each, as a reward function of gptjax.ppo is called (rlhf/rewards.py)."""
    return [gold_score(prompt, summary) for prompt, summary in zip(prompts, summaries, strict=True)]


def explain(signature: str, summary: str) -> dict[str, float]:
    """The value of each of RULES, in [0, 1]; space around the summary doesn't count."""
    return {name: rule(signature, summary.strip()) for name, _, rule in RULES}


def plackett_luce_ranks(scores: Sequence[float], rng: np.random.Generator, noise: float) -> list[int]:
    """Ranks (0: best) drawn from the Plackett-Luce model with utilities scores/noise.

    i comes before j with probability sigmoid((scores[i] - scores[j]) / noise). Sorting utilities with Gumbel
    noise draws from the model exactly (Yellott 1977).
    """
    noisy = _utilities(scores, noise) + rng.gumbel(size=len(scores))
    return np.argsort(np.argsort(-noisy)).tolist()


def pair_accuracy_ceiling(scores: Sequence[Sequence[float]], noise: float) -> float:
    """The share of pairs that the gold score itself would order as such noisy ranks do, in expectation.

    scores: the scores of each ranked list; pairs are of one list, all counted alike. No reward model does
    better on ranks of this noise; 0.5 for equal scores.
    """
    gaps = [
        np.abs(utilities[i] - utilities[j])
        for utilities in (_utilities(s, noise) for s in scores)
        for i, j in [np.triu_indices(len(utilities), 1)]
    ]
    return float(np.mean(1 / (1 + np.exp(-np.concatenate(gaps)))))


def _utilities(scores: Sequence[float], noise: float) -> np.ndarray:
    if not noise > 0:
        raise InputError(f"the noise of the ranks is {noise}; give a positive number, such as 0.3")
    return np.asarray(scores, float) / noise


class _About:
    """What a signature names: is_class; the stems of its name's words and of its arguments' (a class: bases')."""

    def __init__(self, signature: str):
        found = _DEFINITION.match(signature)
        if not found:
            raise InputError(f"{signature!r} is not a signature; it begins with `def`, `async def` or `class`")
        self.is_class = found["kind"] == "class"
        special = found["name"].startswith("__") and found["name"].endswith("__")
        self.name = _stems(found["name"]) | (_stems(found["owner"] or "") if special else set())
        arguments = _ARGUMENT.findall(signature, found.end())
        self.arguments = set().union(*(_stems(a) for a in arguments if a not in ("self", "cls")))


_about = functools.lru_cache(2**16)(_About)


def _stems(name: str) -> set[str]:
    return {_stem(part) for part in _PARTS.findall(name) if part.lower() not in _FUNCTION_WORDS}


@functools.lru_cache(2**16)
def _stem(word: str) -> str:
    """Crude: what is left without one ending."""
    word = word.lower()
    if word.endswith("ies"):
        return word[:-3] + "y"
    for ending in ("ing", "ed", "es", "er", "or", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _alike(a: str, b: str) -> bool:
    """Equal, or the shorter begins the other, as in 'initialize' or 'readline', or from four letters is inside it."""
    short, long = sorted((a, b), key=len)
    return a == b or (len(short) >= 3 and long.startswith(short)) or (len(short) >= 4 and short in long)


def _base_forms(word: str) -> set[str]:
    """The words of which this may be an -s, -ed or -ing form."""
    forms = set()
    for ending in ("s", "es", "ed", "ing"):
        if word.endswith(ending):
            stem = word[: -len(ending)]
            forms |= {stem, stem + "e", stem[:-1]}  # calls, raising, stopped
    if word.endswith(("ies", "ied")):
        forms.add(word[:-3] + "y")
    return forms
