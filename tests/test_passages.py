"""Tasks with several questions on a passage (SuperGLUE's MultiRC, ReCoRD and WSC; CoQA, QuAC, DROP): rows as published
become GPT-3's prompts, and planted models get the scores that are counted by hand."""

import json

import numpy as np
import pytest

from gptjax.data import bpe
from gptjax.errors import InputError
from gptjax.evals.superglue import METRICS
from gptjax.tasks import harness, metrics, table
from gptjax.tasks.items import load_items
from gptjax.tasks.kinds import Scorer
from gptjax.tasks.likelihood import Score
from gptjax.tasks.prompts import Prompts
from gptjax.tasks.task import load_task


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train_bpe(["the cat is in the house, it is red or blue. " * 5], 280)


def model(tokenizer, likes=lambda text: False, answers=()):
    """A model that gives a continuation 1 nat if it likes it, with all of its context, and 2 a token else, and that
    writes the answers in their order."""

    def log_likelihoods(requests):
        found = []
        for request in requests:
            text, n = tokenizer.decode([*request.context, *request.continuation]), len(request.continuation)
            found.append(Score(-1.0 if likes(text) else -2.0 * n, n, False, False, False, False))
        return found

    return Scorer(tokenizer, 4000, log_likelihoods, lambda prompts, task: [[text] for text in answers])


def evaluated(scorer, name, folder, *rows, **options):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return harness.evaluate(scorer, load_task(name), str(folder / f"{name}.jsonl"), **options)


def items(name, folder, *rows):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_items(load_task(name), str(folder / f"{name}.jsonl"))


# --- questions on one passage -------------------------------------------------------------------------------------

ON_A_PASSAGE = {
    "race": lambda text, i: {"article": text, "question": f"{i}?", "options": ["a", "b"], "answer": "A"},
    "race_zero_shot": lambda text, i: {"article": text, "question": f"{i}?", "options": ["a", "b"], "answer": "A"},
    "boolq": lambda text, i: {"passage": text, "question": f"is it {i}", "answer": True},
    "record": lambda text, i: {"passage": text, "query": f"@placeholder {i}", "entities": ["Bo", "Al"],
                               "answers": ["Bo"]},
    "anli_r1": lambda text, i: {"premise": text, "hypothesis": f"H {i}", "label": 0},
    "cb": lambda text, i: {"premise": text, "hypothesis": f"H {i}", "label": "neutral"},
    "rte": lambda text, i: {"premise": text, "hypothesis": f"H {i}", "label": "entailment"},
}  # fmt: skip


@pytest.mark.parametrize("name", ON_A_PASSAGE)
def test_questions_on_one_passage_are_one_unit_of_the_standard_errors(tokenizer, tmp_path, name):
    """Of two passages with two questions each, all of the first are right and none of the second: an error of 1/2, not
    of the 1/sqrt(12) of four answers that are independent. Examples are single questions: there are three others."""
    rows = [ON_A_PASSAGE[name](text, i) for text in ("One.", "Two.") for i in range(2)]
    found = items(name, tmp_path, *rows)
    likes = lambda text: text.endswith(tuple(item.pairs[item.gold][1] for item in found)) == ("One." in text)
    result = evaluated(model(tokenizer, likes), name, tmp_path, *rows)
    assert result.metrics["acc"] == (0.5, pytest.approx(0.5)) and result.protocol["clusters"] == 2
    assert "over 2 clusters of items" in table.protocol(result)
    assert len(Prompts(load_task(name), found, str(tmp_path), 3, seed=0)._drawn(found[0])) == 3


def test_squad_is_clustered_by_paragraph(tokenizer, tmp_path):
    rows = [{"title": "T", "context": text, "question": f"{i}?", "answers": ["yes"]} for text in "ab" for i in range(2)]
    result = evaluated(model(tokenizer, answers=("yes", "yes", "no", "no")), "squad", tmp_path, *rows)
    assert result.metrics["f1"] == (0.5, pytest.approx(0.5)) and result.protocol["clusters"] == 2


