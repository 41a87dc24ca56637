"""Metrics of generated text, as functions of strings: exact match and F1 over several gold answers, BLEU and ROUGE, the
final answer of a chain of thought, self-consistency, and the parts of a text that protocols score.

A metric of one item is a number from 0 to 1; BLEU is of a corpus, from 0 to 100. Standard errors are those of
evals/standard_errors.py.
"""

import collections
import functools
import importlib
import itertools
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from gptjax.errors import InputError
from gptjax.evals import classification
from gptjax.evals.standard_errors import bootstrap, clustered_bootstrap, clustered_mean

# --- exact match and F1 -----------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def squad_normalize(text: str) -> str:
    """Lower case, without ASCII punctuation and articles, single spaces: SQuAD's evaluate-v1.1.py (Rajpurkar et al.
    2016), which CoQA and QuAC took over."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", text).split())


def trivia_normalize(text: str) -> str:
    """TriviaQA's (triviaqa_evaluation.py, Joshi et al. 2017): as SQuAD's, but punctuation and underscores become
    spaces, and quotes and accents that stand alone are punctuation too."""
    text = "".join(" " if c in string.punctuation + "‘’´`" else c for c in text.lower())
    return " ".join(_ARTICLES.sub(" ", text).split())


def best_of(metric: Callable[[str, str], float], prediction: str, golds: Sequence[str]) -> float:
    """The largest metric(prediction, gold) over several gold answers or aliases, as SQuAD and TriviaQA score. Raises
    InputError where there is none."""
    if isinstance(golds, str) or not golds:
        raise InputError(f"Gold answers {golds!r}: give a list of at least one text.")
    return max(metric(prediction, gold) for gold in golds)


def exact_match(prediction: str, gold: str, normalize: Callable[[str], str] = squad_normalize) -> float:
    """1.0 where both are the same after normalization, else 0.0."""
    return float(normalize(prediction) == normalize(gold))


def token_f1(prediction: str, gold: str, normalize: Callable[[str], str] = squad_normalize) -> float:
    """Harmonic mean of precision and recall over the words of both, each counted as often as it occurs. Where either
    has no words, whether both have none (SQuAD 2.0's questions without an answer)."""
    predicted, expected = normalize(prediction).split(), normalize(gold).split()
    if not predicted or not expected:
        return float(predicted == expected)
    common = (collections.Counter(predicted) & collections.Counter(expected)).total()
    return 2 * common / (len(predicted) + len(expected))


def leave_one_out(metric: Callable[[str, str], float], prediction: str, golds: Sequence[str]) -> float:
    """`best_of` all gold answers but one, in the mean over which one: as CoQA's and QuAC's scripts compare a model with
    annotators, each of whom can only be compared with the others. Of a single answer `best_of`."""
    if isinstance(golds, str) or len(golds) < 2:
        return best_of(metric, prediction, golds)
    values = [metric(prediction, gold) for gold in golds]
    return float(np.mean([max(values[:i] + values[i + 1 :]) for i in range(len(values))]))


def drop_exact_match(prediction: str, answer: str) -> float:
    """1.0 where a prediction is a single span and the same after DROP's normalization (Dua et al. 2019; drop_eval.py):
    an answer has a span a line."""
    return float([drop_normalize(prediction)] == [drop_normalize(span) for span in answer.split("\n")])


def drop_f1(prediction: str, answer: str) -> float:
    """DROP's F1: of the sets of words of prediction and span, 0 where the span has numbers and none of them is
    predicted; the best span's, divided by the number of spans, to two digits."""
    predicted, found = set(drop_normalize(prediction).split()), []
    spans = [set(drop_normalize(span).split()) for span in answer.split("\n")]
    for span in spans:
        numbers = {word for word in span if _is_number(word)}
        common = len(span & predicted)
        precision, recall = common / len(predicted) if predicted else 1.0, common / len(span) if span else 1.0
        matches = (numbers & predicted or not numbers) and precision + recall
        found.append(2 * precision * recall / (precision + recall) if matches else 0.0)
    return round(max(found) / len(spans), 2)


def drop_normalize(text: str) -> str:
    """Lower case, split at spaces and hyphens; numbers as floats, other words without punctuation and articles."""
    words = []
    for word in re.split(" |-", text.lower()):
        if not _is_number(word):
            word = "".join(c for c in word if c not in string.punctuation)
        words += _ARTICLES.sub(" ", str(float(word)) if _is_number(word) else word).split()
    return " ".join(words)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# --- choices, of whole sets of items: int arrays [items] of what was predicted, what is right, which items are one
# group, and which one cluster -> (value, standard error)


def macro_f1(predicted, gold, groups, clusters) -> tuple[float, float]:
    """The mean over classes, those that occur, of the F1 of each (SuperGLUE's CommitmentBank)."""
    return _over_items(classification.macro_f1, predicted, gold, clusters)


def f1_of_second(predicted, gold, groups, clusters) -> tuple[float, float]:
    """F1 of the second choice over all items (MultiRC's F1a)."""
    return _over_items(classification.f1, predicted, gold, clusters)


def all_right(predicted, gold, groups, clusters) -> tuple[float, float]:
    """The share of groups of which every item is right (MultiRC's exact match of a question)."""
    right = np.ones(groups.max() + 1)
    np.minimum.at(right, groups, predicted == gold)
    return clustered_mean(right, clusters[np.unique(groups, return_index=True)[1]])


def _over_items(statistic: Callable, predicted, gold, clusters) -> tuple[float, float]:
    return statistic(predicted, gold), clustered_bootstrap(lambda i: statistic(predicted[i], gold[i]), clusters)


# --- BLEU and ROUGE, through the packages that papers report --------------------------------------------------------


class Bleu(NamedTuple):
    """score: 0 to 100; stderr: by the bootstrap over items; signature: sacrebleu's, which makes it comparable."""

    score: float
    stderr: float
    signature: str


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]], *, seed: int = 0, resamples: int = 1000,
         **options) -> Bleu:  # fmt: skip
    """Corpus BLEU of sacrebleu (Post 2018), with one or more references of each prediction.

    options: of sacrebleu.metrics.BLEU, as tokenize='intl' or lowercase=True. Raises InputError without the package,
    where the numbers of predictions and references differ, and of an item without references.
    """
    BLEU = _package("sacrebleu.metrics", "sacrebleu").BLEU
    if not len(predictions) or len(predictions) != len(references) or not all(map(len, references)):
        raise InputError(
            f"BLEU of {len(predictions)} predictions and {len(references)} lists of references: give at least one "
            "prediction, and a list of at least one reference for each."
        )
    most = max(map(len, references))
    columns = [[item[i] if i < len(item) else None for item in references] for i in range(most)]
    metric = BLEU(**options)
    score = metric.corpus_score(list(predictions), columns)
    signature = str(metric.get_signature())
    # The counts of an item do not depend on effective_order, without which sacrebleu warns.
    of_item = BLEU(**{**options, "effective_order": True})
    parts = (of_item.sentence_score(p, list(r)) for p, r in zip(predictions, references, strict=True))
    counts_NX = np.array([[*part.counts, *part.totals, part.sys_len, part.ref_len] for part in parts])
    order = (counts_NX.shape[1] - 2) // 2

    def of(chosen):
        sums = counts_NX[chosen].sum(0).tolist()
        return BLEU.compute_bleu(
            correct=sums[:order], total=sums[order:-2], sys_len=sums[-2], ref_len=sums[-1], max_ngram_order=order,
            smooth_method=metric.smooth_method, smooth_value=metric.smooth_value,
            effective_order=metric.effective_order,
        ).score  # fmt: skip

    return Bleu(score.score, bootstrap(of, len(predictions), seed=seed, resamples=resamples), signature)


