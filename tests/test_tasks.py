"""Zero- and few-shot tasks: framing, prompts, metrics of models whose probabilities are known, bad input."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest

from gptjax import json_files
from gptjax.data import bpe
from gptjax.errors import InputError
from gptjax.tasks import harness, table
from gptjax.tasks.files import find_files
from gptjax.tasks.items import load_items
from gptjax.tasks.kinds import Scorer
from gptjax.tasks.likelihood import Score
from gptjax.tasks.prompts import Prompts
from gptjax.tasks.requests import encode_pair
from gptjax.tasks.task import Task, available, load_task, make_item

TEXT = "Question: what is it? Answer: the house is red. the cat is in the house. yes no True False " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train_bpe([TEXT], 300)


def planted(tokenizer, log_prob, context_length=1000) -> Scorer:
    """A model that gives each token of a request log_prob(context ids so far, token)."""

    def log_likelihoods(requests):
        out = []
        for r in requests:
            ids = [*r.context, *r.continuation]
            values = [log_prob(ids[:i], ids[i]) for i in range(len(r.context), len(ids))]
            out.append(Score(sum(values), len(values), all(v == 0 for v in values), values[-1] == 0, False, r.spanned))
        return out

    return Scorer(tokenizer, context_length, log_likelihoods, lambda prompts, task: [["red. And so"] for _ in prompts])


def write_rows(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_choices_by_the_five_normalizations(tokenizer, tmp_path):
    """Every token costs 1 nat, so that sums prefer few tokens, means are ties, and characters prefer long choices; the
    choices' own probability after the answer context cancels."""
    rows = [
        {"query": "the cat is in the", "choices": ["house", "house house house", "cat é"], "gold": g} for g in (0, 1, 2)
    ]
    write_rows(tmp_path, "copa.jsonl", rows)
    task = load_task("copa")
    result = harness.evaluate(planted(tokenizer, lambda ids, token: -1.0), task, str(tmp_path))
    texts = rows[0]["choices"]
    tokens = [len(encode_pair(tokenizer, "the cat is in the", " " + text).continuation) for text in texts]
    best = {
        "acc": int(np.argmin(tokens)),
        "acc_token": 0,
        "acc_norm": int(np.argmax([-t / len(text) for t, text in zip(tokens, texts, strict=True)])),
        "acc_bytes": int(np.argmax([-t / len(text.encode()) for t, text in zip(tokens, texts, strict=True)])),
    }
    assert result.samples[0]["predicted"] == best
    assert len(set(best.values())) > 1
    for name in best:
        assert result.metrics[name] == (pytest.approx(1 / 3), pytest.approx(1 / 3))  # s = 1/sqrt(3), n = 3
    assert result.samples[0]["tokens"] == tokens


def test_characters_are_not_bytes(tokenizer, tmp_path):
    """'house' costs 5 nats, 'éééé' 6: a character of the first is cheaper, a byte of the second."""
    write_rows(tmp_path, "copa.jsonl", [{"query": "the", "choices": ["house", "éééé"], "gold": 1}] * 2)
    ids = [encode_pair(tokenizer, "the", " " + text).continuation for text in ("house", "éééé")]
    assert not set(ids[0]) & set(ids[1])
    log_prob = lambda before, token: -5 / len(ids[0]) if token in ids[0] else -6 / len(ids[1])
    result = harness.evaluate(planted(tokenizer, log_prob), load_task("copa"), str(tmp_path))
    assert result.samples[0]["scores"]["acc_norm"] == pytest.approx([-1, -1.5])
    assert result.samples[0]["scores"]["acc_bytes"] == pytest.approx([-1, -0.75])
    assert result.metrics["acc_norm"][0] == 0.0 and result.metrics["acc_bytes"][0] == 1.0