# --- MultiRC ------------------------------------------------------------------------------------------------------


def multirc(text, *questions):
    """questions: the labels of each one's answers."""
    return {"idx": 7, "passage": {"text": text, "questions": [
        {"question": f"What {q}?", "idx": q, "answers": [
            {"text": f"answer {q}{a}", "idx": a, "label": label} for a, label in enumerate(labels)
        ]} for q, labels in enumerate(questions)
    ]}}  # fmt: skip


def test_multirc_by_hand(tokenizer, tmp_path):
    """Answers 1 0, 1 1, 0 are predicted 1 0, 0 1, 1: one question is right, F1a is 2 2 / (3 + 3)."""
    row = multirc("A text.", (1, 0), (1, 1), (0,))
    chosen = {"00": 1, "01": 0, "10": 0, "11": 1, "20": 1}
    likes = lambda text: any(text.endswith(f"[{bool(label)}] answer {name}") for name, label in chosen.items())
    result = evaluated(model(tokenizer, likes), "multirc", tmp_path, row)
    assert result.metrics["exact_match"][0] == pytest.approx(1 / 3) and np.isnan(result.metrics["exact_match"][1])
    assert result.metrics["f1"][0] == pytest.approx(2 / 3) and result.metrics["acc"][0] == pytest.approx(3 / 5)
    assert result.metric == "exact_match" and result.protocol["decided_by"] == "acc"
    (question,) = {s["prompts"][0] for s in result.samples[:2]}
    assert question == "READING COMPREHENSION ANSWER KEY\n\nA text.\n\nWhat 0?"
    assert result.samples[0]["continuations"] == ["\n- [False] answer 00", "\n- [True] answer 00"]


def test_an_example_of_multirc_is_a_question_with_all_its_answers(tmp_path):
    task, rows = load_task("multirc"), [multirc("One.", (1, 0)), {**multirc("Two.", (0, 1)), "idx": 8}]
    found = items("multirc", tmp_path, *rows)
    assert [item.group for item in found] == ["7-0", "7-0", "8-0", "8-0"]
    text = Prompts(task, found, str(tmp_path), 1, seed=0).before(found[3], lambda text: True)
    assert text == f"{task.description}\n\nOne.\n\nWhat 0?\n- [True] answer 00\n- [False] answer 01\n\n"
    with pytest.raises(InputError, match="1 items to draw examples from, fewer than --num_fewshot=2"):
        Prompts(task, found, str(tmp_path), 2, seed=0)


def test_multirc_as_the_hub_has_it(tmp_path):
    row = {"paragraph": "P.", "question": "Q?", "answer": "a", "label": 1,
           "idx": {"paragraph": 2, "question": 3, "answer": 0}}  # fmt: skip
    (item,) = items("multirc", tmp_path, row)
    assert item.group == "2-3" and item.pairs[item.gold] == ("P.\n\nQ?", "\n- [True] a")


def test_metrics_of_choices_know_groups():
    """All answers of four questions right or wrong together: the error of F1 is that of four, not of forty."""
    groups = np.repeat(np.arange(4), 10)
    predicted, gold = np.repeat([1, 1, 0, 1], 10), np.ones(40, int)
    alone = np.arange(40)
    value, error = metrics.f1_of_second(predicted, gold, alone, groups)
    assert value == pytest.approx(2 * 3 / (3 + 4))
    assert error / metrics.f1_of_second(predicted, gold, alone, alone)[1] == pytest.approx(np.sqrt(10), rel=0.25)
    assert metrics.all_right(predicted, gold, groups, groups) == (0.75, pytest.approx(np.sqrt(0.75 * 0.25 / 3)))


