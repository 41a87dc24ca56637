"""Files of tasks: which one is evaluated, where examples come from, forms that rows are published in, and what the
command does around them."""

import dataclasses
import json
import types

import pytest

from gptjax import evaluate
from gptjax.data import bpe
from gptjax.errors import InputError
from gptjax.tasks import generate, harness, table
from gptjax.tasks.files import find_files, find_pool
from gptjax.tasks.items import load_items
from gptjax.tasks.kinds import Scorer
from gptjax.tasks.likelihood import Score
from gptjax.tasks.prepare import triviaqa, wikitext_pages
from gptjax.tasks.prompts import Prompts
from gptjax.tasks.task import (
    PUBLISHED,
    available,
    function,
    load_task,
    make_item,
    solved,
)


@pytest.fixture(scope="module")
def tokenizer():
    return bpe.train_bpe(["the cat is in the house, it is red or blue. " * 5], 280)


def scorer(tokenizer, context_length=200, text="red"):
    score = lambda requests: [Score(-1.0, len(r.continuation), False, False, False, False) for r in requests]
    return Scorer(tokenizer, context_length, score, lambda prompts, task: [[text] for _ in prompts])


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


PIQA = [{"goal": f"goal {i}", "sol1": "a", "sol2": "b", "label": 0} for i in range(4)]


# --- which files -----------------------------------------------------------------------------------------------


def test_training_rows_are_not_evaluated_but_shown(tokenizer, tmp_path):
    """Files as published, all splits in one folder: ARC's test set is asked, its training set gives the examples."""
    choices = [{"text": "x", "label": "A"}, {"text": "y", "label": "B"}]
    row = lambda text: {"question": {"stem": text, "choices": choices}, "answerKey": "B"}
    for split in ("Train", "Dev", "Test"):
        write_rows(tmp_path / f"ARC-Easy-{split}.jsonl", [row(f"{split} {i}?") for i in range(3)])
    result = harness.evaluate(scorer(tokenizer), load_task("arc_easy"), str(tmp_path), shots=2)
    assert result.protocol["files"] == ["ARC-Easy-Test.jsonl"] and "ARC-Easy-Train.jsonl" in result.protocol["examples"]
    for sample in result.samples:
        assert sample["prompts"][0].count("Question: Train") == 2 and sample["prompts"][0].count("Question: Test") == 1
        assert sample["gold"] == 1 and "Answer: y" in sample["prompts"][0]


def test_files_of_several_splits_are_not_mixed(tmp_path):
    task = load_task("winogrande")
    for name in ("winogrande_dev.jsonl", "winogrande_test.jsonl", "winogrande_train_xl.jsonl"):
        write_rows(tmp_path / name, [{}])
    with pytest.raises(InputError, match="several splits .winogrande_dev.jsonl, winogrande_test.jsonl."):
        find_files(task, str(tmp_path), task.files)
    (tmp_path / "winogrande_test.jsonl").unlink()
    assert find_files(task, str(tmp_path), task.files) == [str(tmp_path / "winogrande_dev.jsonl")]


def test_names_that_begin_alike_are_told_apart(tmp_path):
    """CommitmentBank and the Children's Book Test; StoryCloze's test and validation rows, both a 'cloze_test'."""
    story = "cloze_test_{0}__spring2016 - cloze_test_ALL_{0}.csv"
    names = ("cb-validation.parquet", "cbt_cn-validation.parquet", "cb-train.parquet", "cbt_cn-train.parquet",
             story.format("test"), story.format("val"))  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    for task, evaluated, pool in (("cb", names[0], names[2]), ("cbt_cn", names[1], None), ("storycloze", *names[4:])):
        task = load_task(task)
        assert find_files(task, str(tmp_path), task.files) == [str(tmp_path / evaluated)]
        assert find_pool(task, str(tmp_path)) == ([str(tmp_path / pool)] if pool else [])


def test_the_evaluated_file_is_no_pool(tokenizer, tmp_path):
    """Only LAMBADA's validation rows are there, which its examples are from: never the item that is asked."""
    write_rows(tmp_path / "lambada_validation.jsonl", [{"text": f"it is {word}"} for word in ("red", "blue", "no")])
    task = dataclasses.replace(load_task("lambada"), files=("lambada*.jsonl",))
    assert find_pool(task, str(tmp_path)) == []
    items = load_items(task, *find_files(task, str(tmp_path), task.files))
    prompts = Prompts(task, items, str(tmp_path), 2, seed=0)
    assert prompts.own and all(item.pairs[0][1] not in prompts.before(item, lambda text: True) for item in items)


