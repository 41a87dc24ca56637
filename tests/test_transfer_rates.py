"""The transfer study without its runs: the choice of learning rates, MCTest's rows, the comparison of each task."""

import json
from types import SimpleNamespace

import pytest

from experiments.gpt1_transfer import rates, rows, runs, summary

SIZE = runs.Size(steps=100)


def test_pretraining_takes_the_rate_of_the_lowest_loss(monkeypatch, tmp_path):
    tried = []

    def pretrain(c, workdir):
        tried.append(c)
        best = 9 if "units" in c.model else 1
        factor = float(workdir.rpartition("-")[2])
        return SimpleNamespace(finished=True, evaluation={"loss": abs(factor - best)})

    monkeypatch.setattr(rates, "pretrain", pretrain)
    found = rates.pretraining(SIZE, "text", tmp_path)
    assert rates.factors(found) == {"transformer": 1, "lstm": 9}
    assert [t["loss"] for t in found["lstm"]["tried"]] == [8, 6, 0]
    assert {c.steps for c in tried} == {25} and {c.schedule.warmup_tokens for c in tried} == {2.5 * 16 * 128}
    of_lstm = [c.optimizer.learning_rate for c in tried[3:]]
    assert of_lstm == pytest.approx([f * 2.5e-4 * (2048 / SIZE.lstm.units) ** 0.5 for f in (1, 3, 9)])


def test_fine_tuning_takes_one_rate_for_a_model_by_held_out_training_rows(monkeypatch, tmp_path):
    score = {("full", 1): 0.6, ("full", 4): 0.7, ("full", 16): 0.8, ("no_pretraining", 1): 0.5,
             ("no_pretraining", 4): 0.7, ("no_pretraining", 16): 0.5, ("lstm", 1): 0.6, ("lstm", 4): 0.5,
             ("lstm", 16): 0.5}  # fmt: skip
    seen = []

    def run_cell(c, task, folder, log):
        seen.append((task.name, c))
        _, *variant, _, factor = folder.name.split("-")
        return score["-".join(variant), float(factor)], {}

    monkeypatch.setattr(runs, "run_cell", run_cell)
    found = rates.finetuning(rows.PUBLISHED, SIZE, tmp_path)
    assert rates.factors(found) == {"transformer": 4, "lstm": 1}  # the full one alone would have taken 16
    assert [name for name, _ in seen[:4]] == ["sst2", "sst2", "sick", "sick"] and len(seen) == 2 * 3 * 3
    for _, c in seen:
        assert c.data.train.endswith("_train.jsonl") and c.data.valid == "0.2" and c.data.test is None
        assert c.seed == rates.SEED not in range(10)
    assert found["transformer"]["tried"][1]["learning_rate"] == pytest.approx(4 * 6.25e-5 * 12**0.5)


def test_a_question_of_mctest_is_before_its_story(tmp_path):
    """The end of a text is cut: a question at the end would be lost."""
    task, folder = rows.PUBLISHED[3], tmp_path / "data" / "mctest"
    folder.mkdir(parents=True)
    cells = [text for i in range(4) for text in (f"one: Who {i}?", *(f"{i}{letter}" for letter in "abcd"))]
    for name in task.files:
        (folder / name).write_text("\t".join(("id.0", "about", "He came.\\newlineHe went.", *cells)) + "\n")
        (folder / name).with_suffix(".ans").write_text("A\tB\tC\tD\n")
    assert rows.prepare(str(tmp_path / "data"), tmp_path / "rows", 0) == (task,)
    train = [json.loads(line) for line in (tmp_path / "rows" / "mctest_train.jsonl").read_text().splitlines()]
    assert [(r["question"], r["gold"], r["choices"][1]) for r in train] == [(f"Who {i}?", i, f"{i}b") for i in range(4)]
    assert train[0]["story"] == "He came.\nHe went."
    c = runs.finetune_config(runs.Cell("mctest", "full", 0), task, SIZE, tmp_path)
    assert c.data.form == "rows" and c.data.fields.context == "question,story" and c.batch_size == 8
    zero_shot = json.loads((tmp_path / "rows" / "multiple_choice.jsonl").read_text().splitlines()[0])
    assert zero_shot["context"] == "He came.\nHe went. Who 0?"


def test_a_choice_has_fewer_examples_for_as_many_tokens():
    assert [rows.share(task, 2000) for task in rows.PUBLISHED] == [2000, 2000, 2000, 250]
    assert rows.share(rows.PUBLISHED[3], 0) == 0


def test_each_task_is_compared_and_those_of_table_5_with_it():
    cells = [
        {"variant": variant, "task": task, "seed": seed, "value": value + seed / 10}
        for variant, value in (("full", 0.5), ("no_pretraining", 0.3)) for task in ("cola", "sick") for seed in (0, 1)
    ]  # fmt: skip
    table = summary.table(cells, ("cola", "sick"), (0, 1), summary.VARIANTS)
    of = summary.comparison(table)["no_pretraining"]
    assert of["tasks"]["cola"]["published"] == pytest.approx(18.9 - 45.4) and of["verdict"] == "agrees"
    assert of["tasks"]["cola"]["mean"] == of["tasks"]["sick"]["mean"] == pytest.approx(-20)
    assert "published" not in of["tasks"]["sick"]