def test_exact_match_of_questions_is_over_passages():
    """Eight questions, two a passage, right or wrong together: the error is that of four passages."""
    questions, passages = np.repeat(np.arange(8), 3), np.repeat(np.arange(4), 6)
    predicted, gold = np.repeat([1, 1, 0, 1], 6), np.ones(24, int)
    found = metrics.all_right(predicted, gold, questions, passages)
    assert found == (0.75, pytest.approx(np.sqrt(0.75 * 0.25 / 3)))


def test_macro_f1_by_hand():
    """Gold 0 0 1 2, predicted 0 1 1 1: F1 2/3, 2/4 and 0 of the three classes."""
    found = metrics.macro_f1(np.array([0, 1, 1, 1]), np.array([0, 0, 1, 2]), *2 * [np.arange(4)])
    assert found[0] == pytest.approx((2 / 3 + 1 / 2) / 3)


# --- ReCoRD -------------------------------------------------------------------------------------------------------

TEXT = "Ann Lee met Bo in Rome\n@highlight\nA visit\n@highlight\nIt was short!"
RECORD = {
    "idx": 0,
    "passage": {"text": TEXT, "entities": [{"start": 0, "end": 6}, {"start": 12, "end": 13}, {"start": 18, "end": 21},
                                           {"start": 12, "end": 13}]},
    "qas": [{"query": "@placeholder's guest left", "idx": 0,
             "answers": [{"start": 12, "end": 13, "text": "Bo"}, {"start": 0, "end": 6, "text": "Ann Lee"}]},
            {"query": "They like @placeholder", "idx": 1, "answers": [{"start": 18, "end": 21, "text": "Rome"}]}],
}  # fmt: skip


def test_record_by_hand(tokenizer, tmp_path):
    """'Bo' is right of the first query; of the second, 'Ann Lee' is wrong."""
    likes = lambda text: text.endswith(("\n- Bo's guest left", "\n- They like Ann Lee"))
    result = evaluated(model(tokenizer, likes), "record", tmp_path, RECORD)
    assert result.metrics["exact_match"][0] == 0.5 and result.metrics["f1"][0] == 0.5
    assert result.samples[0]["prompts"][0] == "Ann Lee met Bo in Rome\n- A visit.\n- It was short!"
    assert result.samples[0]["continuations"] == [f"\n- {name}'s guest left" for name in ("Ann Lee", "Bo", "Rome")]
    assert result.protocol["decided_by"] == "acc_token"
    (first, second) = items("record", tmp_path, RECORD)
    assert first.names == ("Ann Lee", "Bo", "Rome") and first.answers == ("Bo", "Ann Lee") and second.gold == 2


def test_record_is_decided_per_token(tokenizer, tmp_path):
    """A sentence of n tokens costs 2 + n nats: the shortest has the largest sum, the longest the largest mean."""

    def log_likelihoods(requests):
        lengths = [len(request.continuation) for request in requests]
        return [Score(-2.0 - n, n, False, False, False, False) for n in lengths]

    row = {"passage": "P", "query": "@placeholder left", "entities": ["Bo", "the blue house", "Ann"], "answers": ["Bo"]}
    scorer = model(tokenizer)._replace(log_likelihoods=log_likelihoods)
    result = evaluated(scorer, "record", tmp_path, row)
    (sample,) = result.samples
    assert sample["predicted"]["acc_token"] != sample["predicted"]["acc"] == int(np.argmin(sample["tokens"]))
    longest = row["entities"][int(np.argmax(sample["tokens"]))]
    assert result.metrics["exact_match"][0] == float(longest == "Bo")
    again = evaluated(scorer, "record", tmp_path, {**row, "answers": [longest]})
    assert again.metrics["exact_match"][0] == 1.0 and again.metrics["acc_token"][0] == 1.0