def test_shards_of_one_split_are_read_together(tmp_path):
    task = load_task("winogrande")
    for i in range(2):
        row = {"sentence": f"the _ is red {i}", "option1": "cat", "option2": "dog", "answer": "1"}
        write_rows(tmp_path / f"winogrande-0000{i}-of-00002.jsonl", [row])
    items = load_items(task, *find_files(task, str(tmp_path), task.files))
    assert [item.pairs[0][1] for item in items] == [" is red 0", " is red 1"]


def test_a_single_file_is_not_its_own_pool(tokenizer, tmp_path):
    """--data=FILE: examples come from the training rows next to it, else from its own without the one that is asked."""
    path, task = tmp_path / "piqa.jsonl", load_task("piqa")
    write_rows(path, PIQA)
    assert find_pool(task, str(path)) == []
    items = load_items(task, str(path))
    prompts = Prompts(task, items, str(path), 3, seed=0)
    for i, item in enumerate(items):
        assert f"goal {i}" not in prompts.before(item, lambda text: True)
    write_rows(tmp_path / "piqa_train.jsonl", PIQA)
    assert find_pool(task, str(path)) == [str(tmp_path / "piqa_train.jsonl")]
    assert find_pool(task, str(tmp_path / "piqa_train.jsonl")) == []
    cola = tmp_path / "cola_dev.jsonl"
    write_rows(cola, [{"sentence": "the cat", "label": 1}])
    with pytest.raises(InputError, match="no rows to find the threshold"):
        harness.evaluate(scorer(tokenizer), load_task("cola_zero_shot"), str(cola))


@pytest.mark.parametrize("name", available())
def test_published_tasks_name_functions_that_there_are(name):
    task = load_task(name)
    named = [task.prepare, task.detokenize, task.units, task.extract, *task.metrics.values()]
    named += [*task.corpus_metrics.values(), *task.figures.values()]
    assert all(callable(function(of)) for of in filter(None, named))
    if task.kind == "generation" and not task.figures:
        assert task.metric in {*task.metrics, *task.corpus_metrics}


# --- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, row, answers", [
    ("boolq", {"passage": "P", "question": "q"}, {"label": [(False, 0), (True, 1), (0, 0)], "answer": [(True, 1)]}),
    ("rte", {"premise": "P", "hypothesis": "H"}, {"label": [("entailment", 0), ("not_entailment", 1), (0, 0), (1, 1)]}),
    ("rte", {"sentence1": "P", "sentence2": "H"}, {"label": [("entailment", 0), (1, 1)]}),
    ("cb", {"premise": "P", "hypothesis": "H"}, {"label": [("contradiction", 1), (2, 2), ("neutral", 2)]}),
    ("wic", {"sentence1": "a", "sentence2": "b", "word": "w"}, {"label": [(False, 0), (True, 1), (0, 0), (1, 1)]}),
])  # fmt: skip
def test_labels_as_names_booleans_and_numbers(name, row, answers):
    for key, cases in answers.items():
        for given, gold in cases:
            assert make_item(load_task(name), row | {key: given}).gold == gold
    with pytest.raises(InputError, match="not among"):
        make_item(load_task(name), row | {"label": -1})


def test_few_shot_translation_is_pairs_of_sentences(tokenizer, tmp_path):
    """GPT-3's appendix G: 'X =', an empty line, the translation; zero-shot it is asked a question."""
    write_rows(tmp_path / "wmt_de_en.jsonl", [{"translation": {"de": f"das {i}", "en": f"the {i}"}} for i in range(2)])
    task = load_task("wmt_de_en_few_shot")
    items = load_items(task, str(tmp_path / "wmt_de_en.jsonl"))
    prompt = Prompts(task, items, str(tmp_path), 1, seed=0).before(items[0], lambda text: True) + items[0].pairs[0][0]
    assert prompt == "das 1 =\n\n the 1\n\ndas 0 =\n\n"
    (item, _) = load_items(load_task("wmt_de_en"), str(tmp_path / "wmt_de_en.jsonl"))
    assert item.pairs[0][0] == "Q: What is the English translation of das 0\nA:"


def test_examples_show_the_answer_not_an_alias():
    row = {"question": "Which?", "answer": {"value": "Onion", "aliases": ["Onion skins", "Onion"]}}
    task = load_task("triviaqa")
    item = make_item(task, triviaqa(row))
    assert item.answers == ("Onion", "Onion skins") and solved(task, [item]) == "Q: Which?\n\nA: Onion"
    assert make_item(task, triviaqa({"context": "c", "answer": "x", "aliases": ["y"]})).answers == ("x", "y")


