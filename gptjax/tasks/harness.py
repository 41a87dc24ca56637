"""A task on a model: K-shot prompts, scores or generated text, metrics with standard errors, and the protocol that they
were computed by."""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.tasks import likelihood, standard_errors
from gptjax.tasks.requests import Request, encode_pair, prefix_token, prefixed, rolling_windows
from gptjax.tasks.task import PUBLISHED, Item, Task, find_file, function, load_items, solved
from gptjax.trained import Model


class Scorer(NamedTuple):
    """What a task needs of a model. log_likelihoods: requests -> a likelihood.Score each. generate: (prompts as text,
    task) -> the texts generated for each prompt, task.samples of them."""

    tokenizer: Tokenizer
    context_length: int
    log_likelihoods: Callable[[Sequence[Request]], list[likelihood.Score]]
    generate: Callable[[Sequence[str], Task], list[list[str]]]


def scorer(model: Model, rows: int = 16, seed: int = 0) -> Scorer:
    """A model as a Scorer. rows: computed at a time."""
    from gptjax.tasks.generate import generate_texts

    return Scorer(
        model.tokenizer,
        model.config.context_length,
        lambda requests: likelihood.log_likelihoods(model, requests, rows=rows),
        lambda prompts, task: generate_texts(model, prompts, task, rows=rows, seed=seed),
    )


@dataclasses.dataclass(frozen=True)
class Result:
    """metrics: {name: (value, standard error or None)}. protocol: how they were computed, and what was counted on the
    way. samples: a record of each item."""

    task: str
    shots: int
    items: int
    metric: str
    metrics: dict[str, tuple[float, float | None]]
    protocol: dict[str, Any]
    samples: list[dict]

    def record(self) -> dict:
        """For JSON, without the samples."""
        values = {name: {"value": value, "stderr": error} for name, (value, error) in self.metrics.items()}
        return {"task": self.task, "shots": self.shots, "items": self.items, "metric": self.metric,
                "metrics": values, "protocol": self.protocol}  # fmt: skip


def evaluate(scorer: Scorer, task: Task, data: str, *, shots: int = 0, limit: int | None = None, seed: int = 0) -> Result:
    """A task's result.

    data: a folder with the task's file, or the file. shots: K, the examples in a prompt, drawn at random with `seed`
    from the task's pool, never the item that is asked. limit: only the first so many items. InputError: no file, bad
    rows, a K larger than the pool.
    """
    items = load_items(task, find_file(task, data, task.files))
    asked = items[:limit]
    prompts = Prompts(task, items, data if task.pool else None, shots, seed)
    if task.kind == "text":
        found = _texts(scorer, task, asked)
    elif task.kind in ("generation", "code"):
        found = _generated(scorer, task, asked, prompts)
    else:
        found = _scored(scorer, task, asked, prompts)
    values, samples, counts = found
    if task.metric not in values:
        raise InputError(f"Task {task.name} has no metric {task.metric!r}, only {', '.join(values)}.")
    return Result(task.name, shots, len(asked), task.metric, values, {**_protocol(scorer, task, prompts), **counts}, samples)


def _protocol(scorer: Scorer, task: Task, prompts: "Prompts") -> dict:
    tokenizer = scorer.tokenizer
    path = PUBLISHED / f"{task.name}.toml"
    protocol = {
        "kind": task.kind,
        "form": [dict(form) for form in task.form],
        "description": task.description,
        "delimiter": task.delimiter,
        "separator": task.separator,
        "prefix_token": None if tokenizer.bos_id is None else tokenizer.token(prefix_token(tokenizer)),
        "examples": prompts.source,
        "seed": prompts.seed,
        "context_length": scorer.context_length,
        "task_file_sha256": hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None,
    }
    if task.kind in ("generation", "code"):
        decoding = f"beam {task.beams}, length penalty {task.length_penalty}" if task.beams > 1 else (
            f"{task.samples} samples at temperature {task.temperature}" if task.temperature else "greedy"
        )  # fmt: skip
        protocol |= {"decoding": decoding, "stop": list(task.stop), "max_new_tokens": task.max_new_tokens}
    return protocol


# --- prompts ----------------------------------------------------------------------------------------------


class Prompts:
    """The K-shot prompts of a task.

    source: where examples come from, in words. dropped: examples left out so far because the prompt was too long."""

    def __init__(self, task: Task, items: Sequence[Item], data: str | None, shots: int, seed: int):
        self.task, self.shots, self.seed, self.dropped = task, shots, seed, 0
        self._own = data is None
        self._pool = items if self._own or not shots else load_items(task, find_file(task, data, task.pool))
        self._index = {id(item): i for i, item in enumerate(items)} if self._own else {}
        self.source = "none" if not shots else (
            f"{shots} {'of each item' if task.fewshot == 'per_item' else 'for all items'}, drawn from "
            + ("the evaluated items without the one that is asked" if self._own else "the pool: " + ", ".join(task.pool))
        )  # fmt: skip
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


