"""How items are scored, one function for each kind of task: scorer, task, items, prompts -> Scored."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.evals import calibration, classification, standard_errors
from gptjax.evals.best_of_k import probability_of_any
from gptjax.tasks import code_execution, metrics
from gptjax.tasks.figures import Figure, task_figures
from gptjax.tasks.generate import prompt_ids
from gptjax.tasks.likelihood import Score
from gptjax.tasks.prompts import Prompts, cluster_numbers, group_numbers
from gptjax.tasks.requests import Request, encode_pair, prefix_token, rolling_windows
from gptjax.tasks.task import Item, Task, function


class Scorer(NamedTuple):
    """What a task needs of a model. log_likelihoods: requests -> a Score each. generate: (prompts as ids, task) -> the
    texts generated for each prompt, task.samples of them."""

    tokenizer: Tokenizer
    context_length: int
    log_likelihoods: Callable[[Sequence[Request]], list[Score]]
    generate: Callable[[Sequence[Sequence[int]], Task], list[list[str]]]


class Scored(NamedTuple):
    """metrics: {name: (value, standard error)}. samples: a record of each item. counts: what was counted on the way:
    truncated items, ... calibration: evals/calibration.py's figures, of choices. figures: of tasks that have [figures],
    with their intervals."""

    metrics: dict[str, tuple[float, float]]
    samples: list[dict]
    counts: dict[str, Any]
    calibration: dict[str, Any] | None = None
    figures: Mapping[str, Figure] = {}


# --- choice, partial, cloze -----------------------------------------------------------------------------------


def score_pairs(scorer: Scorer, task: Task, items: Sequence[Item], prompts: Prompts) -> Scored:
    """The kinds choice, partial and cloze: log-probabilities of continuations. Of choices also brier, nll and ece of
    their probabilities, the softmax of what the task's metric compares."""
    tokenizer, requests, where = scorer.tokenizer, [], []
    for item in items:

        @functools.cache
        def pairs(before: str, item=item) -> list[Request]:
            return [encode_pair(tokenizer, before + context, text) for context, text in item.pairs]

        def fits(before: str, pairs=pairs) -> bool:
            return max(len(r.context) + len(r.continuation) for r in pairs(before)) <= scorer.context_length + 1

        before = prompts.before(item, fits)
        where.append((len(requests), before))
        requests += pairs(before)
    n_items = len(requests)
    if task.answer_context is not None:
        requests += [encode_pair(tokenizer, task.answer_context, text) for item in items for _, text in item.pairs]
    scores = scorer.log_likelihoods(requests)
    offset, samples = n_items, []
    for item, (start, before) in zip(items, where, strict=True):
        n = len(item.pairs)
        unconditional = scores[offset + start :][:n] if task.answer_context is not None else None
        samples.append(_sample(task, item, before, scores[start : start + n], unconditional))
    counts = {
        "truncated": sum(sample["truncated"] for sample in samples),
        "spanned": sum(s.spanned for s in scores[:n_items]),
        "examples_dropped": prompts.dropped,
    }
    if task.kind == "cloze":
        return Scored(_cloze_metrics(samples, cluster_numbers(items)), samples, counts)
    if task.figures:
        return _with_figures(task, items, samples, counts)
    found = _choice_metrics(task, items, samples)
    chances = [classification.probabilities(np.array(s["scores"][task.decision])) for s in samples]
    figures = calibration.calibration(chances, [s["gold"] for s in samples], clusters=cluster_numbers(items))
    for name in ("brier", "nll", "ece"):
        found[name] = figures[name], math.nan if figures[f"{name}_se"] is None else figures[f"{name}_se"]
    return Scored(found, samples, counts, {"scores": task.decision, **figures})


def _with_figures(task: Task, items: Sequence[Item], samples: list[dict], counts: dict[str, Any]) -> Scored:
    found = task_figures(task, items, samples)
    metrics = {name: (figure.value, figure.stderr) for name, figure in found.items()}
    return Scored(metrics, samples, counts, figures=found)


def _sample(task: Task, item: Item, before: str, scores: Sequence, unconditional) -> dict:
    record = {
        "where": item.where,
        "prompts": [before + context for context, _ in item.pairs],
        "continuations": [text for _, text in item.pairs],
        "log_probs": [s.log_prob for s in scores],
        "tokens": [s.tokens for s in scores],
        "truncated": any(s.truncated for s in scores),
    }
    if task.kind == "cloze":
        return record | {"greedy": scores[0].greedy, "last_token_greedy": scores[0].last_greedy}
    texts = [text[len(task.delimiter) :] for _, text in item.pairs]
    log_probs = np.array(record["log_probs"])
    predicted = {
        "acc": log_probs,
        "acc_token": log_probs / [s.tokens for s in scores],
        "acc_norm": log_probs / [max(len(text), 1) for text in texts],
        "acc_bytes": log_probs / [max(len(text.encode()), 1) for text in texts],
    }
    if unconditional is not None:
        record["log_probs_answer_context"] = [s.log_prob for s in unconditional]
        predicted["acc_answer_context"] = log_probs - record["log_probs_answer_context"]
    record["gold"] = item.gold
    record["predicted"] = {name: int(np.argmax(values)) for name, values in predicted.items()}
    record["scores"] = {name: values.tolist() for name, values in predicted.items()}
    return record