def test_the_official_file_of_squad_is_one_object(tmp_path):
    asked = [{"question": "q1", "answers": [{"text": "a"}, {"text": "a"}]}, {"question": "q2", "answers": []}]
    whole = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "C", "qas": asked}]}]}
    (tmp_path / "dev-v2.0.json").write_text(json.dumps(whole))
    task = load_task("squad")
    found = load_items(task, *find_files(task, str(tmp_path), task.files))
    assert [item.answers for item in found] == [("a", "a"), ("unanswerable",)]
    assert found[1].pairs[0][0] == "Title: T\n\nBackground: C\n\nQ: q2\n\nA:"


def test_lines_of_wikitext_are_no_pages(tmp_path):
    assert [row["page"] for row in wikitext_pages({"text": " = A = \n \n a . \n = B = \n \n b \n"})] == [
        " = A = \n \n a . \n", " = B = \n \n b \n"
    ]  # fmt: skip
    write_rows(tmp_path / "wikitext.jsonl", [{"text": " = Robert = \n"}, {"text": ""}, {"text": " He was . \n"}])
    with pytest.raises(InputError, match="wikitext.jsonl.*single line"):
        load_items(load_task("wikitext"), str(tmp_path / "wikitext.jsonl"))


@pytest.mark.parametrize("task, row, message", [
    ("race", {"article": "a", "question": "q", "options": list("wxyz"), "answer": ""}, "prepare:race cannot read"),
    ("winograd", {"text": None, "pronoun_loc": 1, "pronoun": "it", "options": ["a", "b"], "label": 0}, "cannot read"),
    ("copa", {"premise": None, "choice1": "a", "choice2": "b", "question": "cause", "label": 0}, "cannot read"),
    ("piqa", {"goal": "g", "sol1": "", "sol2": "b", "label": 1}, "Choice 0 is empty"),
])  # fmt: skip
def test_damaged_rows_are_named(task, row, message, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [row])
    with pytest.raises(InputError, match=f"rows.jsonl.*{message}"):
        load_items(load_task(task), str(tmp_path / "rows.jsonl"))


@pytest.mark.parametrize("keys, message", [
    ('files = "a.jsonl"', "files must be a list"), ('stop = "x"', "stop must be a list"),
    ('[form]\ncontext = "{a}"\nchoices = "b"\ngold = "{c}"', "form must be .*tables"),
    ('[[form]]\ncontext = "{a}"\nchoices = "b"\ngold = 0', "gold of a form must be text"),
])  # fmt: skip
def test_values_of_another_type_in_a_task_file_are_refused(keys, message, tmp_path):
    form = "" if "form]" in keys else '\n[[form]]\ncontext = "{a}"\nchoices = "b"\ngold = "{c}"\n'
    (tmp_path / "my.toml").write_text(f'about = "x"\nkind = "choice"\nmetric = "acc"\n{keys}{form}')
    with pytest.raises(InputError, match=message):
        load_task(str(tmp_path / "my.toml"))


def test_an_item_whose_choices_are_all_cut_is_one_item(tokenizer, tmp_path):
    write_rows(tmp_path / "piqa.jsonl", PIQA)
    cut = lambda requests: [Score(-1.0, 1, False, False, True, False) for _ in requests]
    result = harness.evaluate(scorer(tokenizer)._replace(log_likelihoods=cut), load_task("piqa"), str(tmp_path))
    assert result.protocol["truncated"] == len(PIQA)


# --- generated text --------------------------------------------------------------------------------------------


def test_the_signature_of_bleu_is_in_the_protocol(tokenizer, tmp_path):
    pytest.importorskip("sacrebleu", reason="needs the extra eval")
    write_rows(tmp_path / "wmt_de_en.jsonl", [{"de": "das Haus", "en": "the house"}] * 2)
    result = harness.evaluate(scorer(tokenizer, text="the house"), load_task("wmt_de_en"), str(tmp_path))
    assert result.protocol["bleu_signature"].startswith("nrefs:1|") and "bleu" in result.metrics


def test_beginning_of_text_counts_as_a_token_of_the_prompt(tokenizer, tmp_path, monkeypatch):
    """A tokenizer that adds it: a prompt that just fits without it is cut by one token, and that is counted."""
    specials = types.SimpleNamespace(adds_bos=True)
    adding = types.SimpleNamespace(encode=tokenizer.encode, specials=specials, bos_id=tokenizer.bos_id,
                                   token=tokenizer.token)  # fmt: skip
    ids = tokenizer.encode("Q: the house?\n\nA:")
    assert generate.prompt_ids(adding, "Q: the house?\n\nA:") == [tokenizer.bos_id, *ids]
    assert generate.prompt_ids(tokenizer, "") == [tokenizer.bos_id]
    write_rows(tmp_path / "webqs.jsonl", [{"question": "the house?", "answers": ["red"]}])
    task = load_task("webqs")
    room = len(ids) + task.max_new_tokens
    for context_length, cut in ((room, 1), (room + 1, 0)):
        result = harness.evaluate(scorer(adding, context_length), task, str(tmp_path))
        assert result.protocol["truncated"] == cut
    without = types.SimpleNamespace(encode=tokenizer.encode, specials=specials, bos_id=None)
    with pytest.raises(InputError, match="no end-of-text or beginning-of-text"):
        generate.prompt_ids(without, "")