def test_record_gives_part_of_a_name_part_of_f1(tokenizer, tmp_path):
    row = {"passage": "Ann Lee met Ann.", "query": "@placeholder left", "entities": ["Ann Lee", "Ann"],
           "answers": ["Ann Lee"]}  # fmt: skip
    result = evaluated(model(tokenizer, lambda text: text.endswith("- Ann left")), "record", tmp_path, row)
    assert result.metrics["exact_match"][0] == 0 and result.metrics["f1"][0] == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="record.jsonl.*No answer of 'Eve' is an entity"):
        items("record", tmp_path, {**row, "answers": ["Eve"]})


# --- WSC ----------------------------------------------------------------------------------------------------------


def test_wsc(tmp_path):
    target = {"span1_text": "Mark", "span1_index": 0, "span2_text": "him", "span2_index": 4}
    row = {"text": "Mark told Pete about him, again.", "target": target, "label": False}
    flat = {**row, **target, "label": 1}
    del flat["target"]
    no, yes = items("wsc", tmp_path, row, flat)
    assert no.pairs[0] == (
        "Passage: Mark told Pete about *him*, again.\nQuestion: In the passage above, does the pronoun \"*him*\" refer "
        "to Mark?\nAnswer:", " no",
    )  # fmt: skip
    assert (no.gold, yes.gold) == (0, 1)
    with pytest.raises(InputError, match="wsc.jsonl.*Word 3 of the text.*not the pronoun 'him'"):
        items("wsc", tmp_path, {**row, "target": {**target, "span2_index": 3}})


# --- conversations ------------------------------------------------------------------------------------------------

COQA = {
    "id": "c1", "story": "Ann has a red cat.",
    "questions": [{"input_text": "Who?", "turn_id": 1}, {"input_text": "What color?", "turn_id": 2}],
    "answers": [{"input_text": "Ann", "turn_id": 1}, {"input_text": "red", "turn_id": 2}],
    "additional_answers": {"0": [{"input_text": "it is Ann"}, {"input_text": "blue"}],
                           "1": [{"input_text": "Ann"}, {"input_text": "red"}]},
}  # fmt: skip


def test_coqa_by_hand(tokenizer, tmp_path):
    """'Ann' has F1 1, 1/2, 1 with the three answers: each left out, the best is 1. 'blue' has 0, 1, 0: 2/3 in the
    mean."""
    result = evaluated(model(tokenizer, answers=("Ann", "blue")), "coqa", tmp_path, COQA)
    assert [s["f1"] for s in result.samples] == [1.0, pytest.approx(2 / 3)]
    assert result.samples[1]["prompt"] == "Ann has a red cat.\n\nQ: Who?\n\nA: Ann\n\nQ: What color?\n\nA:"
    assert np.isnan(result.metrics["f1"][1])  # a single conversation
    hub = {"story": "S.", "questions": ["Q?"], "answers": {"input_text": ["a"], "answer_start": [0]}}
    (item,) = items("coqa", tmp_path, hub)
    assert item.answers == ("a",) and item.pairs[0][0] == "S.\n\nQ: Q?\n\nA:"


def test_the_official_file_of_coqa_is_one_object(tokenizer, tmp_path):
    whole = {"version": "1.0", "data": [COQA, {**COQA, "id": "c2"}]}
    (tmp_path / "coqa-dev-v1.0.json").write_text(json.dumps(whole, indent=1))
    scorer = model(tokenizer, answers=("Ann", "red") * 2)
    result = harness.evaluate(scorer, load_task("coqa"), str(tmp_path))
    assert result.items == 4 and result.metrics["f1"] == (pytest.approx((1 + 1) / 2), pytest.approx(0.0))


def test_an_example_of_a_conversation_is_its_last_turn(tmp_path):
    task, found = load_task("coqa"), items("coqa", tmp_path, COQA, {**COQA, "id": "c2", "story": "Bo."})
    text = Prompts(task, found, str(tmp_path), 1, seed=0).before(found[0], lambda text: True)
    assert text == "Bo.\n\nQ: Who?\n\nA: Ann\n\nQ: What color?\n\nA: red\n\n"