def _choice_metrics(task: Task, items: Sequence[Item], samples: list[dict]) -> dict[str, tuple[float, float]]:
    """acc: by log-probability; acc_token, acc_norm, acc_bytes: by that per token, per character of the choice
    (lm-evaluation-harness's acc_norm), per byte; acc_answer_context: GPT-3 §2.4's p(choice | context) / p(choice |
    answer context); and what the task names, of the predictions by task.decision."""
    groups, clusters = group_numbers(items), cluster_numbers(items)
    gold = np.array([item.gold for item in items])
    predicted = {name: np.array([s["predicted"][name] for s in samples]) for name in task.decisions}
    found = {name: standard_errors.clustered_mean(predicted[name] == gold, clusters) for name in predicted}
    chosen = predicted[task.decision]
    names = [item.names[i] for item, i in zip(items, chosen, strict=True)]
    found |= _answer_metrics(task, names, [item.answers for item in items], clusters, samples)
    return found | {name: function(of)(chosen, gold, groups, clusters) for name, of in task.corpus_metrics.items()}


def _answer_metrics(task: Task, predictions: Sequence[str], answers: Sequence[Sequence[str]], clusters: np.ndarray,
                    samples: list[dict]) -> dict[str, tuple[float, float]]:  # fmt: skip
    """task.metrics: of each item, which are added to the samples, in the mean."""
    over, found = metrics.best_of if task.over_answers == "best" else metrics.leave_one_out, {}
    for name, of in task.metrics.items():
        values = [over(function(of), p, a) for p, a in zip(predictions, answers, strict=True)]
        found[name] = standard_errors.clustered_mean(values, clusters)
        for sample, value in zip(samples, values, strict=True):
            sample[name] = value
    return found


def _cloze_metrics(samples: list[dict], clusters: np.ndarray) -> dict[str, tuple[float, float]]:
    """acc: every token of the answer is the most likely one (LAMBADA by the word); acc_last_token: its last token is,
    given those before; perplexity: exp(-mean log-probability of an answer)."""
    of_items = lambda values: standard_errors.clustered_mean(values, clusters)
    mean, error = of_items([s["log_probs"][0] for s in samples])
    perplexity = math.exp(min(-mean, 700.0))
    return {
        "acc": of_items([float(s["greedy"]) for s in samples]),
        "acc_last_token": of_items([float(s["last_token_greedy"]) for s in samples]),
        "perplexity": (perplexity, perplexity * error),
        "log_prob": (mean, error),
    }


# --- text -----------------------------------------------------------------------------------------------------


def score_texts(scorer: Scorer, task: Task, items: Sequence[Item], prompts: Prompts) -> Scored:
    """The kind text: every token of the detokenized text scored once, per unit of the original text."""
    clean = function(task.detokenize) if task.detokenize else lambda text: text
    units = function(task.units) if task.units else lambda text: len(text.split())
    requests, spans, samples = [], [], []
    prefix = prefix_token(scorer.tokenizer)
    for item in items:
        ids = scorer.tokenizer.encode(clean(item.text))
        if not ids:
            raise InputError(f"{item.where}: The text is empty: remove the row.")
        start = len(requests)
        requests += rolling_windows(prefix, ids, scorer.context_length)
        spans.append((start, len(requests)))
    scores = scorer.log_likelihoods(requests)
    for item, (start, end) in zip(items, spans, strict=True):
        total = sum(s.log_prob for s in scores[start:end])
        samples.append({"where": item.where, "log_prob": total, "tokens": sum(s.tokens for s in scores[start:end]),
                        "units": units(item.text), "bytes": len(item.text.encode())})  # fmt: skip
    nats, clusters = [-s["log_prob"] for s in samples], cluster_numbers(items)
    found = {}
    for name, per in (("word_perplexity", "units"), ("byte_perplexity", "bytes"), ("token_perplexity", "tokens")):
        found[name] = standard_errors.perplexity(nats, [s[per] for s in samples], clusters)
    found["bits_per_byte"] = standard_errors.bits_per_unit(nats, [s["bytes"] for s in samples], clusters)
    counts = {"windows": len(requests), "window_rule": "disjoint, the last one with a full context"}
    return Scored(found, samples, counts)


# --- threshold ------------------------------------------------------------------------------------------------