# --- likelihood -------------------------------------------------------------------------------------------


def _scored(scorer: Scorer, task: Task, items: Sequence[Item], prompts: Prompts):
    """(metrics, samples, counts) of the kinds choice, partial and cloze."""
    tokenizer, requests, where = scorer.tokenizer, [], []
    for item in items:

        def pairs(before: str, item=item) -> list[Request]:
            return [encode_pair(tokenizer, before + context, text) for context, text in item.pairs]

        def fits(before: str) -> bool:
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
        "truncated": sum(s.truncated for s in scores[:n_items]),
        "spanned": sum(s.spanned for s in scores[:n_items]),
        "examples_dropped": prompts.dropped,
    }
    return (_cloze_metrics if task.kind == "cloze" else _choice_metrics)(samples), samples, counts


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


def _choice_metrics(samples: list[dict]) -> dict[str, tuple[float, float | None]]:
    """acc: by log-probability; acc_token, acc_norm, acc_bytes: by that per token, per character of the choice
    (lm-evaluation-harness's acc_norm), per byte; acc_answer_context: GPT-3 §2.4's p(choice | context) / p(choice |
    answer context)."""
    found = {}
    for name in samples[0]["predicted"]:
        found[name] = standard_errors.mean([float(s["predicted"][name] == s["gold"]) for s in samples])
    return found


def _cloze_metrics(samples: list[dict]) -> dict[str, tuple[float, float | None]]:
    """acc: all tokens of the answer are the likeliest ones (LAMBADA by the word); acc_last_token: its last token is,
    given those before; perplexity: exp(-mean log-probability of an answer)."""
    mean, error = standard_errors.mean([s["log_probs"][0] for s in samples])
    perplexity = math.exp(min(-mean, 700.0))
    return {
        "acc": standard_errors.mean([float(s["greedy"]) for s in samples]),
        "acc_last_token": standard_errors.mean([float(s["last_token_greedy"]) for s in samples]),
        "perplexity": (perplexity, perplexity * error),
        "log_prob": (mean, error),
    }


def _texts(scorer: Scorer, task: Task, items: Sequence[Item]):
    """(metrics, samples, counts) of kind text: every token of the detokenized text scored once, per unit of the
    original text."""
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
    nats = [-s["log_prob"] for s in samples]
    found = {}
    for name, per in (("word_perplexity", "units"), ("byte_perplexity", "bytes"), ("token_perplexity", "tokens")):
        found[name] = standard_errors.perplexity(nats, [s[per] for s in samples])
    found["bits_per_byte"] = standard_errors.bits_per_unit(nats, [s["bytes"] for s in samples])
    return found, samples, {"windows": len(requests), "window_rule": "disjoint, the last one with a full context"}


# --- generated text ---------------------------------------------------------------------------------------


def _generated(scorer: Scorer, task: Task, items: Sequence[Item], prompts: Prompts):
    """(metrics, samples, counts) of the kinds generation and code."""
    room, before, cut = scorer.context_length - task.max_new_tokens, [], 0
    if room < 1:
        raise InputError(
            f"Task {task.name} generates {task.max_new_tokens} tokens and the model's context is "
            f"{scorer.context_length}: lower max_new_tokens in a task file of your own."
        )
    for item in items:
        text = lambda shown, item=item: shown + item.pairs[0][0]
        before.append(text(prompts.before(item, lambda shown: len(scorer.tokenizer.encode(text(shown))) <= room)))
        cut += len(scorer.tokenizer.encode(before[-1])) > room
    texts = scorer.generate(before, task)
    extract = function(task.extract) if task.extract else str.strip
    samples = [
        {"where": item.where, "prompt": prompt, "generated": generated, "answers": list(item.answers)}
        for item, prompt, generated in zip(items, before, texts, strict=True)
    ]
    counts = {"truncated": cut, "examples_dropped": prompts.dropped}
    if task.kind == "code":
        from gptjax.tasks.code_execution import pass_rates

        return pass_rates(task, items, samples), samples, counts
    for sample in samples:
        sample["predicted"] = metrics.majority([extract(text) for text in sample["generated"]])
    found = {}
    for name, of in task.metrics.items():
        found[name] = metrics.over_items(function(of), samples)
    return found, samples, counts


__all__ = ["Result", "Scorer", "evaluate", "prefixed", "scorer"]
