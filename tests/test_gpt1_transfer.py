"""The transfer study: intervals of planted values, what each variant starts from, and that nothing is run twice."""

import json
import random

import jax
import numpy as np
import pytest
from alignment_runs import on_one_device
from runs import main_of

from experiments.gpt1_transfer import rows, runs, summary
from gptjax import finetune as stage
from gptjax.errors import InputError
from gptjax.trained import load_model

STUDY = "experiments.gpt1_transfer"
SIZE = runs.Size(layers=2, width=16, context=32, vocab=280, steps=2, batch=2, rows=40, epochs=1)


# --- figures ------------------------------------------------------------------------------------------------


def test_an_interval_is_students():
    found = summary.interval([1, 2, 3])
    assert found["mean"] == 2 and found["half"] == pytest.approx(4.30265273 / 3**0.5)  # t at .975, 2 degrees
    assert summary.interval([5.0])["half"] is None


def test_intervals_of_five_values_cover_the_planted_mean_95_times_in_100():
    draws = np.random.default_rng(0).normal(3.0, 2.0, (4000, 5))
    covered = [abs(f["mean"] - 3.0) <= f["half"] for f in map(summary.interval, draws)]
    assert abs(np.mean(covered) - 0.95) < 4 * (0.95 * 0.05 / 4000) ** 0.5


def planted(**of_variant):
    """Cells of two tasks; the second is .1 above the first."""
    return [
        {"variant": variant, "task": task, "seed": seed, "value": value + more}
        for variant, values in of_variant.items() for seed, value in enumerate(values)
        for task, more in (("a", 0), ("b", 0.1))
    ]  # fmt: skip


def test_the_average_is_over_tasks_and_differences_are_paired_by_seed():
    cells = planted(full=[0.5, 0.6, 0.7], no_pretraining=[0.4, 0.5, 0.6], lstm=[0.7, 0.8, 0.91], no_auxiliary=[0.5])
    found = summary.table(cells, "ab", [0, 1, 2], summary.VARIANTS)
    np.testing.assert_allclose(found["full"]["average"]["values"], [55, 65, 75])
    np.testing.assert_allclose(found["full"]["b"]["mean"], 70)
    of = summary.comparison(found)
    assert of["no_pretraining"]["mean"] == pytest.approx(-10) and of["no_pretraining"]["half"] < 1e-9
    assert of["no_pretraining"]["verdict"] == "agrees" and of["no_pretraining"]["published"] == pytest.approx(-14.8)
    assert of["lstm"]["verdict"] == "disagrees" and of["no_auxiliary"]["verdict"] == "undecided"
    partial = summary.table(cells[:-1], "ab", [0, 1, 2], summary.VARIANTS)
    assert "no_auxiliary" not in partial  # its only seed has one task


# --- rows ---------------------------------------------------------------------------------------------------


def test_rows_of_the_standard_library_have_a_right_answer():
    pairs = [(f"def f{i}():", f"Summary {i}.") for i in range(20)]
    right = dict(pairs)
    for row in rows.multiple_choice(pairs):
        assert row["choices"][row["gold"]] == right[row["context"]] and len(set(row["choices"])) == 4
    made = rows.matches(pairs)
    assert [row["label"] == "match" for row in made] == [right[r["signature"]] == r["summary"] for r in made]
    assert sum(row["label"] == "match" for row in made) == 10


# --- the runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(workdir, arguments) of a study that has run: one task, two seeds, the layers with one of them."""
    folder, rng = tmp_path_factory.mktemp("transfer"), random.Random(0)
    sentence = lambda: " ".join(rng.choice(("the", "cat", "sat", "on", "mat", "dog")) for _ in range(6))
    (folder / "text.txt").write_text("\n".join(sentence() for _ in range(600)))
    (folder / "data" / "cola").mkdir(parents=True)
    for split, n in (("train", 60), ("dev", 16)):
        lines = [f"x\t{i % 2}\t\t{sentence()}\n" for i in range(n)]
        (folder / "data" / "cola" / f"in_domain_{split}.tsv").write_text("".join(lines))
    sizes = [f"--{key}={value}" for key, value in vars(SIZE).items()]
    arguments = [f"--workdir={folder / 'out'}", f"--data={folder / 'data'}", f"--text={folder / 'text.txt'}", *sizes]
    arguments += ["--seeds=0,1", "--layer_seeds=1"]
    with pytest.MonkeyPatch.context() as patch, on_one_device():
        patch.setattr("gptjax.report.write", lambda workdir: workdir)  # a dozen pages of pictures
        code, out, err = main_of(STUDY, *arguments)
    assert code == 0, err
    assert "no_pretraining - full" in out
    return folder / "out", arguments