def score_threshold(scorer: Scorer, task: Task, items: Sequence[Item], prompts: Prompts) -> Scored:
    """The kind threshold: a text is predicted 1 if the mean log-probability of its tokens is high enough, as GPT-1
    finds acceptable sentences without training (Radford et al. 2018 §5). The threshold is the one with the highest
    Matthews correlation on the pool, or on the items themselves if there is none, which is biased upwards; auc needs
    none."""
    of_pool = [] if prompts.own else prompts.pool
    requests = []
    for item in (*items, *of_pool):
        requests.append(encode_pair(scorer.tokenizer, "", item.text))
    scores = scorer.log_likelihoods(requests)
    means = np.array([s.log_prob / s.tokens for s in scores])
    values, gold = means[: len(items)], np.array([item.gold for item in items])
    tuned_on, tuned_gold = (means[len(items) :], np.array([i.gold for i in of_pool])) if of_pool else (values, gold)
    threshold = best_threshold(tuned_on, tuned_gold)
    predicted = (values >= threshold).astype(int)
    samples = [
        {"where": item.where, "text": item.text, "score": float(v), "gold": item.gold, "predicted": int(p)}
        for item, v, p in zip(items, values, predicted, strict=True)
    ]
    correlation, clusters = lambda i: classification.matthews(predicted[i], gold[i]), cluster_numbers(items)
    drawn = lambda statistic: standard_errors.clustered_bootstrap(statistic, clusters)
    found = {
        "matthews": (correlation(slice(None)), drawn(correlation)),
        "acc": standard_errors.clustered_mean((predicted == gold).astype(float), clusters),
        "auc": (auc(values, gold), drawn(lambda i: auc(values[i], gold[i]))),
    }
    counts = {"truncated": sum(s.truncated for s in scores[: len(items)]), "threshold": threshold}
    return Scored(found, samples, counts | {"threshold_from": "pool" if of_pool else "the items"})


def best_threshold(scores: np.ndarray, gold: np.ndarray) -> float:
    """The score from which on to predict 1, so that the Matthews correlation is highest."""
    order = np.sort(np.unique(scores))
    found = [classification.matthews((scores >= t).astype(int), gold) for t in order]
    return float(order[int(np.argmax(found))])


def auc(scores: np.ndarray, gold: np.ndarray) -> float:
    """Chance that a text labeled 1 has a higher score than one labeled 0, ties counting half; .5 without both."""
    ones = int(gold.sum())
    if not 0 < ones < len(gold):
        return 0.5
    return float((classification.ranks(scores)[gold == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(gold) - ones)))


# --- generation, code -----------------------------------------------------------------------------------------


def score_generated(scorer: Scorer, task: Task, items: Sequence[Item], prompts: Prompts) -> Scored:
    """The kinds generation and code."""
    room = scorer.context_length - task.max_new_tokens
    ids = functools.cache(lambda prompt: prompt_ids(scorer.tokenizer, prompt))
    if room < 1:
        raise InputError(
            f"Task {task.name} generates {task.max_new_tokens} tokens and the model's context is "
            f"{scorer.context_length}: lower max_new_tokens in a task file of your own."
        )
    before = []
    for item in items:
        question = item.pairs[0][0]
        shown = prompts.before(item, lambda shown, question=question: len(ids(shown + question)) <= room)
        before.append(shown + question)
    cut = sum(len(ids(prompt)) > room for prompt in before)
    texts = scorer.generate([ids(prompt) for prompt in before], task)
    samples = [
        {"where": item.where, "prompt": prompt, "generated": generated, "answers": list(item.answers)}
        for item, prompt, generated in zip(items, before, texts, strict=True)
    ]
    counts = {"truncated": cut, "examples_dropped": prompts.dropped}
    if task.figures:
        return _with_figures(task, items, samples, counts)
    if task.kind == "code":
        return Scored(_code_metrics(task, items, samples), samples, counts)
    found, signatures = _text_metrics(task, items, samples)
    return Scored(found, samples, counts | signatures)


def _text_metrics(task: Task, items: Sequence[Item], samples: list[dict]):
    """(The metrics, the signatures of those of the whole corpus that have one: '<name>_signature').

    What is extracted from each generated text is voted on, added to the samples and compared with the answers."""
    extract = function(task.extract) if task.extract else str.strip
    for sample in samples:
        sample["predicted"] = metrics.majority_vote([extract(text) for text in sample["generated"]])
    predictions, answers = [s["predicted"] or "" for s in samples], [s["answers"] for s in samples]
    found, signatures = _answer_metrics(task, predictions, answers, cluster_numbers(items), samples), {}
    for name, of in task.corpus_metrics.items():
        value, error, *signature = function(of)(predictions, answers)
        found[name] = value, error
        signatures |= {f"{name}_signature": text for text in signature}
    return found, signatures


def _code_metrics(task: Task, items: Sequence[Item], samples: list[dict]) -> dict[str, tuple[float, float]]:
    """pass@k for k = 1, 10, 100 up to the number of samples (Chen et al. 2021)."""
    programs = [
        code_execution.humaneval_program(sample["prompt"], text, item.answers[0], item.answers[1])
        for item, sample in zip(items, samples, strict=True) for text in sample["generated"]
    ]  # fmt: skip
    outcomes = code_execution.run_programs(programs, allow_code_execution=task.allow_code_execution)
    for i, sample in enumerate(samples):
        sample["outcomes"] = outcomes[i * task.samples : (i + 1) * task.samples]
    found = {}
    for k in (k for k in (1, 10, 100) if k <= task.samples):
        passed = [probability_of_any(task.samples, s["outcomes"].count("passed"), k) for s in samples]
        found[f"pass@{k}"] = standard_errors.clustered_mean(passed, cluster_numbers(items))
    return found