def test_the_answer_context_is_divided_out(tokenizer, tmp_path):
    """A choice that is likely anyway loses: p(choice | context) / p(choice | answer context), GPT-3 §2.4."""
    write_rows(tmp_path, "arc_easy.jsonl", [{"query": "Question: what is it?", "choices": ["red", "no"], "gold": 1}])
    red = set(encode_pair(tokenizer, "Answer:", " red").continuation)
    after_question = lambda ids: "Question" in tokenizer.decode(ids)

    def log_prob(ids, token):
        if token in red:
            return -1.0  # whatever was asked
        return -3.0 if after_question(ids) else -9.0

    result = harness.evaluate(planted(tokenizer, log_prob), load_task("arc_easy"), str(tmp_path))
    assert result.metrics["acc"][0] == 0.0 and result.metrics["acc_answer_context"][0] == 1.0
    sample = result.samples[0]
    assert len(sample["log_probs_answer_context"]) == 2 and math.isnan(result.metrics["acc"][1])


def test_perplexity_of_a_planted_model(tokenizer, tmp_path):
    """-log p = 2 nats a token: every perplexity is exp(2 tokens / units) of the original text."""
    page = " \n = Cats = \n \n the cat , it is red . yes @-@ no \n"
    (tmp_path / "valid.txt").write_text(page + page.replace("Cats", "Houses"))
    result = harness.evaluate(planted(tokenizer, lambda ids, token: -2.0, 16), load_task("wikitext"), str(tmp_path))
    assert result.items == 2
    tokens, words = sum(s["tokens"] for s in result.samples), sum(s["units"] for s in result.samples)
    assert result.metrics["word_perplexity"][0] == pytest.approx(math.exp(2 * tokens / words))
    assert result.metrics["token_perplexity"][0] == pytest.approx(math.exp(2))
    assert result.metrics["bits_per_byte"][0] == pytest.approx(
        2 * tokens / math.log(2) / sum(s["bytes"] for s in result.samples)
    )
    assert result.protocol["windows"] > 2


def test_perplexity_counts_the_originals_units(tokenizer, tmp_path):
    """GPT-2's protocol: the text is detokenized, its words and line ends are those of the tokens."""
    page = " = Cats = \n \n The cat @-@ like one , red . \n"
    (tmp_path / "wikitext.txt").write_text(page)
    model = planted(tokenizer, lambda ids, token: -2.0, 16)
    result = harness.evaluate(model, load_task("wikitext_gpt2"), str(tmp_path))
    (sample,) = result.samples
    text = "= Cats =\n\nThe cat-like one, red.\n"
    assert (sample["tokens"], sample["units"]) == (len(tokenizer.encode(text)), 11 + 3)
    assert result.metrics["word_perplexity"][0] == pytest.approx(math.exp(2 * sample["tokens"] / 14))
    # a single document has no standard error, and it is said why
    assert "n/a (one document)" in table.table([result])
    saved = json.loads(json_files.dumps(result.record()))["metrics"]["word_perplexity"]
    assert saved["stderr"] is None and saved["no_stderr"] == "one document"


def test_lambada_by_the_word_and_by_its_last_token(tokenizer, tmp_path):
    write_rows(tmp_path, "lambada_test.jsonl", [{"text": "the cat is in the blueish"}, {"text": "it is in the house"}])
    last = {encode_pair(tokenizer, "x", " " + w).continuation[-1] for w in ("blueish", "house")}
    result = harness.evaluate(
        planted(tokenizer, lambda ids, token: 0.0 if token in last else -5.0), load_task("lambada"), str(tmp_path)
    )
    assert result.metrics["acc_last_token"][0] == 1.0 and result.metrics["acc"][0] < 1.0
    pairs = [encode_pair(tokenizer, "the cat is in the", " blueish"), encode_pair(tokenizer, "it is in the", " house")]
    nats = [5.0 * sum(t not in last for t in pair.continuation) for pair in pairs]
    assert result.metrics["perplexity"][0] == pytest.approx(math.exp(np.mean(nats)))