def test_leaving_one_out():
    f = lambda prediction, *golds: metrics.leave_one_out(metrics.exact_match, prediction, golds)
    assert f("a", "a", "b") == 0.5 and f("a", "a", "a", "b") == 1 and f("a", "a") == 1 and f("a", "b", "c") == 0


def quac_turn(question, own, *answers):
    return {"question": question, "orig_answer": {"text": own}, "answers": [{"text": text} for text in answers]}


QUAC = {"title": "Perry", "section_title": "Career", "paragraphs": [{
    "id": "d1", "context": "He played for the Bears in 1985. CANNOTANSWER",
    "qas": [quac_turn("whom for?", "the Bears", "the Bears", "for the Bears"),
            quac_turn("why?", "1985", "CANNOTANSWER", "1985"), quac_turn("when?", "in 1985", "1985", "Bears")],
}]}  # fmt: skip


def test_quac_by_hand(tokenizer, tmp_path):
    """Half of the annotators can't answer 'why?', so nobody can; of 'when?' they do not agree, so it is not asked."""
    result = evaluated(model(tokenizer, answers=("Bears", "cannotanswer")), "quac", tmp_path, {"data": [QUAC]})
    # with 'the Bears' F1 is 1, as articles do not count, with 'for the Bears' 2/3; each is left out once
    assert [s["f1"] for s in result.samples] == [pytest.approx((2 / 3 + 1) / 2), 1.0]
    assert [s["answers"] for s in result.samples] == [["the Bears", "for the Bears"], ["CANNOTANSWER"]]
    assert result.protocol["not_asked"] == {"turns on whose answer the annotators disagree": 1}
    before = "TITLE: Perry - Career\nPARAGRAPH: He played for the Bears in 1985.\n\n"
    assert result.samples[1]["prompt"] == f"{before}Q: whom for?\n\nA: the Bears\n\nQ: why?\n\nA:"
    hub = {"dialogue_id": "d", "wikipedia_page_title": "T", "section_title": "S", "context": "C CANNOTANSWER",
           "questions": ["q"], "answers": {"texts": [["x", "x"]]}, "orig_answers": {"texts": ["x"]}}  # fmt: skip
    (item,) = items("quac", tmp_path, hub)
    assert item.pairs[0][0] == "TITLE: T - S\nPARAGRAPH: C\n\nQ: q\n\nA:" and item.answers == ("x", "x")


# --- DROP ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction, answer, em, f1", [
    ("4", "4.0", 1, 1.0),  # numbers as floats
    ("4 years", "4", 0, 0.67),  # P 1/2, R 1; two digits
    ("the 4 cats", "5 cats", 0, 0.0),  # another number
    ("a well-known cat", "well known cat", 1, 1.0),
    ("Bears", "Bears\nBulls", 0, 0.5),  # one of two spans
    ("$5", "5", 1, 1.0),
    ("cat cat", "cat", 0, 1.0),  # sets of words
    ("", "cat", 0, 0.0),
])  # fmt: skip
def test_drop_by_hand(prediction, answer, em, f1):
    assert (metrics.drop_exact_match(prediction, answer), metrics.drop_f1(prediction, answer)) == (em, f1)


def test_drop_rows(tokenizer, tmp_path):
    none = {"day": "", "month": "", "year": ""}
    number = {"number": "4", "date": none, "spans": []}
    two = {"number": "", "date": none, "spans": ["Bears", "Bulls"]}
    date = {"number": "", "date": {"day": "2", "month": "June", "year": "1990"}, "spans": []}
    pairs = [{"question": f"Q{i}?", "answer": answer, "validated_answers": [number], "query_id": str(i)}
             for i, answer in enumerate((two, date))]  # fmt: skip
    (tmp_path / "drop_dataset_dev.json").write_text(json.dumps({"p1": {"passage": "P.", "qa_pairs": pairs}}))
    result = harness.evaluate(model(tokenizer, answers=("Bulls", "june 2, 1990")), load_task("drop"), str(tmp_path))
    assert [s["answers"] for s in result.samples] == [["Bears\nBulls", "4"], ["2 June 1990", "4"]]
    assert [s["f1"] for s in result.samples] == [0.5, 1.0] and result.metrics["exact_match"][0] == 0.0
    hub = {"passage": "P.", "question": "Q?", "answer": two, "query_id": "x",
           "validated_answers": {"number": ["4"], "date": [none], "spans": [[]]}}  # fmt: skip
    (item,) = items("drop", tmp_path, hub)
    assert item.answers == ("Bears\nBulls", "4") and item.shown == "Bears, Bulls"
    assert item.pairs[0][0] == "Passage: P.\n\nQuestion: Q?\n\nAnswer:"