ROUGES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(prediction: str, references: Sequence[str]) -> dict[str, float]:
    """F-measures of one item, with stemming, by rouge-score (Google's reimplementation of ROUGE-1.5.5): the best over
    references of each. rougeLsum reads sentences at line breaks; it is what papers on CNN/Daily Mail call ROUGE-L."""
    if isinstance(references, str) or not references:
        raise InputError(f"References {references!r}: give a list of at least one text.")
    scores = _rouge_scorer().score_multi(list(references), prediction)
    return {name: scores[name].fmeasure for name in ROUGES}


@functools.cache
def _rouge_scorer():
    return _package("rouge_score.rouge_scorer", "rouge-score").RougeScorer(ROUGES, use_stemmer=True)


def _package(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        raise InputError(f"This metric needs the package {package}: run `pip install 'gptjax[eval]'`.") from None


# --- answers of a chain of thought ------------------------------------------------------------------------------

# '-' is a sign unless it follows a number, a word or a parenthesis: 5-3 has no negative number.
_NUMBER = r"(?:(?<![\w)])-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?=\.\d))(?:\.\d+)?"


def final_answer(text: str) -> str | None:
    """The number that a chain of thought ends in, in one form ('1,234.50' -> '1234.5'); None without one.

    What follows the first '####' (GSM8K, Cobbe et al. 2021); else the number after the last 'answer is' (Wei et al.
    2022, 'The answer is 72.'); else the last number. '$' and commas between thousands are dropped.
    """
    text = text.replace("\N{MINUS SIGN}", "-")
    marked = re.search(rf"####\s*({_NUMBER})", text)
    stated = re.findall(rf"answer is\W*?({_NUMBER})", text, flags=re.IGNORECASE)
    found = [marked[1]] if marked else stated or re.findall(_NUMBER, text)
    return _plain(found[-1]) if found else None


def _plain(number: str) -> str:
    whole, _, fraction = re.sub(r"[-$,]", "", number).partition(".")
    text = ".".join(filter(None, (whole.lstrip("0") or "0", fraction.rstrip("0"))))
    return "-" + text if "-" in number and text != "0" else text


def majority_vote(answers: Sequence[str | None]) -> str | None:
    """Self-consistency (Wang et al. 2023): the most frequent answer of several samples, the first of
    equally frequent ones; None where no sample has one."""
    counts = collections.Counter(answer for answer in answers if answer is not None)
    return counts.most_common(1)[0][0] if counts else None


# --- the part of a text that is scored --------------------------------------------------------------------------


_SENTENCE_END = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s+[^a-z\s]|\s*$)|\n")