def test_a_threshold_on_the_mean_log_probability(tokenizer, tmp_path):
    """Acceptable sentences have likelier tokens, whatever their length; the threshold is found on the training rows."""
    good, bad = ["the cat is in the house", "it is red"], ["house the the", "red is is it is it no yes no"]
    rows = [{"sentence": s, "label": 1} for s in good] + [{"sentence": s, "label": 0} for s in bad]
    write_rows(tmp_path, "cola_dev.jsonl", rows)
    write_rows(tmp_path, "cola_train.jsonl", rows[1:3] * 5)
    ids = {tuple(tokenizer.encode(text)): -1.0 for text in good} | {tuple(tokenizer.encode(t)): -2.0 for t in bad}

    def log_prob(before, token):
        return next(v for text, v in ids.items() if text[: len(before) - 1] == tuple(before[1:]) and token in text)

    result = harness.evaluate(planted(tokenizer, log_prob), load_task("cola_zero_shot"), str(tmp_path))
    assert result.metrics["auc"][0] == 1.0 and result.metrics["matthews"][0] == 1.0
    assert result.protocol["threshold_from"] == "pool" and result.protocol["threshold"] == pytest.approx(-1.0)
    alone = dataclasses.replace(load_task("cola_zero_shot"), pool=())
    result = harness.evaluate(planted(tokenizer, log_prob), alone, str(tmp_path))
    assert result.protocol["threshold_from"] == "the items"


def test_partial_evaluation_scores_what_follows_the_referent(tokenizer, tmp_path):
    row = {
        "sentence": "the cat is in the house because _ is red.",
        "option1": "the cat",
        "option2": "the house",
        "answer": "2",
    }
    write_rows(tmp_path, "winogrande.jsonl", [row])
    (item,) = load_items(load_task("winogrande"), str(tmp_path / "winogrande.jsonl"))
    assert item.pairs == (
        ("the cat is in the house because the cat", " is red."),
        ("the cat is in the house because the house", " is red."),
    )
    assert item.gold == 1


def test_examples_are_drawn_at_random_without_the_question(tokenizer, tmp_path):
    rows = [{"query": f"it is {i}", "choices": [f"a{i}", f"b{i}"], "gold": i % 2} for i in range(12)]
    write_rows(tmp_path, "piqa.jsonl", rows)
    task = load_task("piqa")
    items = load_items(task, str(tmp_path / "piqa.jsonl"))
    prompts = Prompts(task, items, str(tmp_path), 3, seed=0)
    seen = []
    for i, item in enumerate(items):
        text = prompts.before(item, lambda text: True)
        blocks = text.split("\n\n")
        assert len(blocks) == 4 and blocks[-1] == ""
        assert f"it is {i}Answer" not in text
        for block in blocks[:3]:
            n = int(block.split("it is ")[1].split("Answer")[0])
            assert block == f"it is {n}Answer: {'ab'[n % 2]}{n}"
        assert text == prompts.before(item, lambda text: True)  # the same again
        seen.append(text)
    assert (
        len(set(seen)) > 6
        and Prompts(task, items, str(tmp_path), 3, seed=1).before(items[0], lambda t: True) != seen[0]
    )


def test_a_long_prompt_loses_its_first_examples_never_the_question(tokenizer, tmp_path):
    rows = [{"query": f"the cat is in the house {i} ", "choices": ["red", "no"], "gold": 0} for i in range(9)]
    write_rows(tmp_path, "piqa.jsonl", rows)
    one = len(tokenizer.encode("the cat is in the house 1 Answer: red"))
    result = harness.evaluate(planted(tokenizer, lambda i, t: -1.0, 3 * one), load_task("piqa"), str(tmp_path), shots=5)
    for sample, row in zip(result.samples, rows, strict=True):
        for prompt, continuation in zip(sample["prompts"], sample["continuations"], strict=True):
            assert prompt.endswith(row["query"] + "Answer:")
            assert len(tokenizer.encode(prompt + continuation)) <= 3 * one + 1
        assert "Answer: red" in sample["prompts"][0]
    assert result.protocol["examples_dropped"] > 0 and result.protocol["truncated"] == 0