# --- the command -----------------------------------------------------------------------------------------------


def test_numbers_of_examples():
    assert evaluate.shots_of(["0", "8", "1", "8"]) == [0, 8, 1]
    for bad in (["-1"], ["two"], ["1.5"], [""], []):
        with pytest.raises(InputError, match="give whole numbers from 0 on"):
            evaluate.shots_of(bad)


@pytest.fixture
def command(tokenizer, tmp_path, monkeypatch):
    """The command's flags, with a planted model in place of a workdir's."""
    flags = types.SimpleNamespace(
        data=str(tmp_path), tasks=["piqa"], num_fewshot=["0"], workdir=str(tmp_path), step=None, out=None, seed=0,
        every_checkpoint=False, log_samples=False, limit=None, compare=[], batch_size=1, allow_code_execution=False,
        suite=None, samples=None,
    )  # fmt: skip
    model = types.SimpleNamespace(weights="", dtype="float32", step=7)
    monkeypatch.setattr(evaluate, "FLAGS", flags, raising=False)
    monkeypatch.setattr(evaluate, "load_model", lambda workdir, step: model)
    monkeypatch.setattr(harness, "scorer", lambda model, rows, seed: scorer(tokenizer))
    monkeypatch.setattr(evaluate.table, "plot_reliability", lambda folders, path: None)
    write_rows(tmp_path / "piqa.jsonl", PIQA)
    return flags


def test_whole_texts_are_scored_once_beside_few_shot_tasks(command, tmp_path, capsys):
    (tmp_path / "text8.txt").write_text("the cat is red " * 9)
    command.tasks, command.num_fewshot = ["text8", "piqa"], ["0", "2"]
    results = evaluate._evaluate_tasks()
    assert [(r.task, r.shots) for _, r in results] == [("text8", 0), ("piqa", 0), ("piqa", 2)]
    assert "step 7: piqa, 2-shot\n" in capsys.readouterr().out


def test_two_tasks_of_a_name_are_refused(command, tmp_path):
    (tmp_path / "piqa.toml").write_text((PUBLISHED / "piqa.toml").read_text())
    command.tasks = ["piqa", str(tmp_path / "piqa.toml")]
    with pytest.raises(InputError, match="two files of the name 'piqa'"):
        evaluate._evaluate_tasks()


def test_results_before_a_failure_are_kept(command, tmp_path):
    command.num_fewshot = ["1", "9"]
    with pytest.raises(InputError, match="piqa, 9-shot: .*--num_fewshot=9.*The result before it is in .*tasks.json"):
        evaluate._evaluate_tasks()
    (result,) = json.loads((tmp_path / "tasks" / "tasks.json").read_text())["results"]
    assert (result["task"], result["shots"]) == ("piqa", 1)


def test_a_suite_is_one_table_with_intervals(command, tmp_path):
    """Of the bias suite the tasks whose files are there, and those that need none; --samples of its sampled text."""
    command.tasks, command.suite, command.samples = None, "bias", 3
    rows = [{"sent_more": f"she {i}", "sent_less": f"he {i}", "bias_type": "gender"} for i in range(4)]
    write_rows(tmp_path / "crows_pairs.jsonl", rows)
    results = [result for _, result in evaluate._evaluate_tasks()]
    probes = [f"cooccurrence_{groups}" for groups in ("gender", "race", "religion")]
    assert [result.task for result in results] == ["crows_pairs", *probes]
    (first, *_) = json.loads((tmp_path / "tasks" / "tasks.json").read_text())["results"]
    assert first["metrics"]["stereotype_sum"].keys() == {"value", "stderr", "low", "high", "items"}
    assert results[1].protocol["decoding"].startswith("3 samples at temperature 1.0")
    text = table.table(results)
    assert "95 % interval" in text.splitlines()[0] and "words of women" in text
    command.data = None
    with pytest.raises(InputError, match="--suite needs --data=DIR"):
        evaluate._evaluate_tasks()
    command.tasks, command.suite = ["piqa"], None
    with pytest.raises(InputError, match="piqa needs --data=DIR"):
        evaluate._evaluate_tasks()