def test_a_list_of_all_annotators_spans_is_refused(tmp_path):
    """Two annotators' '4' would be an answer of two spans, of which a prediction can only have one."""
    row = {"passage": "P.", "question": "Q?", "answers_spans": {"spans": ["4", "4"], "types": ["number"] * 2}}
    with pytest.raises(InputError, match="drop.jsonl.*answers_spans .*use drop_dataset_dev.json or EleutherAI/drop"):
        items("drop", tmp_path, row)


def test_a_drop_question_without_an_answer_is_not_asked_and_counted(tokenizer, tmp_path):
    none = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": []}
    pairs = [{"question": f"Q{i}?", "answer": answer, "validated_answers": [none, {**none, "spans": [" "]}]}
             for i, answer in enumerate((none, {**none, "number": "4"}, none))]  # fmt: skip
    file = tmp_path / "drop_dataset_dev.json"
    file.write_text(json.dumps({"p1": {"passage": "P.", "qa_pairs": pairs}}))
    result = harness.evaluate(model(tokenizer, answers=("4",)), load_task("drop"), str(tmp_path))
    assert result.items == 1 and result.samples[0]["answers"] == ["4"]
    assert result.protocol["not_asked"] == {"questions without an answer": 2}
    assert "2 questions without an answer not asked" in table.protocol(result)
    file.write_text(json.dumps({"p1": {"passage": "P.", "qa_pairs": pairs[:1]}}))
    with pytest.raises(InputError, match="no rows but questions without an answer for the task drop"):
        load_items(load_task("drop"), str(file))


# --- SuperGLUE ----------------------------------------------------------------------------------------------------

GPT3 = {  # Brown et al. 2020, Table H.1, few-shot, in the order of METRICS
    "73.19": (77.5, 82.1, 57.2, 92.0, 72.9, 55.3, 75.0, 32.5, 74.8, 89.0, 90.1),
    "50.15": (43.1, 42.9, 26.1, 67.0, 52.3, 49.8, 58.7, 6.09, 45.0, 69.8, 70.7),
}


@pytest.mark.parametrize("score", GPT3)
def test_eight_tasks_have_a_superglue_score(score):
    values, results = iter(GPT3[score]), []
    for name, names in METRICS.items():
        main = load_task(name).metric
        found = {main if metric == "accuracy" else metric: (next(values) / 100, 0.02) for metric in names}
        results.append(harness.Result(name, 32, 100, main, found, {}, []))
    result = harness.superglue_result(results)
    assert f"{result.metrics['score'][0]:.2f}" == score
    assert result.metrics["score"][1] == pytest.approx(2 / np.sqrt(8))  # eight errors of 2, independent
    assert table.table([result]).splitlines()[1].startswith(f"superglue     32    800  score *  {score[:4]}")
    assert harness.superglue_result(results[1:]) is None


@pytest.mark.parametrize("name", METRICS)
def test_every_task_of_superglue_measures_what_the_score_needs(name):
    assert {metric for metric in METRICS[name] if metric != "accuracy"} <= set(load_task(name).measured)
    assert load_task(name).fewshot == ("fixed" if name in ("wsc", "multirc") else "per_item")  # GPT-3 §3.7