def test_generated_answers_are_cut_extracted_and_scored(tokenizer, tmp_path):
    (tmp_path / "t.toml").write_text(
        'about = "a test"\nkind = "generation"\nmetric = "f1"\nfiles = ["rows.jsonl"]\nmax_new_tokens = 8\n'
        'extract = "gptjax.tasks.metrics:first_sentences"\n[[form]]\ncontext = "{q}"\nanswers = "a"\n'
        '[metrics]\nf1 = "gptjax.tasks.metrics:token_f1"\nexact_match = "gptjax.tasks.metrics:exact_match"\n'
    )
    write_rows(tmp_path, "rows.jsonl", [{"q": "it is", "a": ["no", "Red."]}, {"q": "it is", "a": ["blue"]}])
    result = harness.evaluate(planted(tokenizer, None), load_task(str(tmp_path / "t.toml")), str(tmp_path))
    assert result.metrics["exact_match"] == (0.5, pytest.approx(0.5)) and result.protocol["decoding"] == "greedy"
    assert [s["predicted"] for s in result.samples] == ["red.", "red."] and result.metrics["f1"][0] == 0.5


def test_a_token_across_the_border_is_encoded_apart_and_counted(tmp_path):
    """An own vocabulary may merge the end of a context with the beginning of its continuation."""
    tokenizer = bpe.train_bpe(["abab " * 50], 260)
    assert len(tokenizer.encode("ab")) < len(tokenizer.encode("a")) + len(tokenizer.encode("b"))
    request = encode_pair(tokenizer, "a", "b")
    assert (
        request.spanned and tokenizer.decode(request.context) == "a" and tokenizer.decode(request.continuation) == "b"
    )
    plain = encode_pair(tokenizer, "x ", "y")
    assert not plain.spanned and tokenizer.decode(plain.continuation) == " y"
    empty = encode_pair(tokenizer, "", "y")
    assert empty.context == (tokenizer.bos_id,)
    (tmp_path / "t.toml").write_text(
        'about = "a test"\nkind = "cloze"\nmetric = "acc"\ndelimiter = ""\n[[form]]\ncontext = "{a}"\nanswer = "{b}"\n'
    )
    write_rows(tmp_path, "rows.jsonl", [{"a": "a", "b": "b"}, {"a": "x", "b": " y"}])
    task, data = load_task(str(tmp_path / "t.toml")), str(tmp_path / "rows.jsonl")
    result = harness.evaluate(planted(tokenizer, lambda i, t: -1.0), task, data)
    assert result.protocol["spanned"] == 1 and "1 continuations encoded apart" in table.table([result])


@pytest.mark.parametrize("name", available())
def test_every_published_task_file_can_be_read(name):
    task = load_task(name)
    assert task.about and (task.files or task.rows) and task.form


