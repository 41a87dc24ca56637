"""The study of scaling (experiments/scaling_laws): its grid, and its protocol on runs that follow a known law."""

import datetime
import functools
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from test_scaling_fit import SOME

from experiments.scaling_laws import __main__ as study
from experiments.scaling_laws import grid, summary
from gptjax.errors import InputError
from gptjax.scaling import points, predict
from gptjax.scaling.fitting import fit
from gptjax.scaling.laws import CHINCHILLA, optimum

LAW = {"E": 1.5, "A": 30.0, "B": 60.0, "alpha": 0.35, "beta": 0.35}  # its optimum: 7.2 tokens a parameter, at any C


def names(argument):
    return [point.name for point in grid.get_sweep(grid.get_config(argument), argument).points]


def test_the_grid():
    ladder = grid.get_sweep(grid.base(), "ladder@20").points
    assert len(ladder) == len(set(names("ladder@20"))) == 24 and len(names("coarse")) == 6 and len(names("rates")) == 3
    for budget in grid.BUDGETS:
        of_budget = [p for p in ladder if p.budget == budget and p.config.seed == 0]
        middle = math.sqrt(budget / 6 / 20)
        assert [p.params / middle for p in of_budget] == pytest.approx(list(grid.RATIOS), rel=0.2)
        assert all(p.flops == 6 * p.params * p.tokens == pytest.approx(budget, rel=0.01) for p in of_budget)
        assert all(p.config.model.n_layer == 2 for p in of_budget)
    sizes = [p.params for p in ladder if p.config.seed == 0]
    assert sum(sizes.count(size) > 1 for size in set(sizes)) >= 6  # of several budgets
    assert [p.name.rpartition("-")[2] for p in ladder[20:]] == ["seed1", "seed2"] * 2
    target = grid.get_config("target@20")
    assert names("target@20") == [grid.target(grid.base(), 20).name]
    assert 6 * 128 * target.batch_size * target.steps * grid.target(grid.base(), 20).params == pytest.approx(
        10 * grid.BUDGETS[-1], rel=0.001
    )
    with pytest.raises(InputError, match="ladder@x: 'x' is no number of tokens per parameter: write ladder@20"):
        grid.get_config("ladder@x")


def planned_losses(planned, queue, folder):
    """In place of the worker: each point's loss is the law's, with noise of .2 %."""
    rng = np.random.default_rng(len(planned.points))
    for p in planned.points:
        loss = np.ravel(CHINCHILLA.loss(LAW, N=p.params, D=p.tokens)).item() * math.exp(rng.normal(0, 0.002))
        queue.finish(queue.acquire([p.name]), {
            "name": p.name, "N": p.params, "count": p.count, "D": p.tokens, "C": p.flops, "rule": p.rule,
            "budget": p.budget, "loss": loss, "metric": "bits/byte", "tokenizer": "t", "text_tokens": 10**9,
            "epochs": p.tokens / 10**9, "seed": p.config.seed, "status": "done", "reason": None, "seconds": 1.0,
            "workdir": f"runs/{p.name}",
        })  # fmt: skip
    return True


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(workdir, what the whole command returns) on such runs."""
    workdir = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "work", planned_losses)
        patch.setattr(study, "SAMPLES", 200)
        patch.setattr(study, "fit", functools.partial(fit, starts=SOME))
        patch.setattr(study.report, "draw", lambda *_: ({}, []))  # pictures take seconds
        patch.setattr(study.text, "write", lambda path: path)
        patch.setattr(summary, "nats_and_bytes", lambda workdir: (np.array([3.0, 5.0]), np.array([2.0, 2.0])))
        return workdir, study.study(workdir)


def test_the_grid_is_centered_on_the_coarse_optimum(ran):
    workdir, figures = ran
    assert figures["tokens_per_parameter"] == pytest.approx(optimum(LAW, 1e11)[1] / optimum(LAW, 1e11)[0], rel=0.25)
    (run,) = [row for row in map(json.loads, open(workdir / "target" / "results.jsonl"))]
    assert run["D"] / run["N"] == pytest.approx(figures["tokens_per_parameter"], rel=0.2)


def test_the_forecast_is_sealed_before_the_target_and_covers_it(ran):
    workdir, figures = ran
    assert figures["inside"] and abs(figures["error"]) < 0.02
    others = [abs(figures["errors_of_baselines"][name]) for name in ("last_rung", "log_linear", "free_E")]
    assert abs(figures["error"]) < min(others)  # pinned_E has the law's own E
    (file,) = (workdir / "ladder" / "forecasts").iterdir()
    sealed = predict.open_sealed(file)
    assert sealed["beyond"] == pytest.approx(10, rel=0.01)
    began = (workdir / "target" / "sweep.json").stat().st_mtime
    assert datetime.datetime.fromisoformat(sealed["time"]).timestamp() <= began
    assert sealed["points"]["runs"] == 24
    digest = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
    assert sealed["points"]["sha256"] == digest(workdir / "ladder" / "results.jsonl")
    assert sealed["law"]["sha256"] == digest(workdir / "ladder" / "law.json")


def test_all_runs_are_in_one_file_and_one_report(ran):
    workdir, figures = ran
    runs = points.read(str(workdir / "results.jsonl"))
    assert len(runs) == 25 and runs.workdirs[-1] == str(workdir / "target" / "runs" / runs.names[-1])
    assert "inside" in (workdir / "report" / "report.html").read_text()
    a = figures["exponents"]
    assert all(a[name]["low"] < 0.5 < a[name]["high"] for name in ("approach_2", "approach_3"))
    assert a["approach_1"]["low"] <= a["approach_1"]["a"] <= a["approach_1"]["high"]
    assert [len(cell["losses"]) for cell in figures["seeds"]] == [3, 3]
    assert "the forecast," in summary.text(figures) and "sigma over 3 seeds" in summary.text(figures)


def test_the_error_of_a_finite_text():
    """Of equal windows: the standard error of a mean, in bits a byte."""
    nats = np.random.default_rng(0).normal(5, 1, 10_000)
    error = summary.text_error(nats, np.full(10_000, 4.0))
    assert error == pytest.approx(nats.std() / math.sqrt(10_000) / 4 / math.log(2))
    assert summary.text_error(3 * np.arange(1.0, 9), np.arange(1.0, 9)) == pytest.approx(0, abs=1e-12)


def test_the_text_is_the_standard_library(tmp_path, monkeypatch):
    for name, data in {"b.py": b"x = 1\n", "test/a.py": b"y = 2\n", "site-packages/c.py": b"z", "d.py": b"\xff",
                       "e.py": b"", "f.txt": b"no"}.items():  # fmt: skip
        (tmp_path / "lib" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "lib" / name).write_bytes(data)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    path = study.text.write(tmp_path / "text.jsonl")
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["x = 1\n", "y = 2\n"]


def test_the_committed_forecast_is_of_the_committed_ladder():
    folder = Path(study.__file__).parent
    digest = lambda name: hashlib.sha256((folder / name).read_bytes()).hexdigest()
    sealed, figures = predict.open_sealed(folder / "forecast.json"), json.loads((folder / "summary.json").read_text())
    assert sealed["points"]["sha256"] == digest("ladder.jsonl") and sealed["law"]["sha256"] == digest("law.json")
    target = json.loads((folder / "target.jsonl").read_text())
    assert target["name"] == sealed["name"] and target["name"] not in (folder / "ladder.jsonl").read_text()
    assert figures["outcome"] == target["loss"] and figures["forecast"]["loss"] == sealed["loss"]
    assert figures["error"] == pytest.approx(sealed["loss"] / target["loss"] - 1)