def first_sentences(text: str, n: int = 1) -> str:
    """The first n sentences: GPT-2's summaries are the first 3 of 100 tokens after 'TL;DR:', its translations the
    first one (section 3.6, 3.7). A sentence ends at . ! or ?, with quotes and parentheses that it closes, before white
    space and no lower-case letter, or at a line break; 'Mr. Smith' has an end too many."""
    text, ends = text.strip(), _sentence_ends(text.strip())
    return text[: ends[n - 1]].strip() if len(ends) >= n else text


def sentence_lines(text: str) -> str:
    """The sentences of a text (`first_sentences`), one a line: what rouge-score's rougeLsum reads."""
    text = text.strip()
    ends = [0, *_sentence_ends(text), len(text)]
    return "\n".join(filter(None, (text[a:b].strip() for a, b in itertools.pairwise(ends))))


def _sentence_ends(text: str) -> list[int]:
    ends = []
    for match in _SENTENCE_END.finditer(text):
        if text[ends[-1] if ends else 0 : match.end()].strip():
            ends.append(match.end())
    return ends


# --- as task files name them: (prediction, answer) -> float ----------------------------------------------------------

trivia_match = functools.partial(exact_match, normalize=trivia_normalize)


def rouge1(prediction: str, answer: str) -> float:
    """ROUGE-1 (`rouge`)."""
    return rouge(prediction, [answer])["rouge1"]


def rouge2(prediction: str, answer: str) -> float:
    """ROUGE-2 (`rouge`)."""
    return rouge(prediction, [answer])["rouge2"]


def rougeLsum(prediction: str, answer: str) -> float:
    """ROUGE-L over sentences (`rouge`), which are split into lines first: a model's text is a single line, and
    rougeLsum of one line is rougeL."""
    return rouge(sentence_lines(prediction), [sentence_lines(answer)])["rougeLsum"]


def same_final_answer(prediction: str, answer: str) -> float:
    """1.0 where a number (of `final_answer`) is the one that a worked answer ends in."""
    return float(prediction == final_answer(answer))


def first_three_sentences(text: str) -> str:
    """GPT-2's summaries (`first_sentences`)."""
    return first_sentences(text, 3)