PUBLISHED_ROWS = {
    "arc_easy": ({"question": "Which?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"}, 1),
    "boolq": ({"passage": "P.", "question": "is it", "answer": True}, 1),
    "rte": ({"premise": "P.", "hypothesis": "H.", "label": "not_entailment"}, 1),
    "hellaswag_completion": ({"ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "2"}, 2),
    "storycloze": (
        {f"InputSentence{i}": "S." for i in range(1, 5)}
        | {"RandomFifthSentenceQuiz1": "a", "RandomFifthSentenceQuiz2": "b", "AnswerRightEnding": "2"}, 1,
    ),
    "anli_r1": ({"premise": "P", "hypothesis": "H", "label": 2}, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_ROWS)
def test_published_rows_become_items(name):
    row, gold = PUBLISHED_ROWS[name]
    assert make_item(load_task(name), row).gold == gold


def test_prepared_rows_become_items(tmp_path):
    def items(name, row):
        write_rows(tmp_path, f"{name}.jsonl", [row])
        return load_items(load_task(name), str(tmp_path / f"{name}.jsonl"))

    article = {"article": "Text.", "questions": ["q1", "q2"], "options": [list("wxyz")] * 2, "answers": ["D", "A"]}
    assert [item.gold for item in items("race", article)] == [3, 0]
    copa = {
        "premise": "The man fell.",
        "choice1": "He slipped.",
        "choice2": "He flew.",
        "question": "cause",
        "label": 0,
    }
    assert items("copa", copa)[0].pairs[0] == ("The man fell because", " he slipped.")
    pronoun = {"text": "The cup fell because it was wet.", "pronoun": "it", "pronoun_loc": 21,
               "options": ["The cup", "The table"], "label": 0}  # fmt: skip
    assert items("winograd", pronoun)[0].pairs[1] == ("The cup fell because the table", " was wet.")
    cbt = {
        "sentences": ["One.", "Two."],
        "question": "The XXXXX ran away .",
        "options": ["cat", "dog"],
        "answer": "dog",
    }
    (item,) = items("cbt_cn", cbt)
    assert item.pairs[item.gold] == ("One. Two. The", " dog ran away.")
    quoted = {**cbt, "sentences": ["`` Oh , '' he said ."], "question": "-LRB- `` The `` XXXXX '' ca n't ! ''"}
    (item,) = items("cbt_cn", quoted)
    assert item.pairs[item.gold] == ('"Oh," he said. ("The', ' "dog" can\'t!"')
    hellaswag = {
        "activity_label": "Ice",
        "ctx_a": "A man is",
        "ctx_b": "he",
        "endings": ["runs [x] off.", "sits."],
        "label": 1,
    }
    assert items("hellaswag", hellaswag)[0].pairs[0] == ("Ice: A man is He", " runs off.")


REFUSED = {
    "an unknown task": (lambda d: load_task("picqa"), "piqa"),
    "no task file": (lambda d: load_task(str(d / "my.toml")), "does not exist"),
    "no data": (lambda d: find_files(load_task("piqa"), str(d), ("piqa.jsonl",)), "goal, label, sol1, sol2"),
    "an empty answer": (lambda d: make_item(load_task("lambada"), {"context": "a", "answer": " "}), "answer is empty"),
    "a wrong label": (lambda d: make_item(load_task("piqa"), {"query": "a", "choices": ["b"], "gold": 3}), "not among"),
    "missing fields": (lambda d: make_item(load_task("piqa"), {"question": "a"}), "goal, label, sol1, sol2"),
    "too few labels": (
        lambda d: make_item(
            load_task("arc_easy"), {"question": "q", "choices": {"text": ["x", "y"], "label": ["A"]}, "answerKey": "A"}
        ), "2 choices for the labels A",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_error(case, tmp_path):
    action, message = REFUSED[case]
    with pytest.raises(InputError, match=message):
        action(tmp_path)


def test_more_examples_than_the_pool_has_are_refused(tokenizer, tmp_path):
    write_rows(tmp_path, "piqa.jsonl", [{"query": "a", "choices": ["b", "c"], "gold": 0}] * 3)
    with pytest.raises(InputError, match="2 items to draw examples from, fewer than --num_fewshot=3"):
        harness.evaluate(planted(tokenizer, lambda i, t: -1.0), load_task("piqa"), str(tmp_path), shots=3)


@pytest.mark.parametrize("line, message", [
    ("kinds = 'choice'", "there is no key 'kinds'"), ("kind = 'choise'", "'choise' is unknown"),
    ("kind = 'partial'", "needs contexts, continuation"), ("kind = ", "cannot be read"),
    ("kind = 'choice'\ndecided_by = 'acc_toke'", "decided_by='acc_toke' is unknown: did you mean 'acc_token'"),
    ("kind = 'choice'\nfewshot = 'each'", "fewshot='each' is unknown: there are fixed, per_item"),
    ("kind = 'choice'\nmetrics = 'f1'", "metrics must be a table"),
    ("kind = 'choice'\nextract = 3", "no function 3"),
    ("kind = 'choice'\nsamples = 0", "samples=0: give at least 1"),
    ("kind = 'choice'\nsamples = '4'", "samples='4' must be of type int"),
    ("kind = 'choice'\nprepare = 'gptjax.tasks.prepare:copas'", "no function 'gptjax.tasks.prepare:copas'"),
    ("kind = 'choice'\ncorpus_metrics = {f1 = 'gptjax.tasks.metrics:f2'}", "no function 'gptjax.tasks.metrics:f2'"),
])  # fmt: skip
def test_a_wrong_task_file_is_refused(line, message, tmp_path):
    path = tmp_path / "my.toml"
    path.write_text(
        f'about = "x"\nmetric = "acc"\n{line}\n[[form]]\ncontext = "{{a}}"\nchoices = "b"\ngold = "{{c}}"\n'
    )
    with pytest.raises(InputError, match=message):
        load_task(str(path))


@pytest.mark.parametrize("kind, form, metric, nearest", [
    ("choice", {"context": "{a}", "choices": "b", "gold": "{c}"}, "accc", "did you mean 'acc'"),
    ("choice", {"context": "{a}", "choices": "b", "gold": "{c}"}, "matthews", "there are acc, acc_bytes"),
    ("cloze", {"context": "{a}", "answer": "{b}"}, "perplexty", "did you mean 'perplexity'"),
    ("text", {"text": "{a}"}, "acc", "there are bits_per_byte"),
    ("generation", {"context": "{a}", "answers": "b"}, "f2", "there are f1"),
    ("code", {"context": "{a}", "tests": "{b}", "entry": "{c}"}, "pass@10", "did you mean 'pass@1'"),
])  # fmt: skip
def test_a_metric_that_is_not_measured_is_refused_before_anything_runs(kind, form, metric, nearest):
    keys = {"metrics": {"f1": "gptjax.tasks.metrics:token_f1"}} if kind == "generation" else {}
    with pytest.raises(InputError, match=f"metric='{metric}' is not measured.*{nearest}"):
        Task("my", "about", kind, metric, (form,), **keys)


def test_a_task_that_measures_nothing_is_refused():
    with pytest.raises(InputError, match="measures nothing: add .metrics."):
        Task("my", "about", "generation", "f1", ({"context": "{a}", "answers": "b"},))


def test_a_misspelled_key_of_a_form_is_refused():
    with pytest.raises(InputError, match="no key 'lables': did you mean 'labels'"):
        Task("my", "about", "choice", "acc", ({"context": "a", "choices": "b", "gold": "c", "lables": "d"},))


MEASURED = {
    "copa": {"query": "it is", "choices": ["red", "no"], "gold": 0}, "lambada": {"text": "it is red"},
    "arc_easy": {"query": "it is", "choices": ["red", "no"], "gold": 0}, "text8": {"text": "it is red"},
    "cola_zero_shot": {"sentence": "it is", "label": 1}, "webqs": {"question": "it?", "answers": ["red"]},
    "winogrande": {"sentence": "it _ is", "option1": "a", "option2": "b", "answer": "1"},
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_a_task_measures_what_it_says(name, tokenizer, tmp_path):
    task = load_task(name)
    write_rows(tmp_path, "rows.jsonl", [MEASURED[name]] * 3)
    write_rows(tmp_path, "cola_train.jsonl", [MEASURED["cola_zero_shot"]])
    result = harness.evaluate(planted(tokenizer, lambda i, t: -1.0), task, str(tmp_path / "rows.jsonl"))
    assert set(result.metrics) == set(task.measured)


def test_a_prompt_is_encoded_a_few_times_only(tokenizer, tmp_path):
    """Of 60 examples 3 fit: found by bisection, not by a trial of every number."""
    rows = [{"query": f"it is {i}", "choices": ["red", "no"], "gold": 0} for i in range(61)]
    write_rows(tmp_path, "piqa.jsonl", rows)
    task = load_task("piqa")
    items, trials = load_items(task, str(tmp_path / "piqa.jsonl")), []
    prompts = Prompts(task, items, str(tmp_path), 60, seed=0)
    text = prompts.before(items[0], lambda text: trials.append(text) or text.count("\n\n") <= 3)
    assert text.count("\n\n") == 3 and prompts.dropped == 57 and len(trials) <= 8
    assert trials[0].endswith(text)  # the first ones are left out
    assert Prompts(task, items, str(tmp_path), 60, seed=0).before(items[0], lambda text: False) == ""


def test_the_table_has_the_main_metric_first_and_what_was_counted(tokenizer, tmp_path):
    write_rows(tmp_path, "piqa.jsonl", [{"query": "a", "choices": ["b", "c"], "gold": 0}] * 3)
    result = harness.evaluate(planted(tokenizer, lambda i, t: -1.0), load_task("piqa"), str(tmp_path))
    result.protocol["truncated"] = 2
    lines = table.table([result]).splitlines()
    assert lines[1].split()[:6] == ["piqa", "0", "3", "acc_token", "*", "1.0000"]
    assert lines[-1] == "piqa, 0-shot: choice, piqa.jsonl; prefix token <|endoftext|>; 2 items cut on the left"


def test_the_protocol_says_how_text_is_decoded_and_scored(tokenizer):
    prompts = types.SimpleNamespace(source="none", seed=0)
    decoding = {
        "gsm8k": "greedy",
        "coqa": "beam 4, length penalty 0.6",
        "humaneval": "10 samples at temperature 0.8, top_p 0.95",
        "cnn_dailymail": "1 samples at temperature 1.0, top_k 2",
    }
    for name, expected in decoding.items():
        task = load_task(name)
        found = harness._protocol(planted(tokenizer, None), task, prompts)
        assert found["decoding"] == expected and found.get("extract") == task.extract
    task = load_task("arc_easy")
    found = harness._protocol(planted(tokenizer, None), task, prompts)
    assert found["answer_context"] == "Answer:" and found["prepare"].endswith(":science_question")
    assert "detokenize" not in found and found["decided_by"] == "acc_answer_context"


def test_calibration_of_choices_and_its_picture(tokenizer, tmp_path, monkeypatch):
    """Half of the probability on each of two choices, right half of the time: calibrated, Brier .5, log 2 nats."""
    rows = [{"query": "it is", "choices": ["red", "red"], "gold": g} for g in (0, 1) * 4]
    write_rows(tmp_path, "copa.jsonl", rows)
    result = harness.evaluate(planted(tokenizer, lambda i, t: -1.0), load_task("copa"), str(tmp_path))
    assert result.metrics["ece"][0] == 0.0 and result.metrics["brier"] == (0.5, 0.0)
    assert result.metrics["nll"][0] == pytest.approx(math.log(2))
    drawn = {}
    monkeypatch.setattr(table.calibration, "reliability_plot", lambda path, curves: drawn.update({path.name: curves}))
    for name in ("before", "after"):
        table.write([(1, result)], tmp_path / name, {"workdir": name}, log_samples=True)
    table.plot_reliability([tmp_path / "before", tmp_path / "after"], tmp_path / "reliability.png")
    assert list(drawn) == ["reliability-copa-0shot.png"] and list(drawn.popitem()[1]) == [
        str(tmp_path / n) for n in ("before", "after")
    ]
    assert len((tmp_path / "after" / "samples-copa-0shot-1.jsonl").read_text().splitlines()) == 8
    with pytest.raises(InputError, match="no tasks.json"):
        table.plot_reliability([tmp_path / "nowhere"], tmp_path / "reliability.png")