@pytest.mark.slow
def test_all_cells_are_there(study):
    cells = [json.loads(line) for line in (study[0] / "results.jsonl").read_text().splitlines()]
    found = json.loads((study[0] / "results.json").read_text())
    assert len(cells) == len({(c["variant"], c["seed"]) for c in cells}) == 4 * 2 + 2
    assert all(c["value"] == c["metrics"]["matthews"] for c in cells)
    assert list(found["layers"]) == ["0", "1", "2"] and set(found["table"]) == set(summary.VARIANTS)
    assert {p["model"] for p in found["zero_shot"]} == {"transformer", "lstm"}
    assert {p["step"] for p in found["zero_shot"]} == {1, 2} and (study[0] / "results.png").exists()
    sizes = {model: p["parameters"] for model, p in found["pretraining"].items()}
    assert abs(sizes["lstm"] / sizes["transformer"] - 1) < 0.15


@pytest.mark.slow
def test_a_second_call_runs_nothing_and_finds_the_same(study):
    workdir, arguments = study
    before = [(workdir / name).read_bytes() for name in ("results.jsonl", "zero_shot.json")]
    result = json.loads((workdir / "results.json").read_text())
    with pytest.MonkeyPatch.context() as patch, on_one_device():
        for name in ("finetune", "pretrain"):
            patch.setattr(runs, name, lambda *_: pytest.fail("it is done already"))
        assert main_of(STUDY, *arguments)[0] == 0
    assert before == [(workdir / name).read_bytes() for name in ("results.jsonl", "zero_shot.json")]
    again = json.loads((workdir / "results.json").read_text())
    assert {**again, "seconds": 0} == {**result, "seconds": 0}


def test_a_line_cut_short_is_run_again_and_another_size_is_refused(tmp_path):
    results = runs.Results(tmp_path, {"rows": 1})
    for seed in (0, 1):
        results.add(runs.Cell("cola", "full", seed), 0.5, {}, 1.0)
    text = results.path.read_text()
    results.path.write_text(text[:-5])
    assert runs.Results(tmp_path, {"rows": 1}).done == {runs.Cell("cola", "full", 0)}
    assert results.path.read_text() == text.splitlines(keepends=True)[0]
    with pytest.raises(InputError, match="runs of another study .rows differ."):
        runs.Results(tmp_path, {"rows": 2})


@pytest.mark.slow
def test_what_each_variant_starts_from(study, tmp_path):
    """The weights before the first step, against the pre-trained ones."""
    workdir, task = study[0], rows.PUBLISHED[0]

    def start(variant, seed=0):
        seen = {}

        def capture(*_, init, **__):
            seen.update(jax.device_get(init().params))
            raise KeyboardInterrupt

        cell = runs.Cell("cola", variant, seed)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(stage, "supervised", capture)
            stage.finetune(runs.finetune_config(cell, task, SIZE, workdir), tmp_path / cell.name)
        return seen["trunk"]

    with on_one_device():
        base, lstm = (load_model(workdir / model).params for model in ("transformer", "lstm"))
        full, random_, other, none = (
            start("full"), start("no_pretraining"), start("no_pretraining", 1), start("layers_1")
        )  # fmt: skip
        assert all(map(np.array_equal, jax.tree.leaves(start("lstm")["cell"]), jax.tree.leaves(lstm["cell"])))
    kernel = lambda trunk: np.asarray(trunk["blocks"]["mlp"]["c_fc"]["kernel"])
    same = lambda a, b: [np.array_equal(x, y) for x, y in zip(kernel(a), kernel(b), strict=True)]
    assert same(full, base) == [True, True] and same(none, base) == [True, False]
    assert same(random_, base) == same(random_, other) == [False, False]
    V = len(base["wte"])
    embedded = lambda trunk: np.array_equal(trunk["wte"][:V], base["wte"])
    assert embedded(full) and embedded(none) and not embedded(random_)
    assert abs(np.std(random_["wte"][:V]) - 0.02) < 4 * 0.02 / (2 * random_["wte"][:V].size) ** 0.5


def test_each_variant_is_gpt1s(tmp_path):
    of = lambda variant: runs.finetune_config(runs.Cell("cola", variant, 3), rows.PUBLISHED[0], SIZE, tmp_path)
    full, none, no_aux, layers = map(of, ("full", "no_pretraining", "no_auxiliary", "layers_1"))
    assert full.lm_weight == 0.5 and full.transfer is None and full.seed == 3 and full.batch_size == 32
    assert none.transfer == -1 and none.lm_weight == 0.5 and layers.transfer == 1
    assert no_aux.lm_weight == 0 and no_aux.transfer is None
    assert full.optimizer.name == "gpt1_adam" and full.optimizer.learning_rate == pytest.approx(6.25e-5 * 48**0.5)
    assert of("lstm").init_from.endswith("lstm")
