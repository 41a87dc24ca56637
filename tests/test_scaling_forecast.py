"""Forecasts, plans and the commands: sealed, and refused where the answer is known."""

import json
import os

import numpy as np
import pytest
from conftest import ROOT
from runs import main_of
from scaling_points import BUDGETS, isoflop, rates, write
from scipy import stats
from test_scaling_fit import SOME

from gptjax.data.bpe import train_bpe
from gptjax.errors import InputError
from gptjax.scaling import bootstrap, collapse, forecast, law_file, plan, predict
from gptjax.scaling.fitting import Fit, fit
from gptjax.scaling.laws import CHINCHILLA, FARSEER, HOFFMANN, optimum
from gptjax.scaling.points import of_arrays, read

SIX = np.geomspace(1e17, 3e19, 6)


@pytest.fixture(scope="module")
def found():
    return fit(CHINCHILLA, isoflop(SIX, 6, noise=0.003), starts=SOME)


@pytest.fixture(scope="module")
def theta(found):
    return bootstrap.bootstrap(found, 400)


# --- forecasts --------------------------------------------------------------------------------------------


def test_a_forecasts_interval_by_hand(found, theta):
    """Student's quantile of 36 - 5 degrees of freedom times the root of the squares of scatter, with as many, and of
    the law's own standard error."""
    run = {"N": 1e9, "D": 1e11}
    made, scatter = forecast.predict(found, run, theta), np.sqrt((found.residuals**2).sum() / 31)
    low, high = np.quantile(found.log_loss(run, theta)[:, 0], [0.05, 0.95])
    error = np.hypot(scatter, (high - low) / (2 * stats.norm.ppf(0.95)))
    half = stats.t.ppf(0.95, 31) * error
    assert (np.log(made.loss / made.low), np.log(made.high / made.loss)) == pytest.approx((half, half), rel=1e-4)
    assert (found.scatter, made.log_error) == pytest.approx((scatter, error), rel=1e-4) and error > 1.02 * scatter


def test_a_forecast_of_the_planted_law(found, theta):
    N, D = optimum(HOFFMANN, 1e21)
    made = forecast.predict(found, {"N": N, "D": D}, theta)
    truth = CHINCHILLA.loss(HOFFMANN, N=N, D=D)[0]
    assert made.low < truth < made.high and made.loss == pytest.approx(truth, rel=0.02)
    wider = forecast.predict(found, {"N": N, "D": D}, theta, widening=2.0)
    assert np.log(wider.high / wider.loss) == pytest.approx(2 * np.log(made.high / made.loss))
    near = forecast.predict(found, {"N": 3e8, "D": 6e9}, theta)
    assert near.log_error < made.log_error and near.log_error >= found.scatter


def test_baselines():
    points = isoflop(SIX, 6)
    made = forecast.baselines(points, 1e21, 1.69)
    truth = CHINCHILLA.loss(HOFFMANN, N=optimum(HOFFMANN, 1e21)[0], D=optimum(HOFFMANN, 1e21)[1])[0]
    assert made.keys() == {"last_rung", "log_linear", "free_E", "pinned_E"}
    assert made["last_rung"] == points["loss"][points["C"] > 2e19].min() > truth
    assert made["log_linear"] < truth  # a straight line has no floor
    assert made["pinned_E"] == pytest.approx(truth, rel=0.01)
    assert "free_E" not in forecast.baselines(points.take(points["C"] < 5e17), 1e21, 1.69)  # two budgets are too few


def test_leave_future_out(found):
    """Each row knows its past alone: later losses do not change earlier forecasts."""
    rows = forecast.leave_future_out(CHINCHILLA, found.points)
    assert [row["fitted"] for row in rows] == [12, 18, 24, 30] and [row["forecast"] for row in rows] == [24, 18, 12, 6]
    assert rows[0]["widening"] == 1.0 and rows[-1]["error"] < 0.01
    assert rows[-1]["best"]["law"] == pytest.approx(rows[-1]["best"]["loss"], rel=0.01)
    later = np.where(np.arange(len(found.points)) < len(found.points) - 6, 1.0, 1.5)
    broken = of_arrays(**found.points.columns | {"loss": found.points["loss"] * later})
    again = forecast.leave_future_out(CHINCHILLA, broken)
    assert [row["widening"] for row in again] == [row["widening"] for row in rows]
    assert again[-1]["best"]["law"] == rows[-1]["best"]["law"] and again[-1]["error"] > 0.3


def test_widening():
    assert forecast.widening([]) == 1.0 and forecast.widening([0.1, -0.1]) == 1.0
    assert forecast.widening([3.0, -4.0]) == pytest.approx(np.sqrt(12.5))


@pytest.mark.slow
def test_forecasts_cover_nine_of_ten():
    """100 planted ladders, noise of .3 %: the last budget's runs, forecast from the others."""
    inside, start = [], CHINCHILLA.free(np.array([HOFFMANN[name] for name in CHINCHILLA.parameters]))
    for seed in range(100):
        points = isoflop(SIX, 6, noise=0.003, seed=seed)
        past, ahead = points.take(points["C"] < 2e19), points.take(points["C"] > 2e19)
        found = fit(CHINCHILLA, past, starts=start)
        theta = bootstrap.bootstrap(found, 100)
        for i in range(len(ahead)):
            made = forecast.predict(found, forecast._row(ahead, i), theta)
            inside.append(made.low <= ahead["loss"][i] <= made.high)
    assert 0.85 <= np.mean(inside) <= 0.96, np.mean(inside)


def test_the_irreducible_loss_of_a_law(found):
    """Farseer's parameter E is a coefficient of an exponent: no baseline is pinned there, and no flag is of it."""
    made = Fit(FARSEER, found.points, FARSEER.starts[0], 0.0, np.inf, 1.0)
    assert made.parameters["E"] < 0 and forecast.irreducible_loss(made) == 0
    assert not any("irreducible" in flag for flag in law_file._flags(made))
    assert forecast.irreducible_loss(found) == found.parameters["E"]


def test_where_a_laws_points_are():
    assert law_file._absolute("gs://bucket/a/results.jsonl") == "gs://bucket/a/results.jsonl"
    assert law_file._absolute("a.csv") == os.path.abspath("a.csv") and law_file._absolute("") == ""


# --- plans ------------------------------------------------------------------------------------------------


def test_a_next_run_narrows_as_promised(found, theta):
    """The run is made, at the law's own loss, and the spread measured again. A residual of exactly 0, and Huber's terms
    in place of squares, make it a little smaller than the promise."""
    best = plan.next_runs(found, theta, 1e21)[-1]
    assert best["C"] == pytest.approx(30 * found.points["C"].max())
    old = {name: values for name, values in found.points.columns.items()}
    loss = float(np.exp(found.log_loss(best)[0]))
    more = of_arrays(**{name: np.append(old[name], {**best, "loss": loss}[name]) for name in ("N", "D", "C", "loss")})

    def width(of):
        samples = CHINCHILLA.natural(bootstrap.bootstrap(of, 2000)).T
        return np.log(optimum(dict(zip(CHINCHILLA.parameters, samples, strict=True)), 1e21)[0]).std()

    ratio = width(fit(CHINCHILLA, more, starts=found.theta)) / width(found)
    assert best["narrows"] < 0.95 and ratio == pytest.approx(best["narrows"], abs=0.08)


def test_rules_of_batch_and_learning_rate():
    for N, batch, rate in plan.GPT3:
        assert plan.gpt3_rule(N) == pytest.approx((batch, rate))
    assert plan.gpt3_rule(1e6) == pytest.approx((0.5e6, 6e-4))
    batch, rate = plan.deepseek_rule(1e20)
    assert batch == pytest.approx(0.2920 * 1e20**0.3271) and rate == pytest.approx(0.3118 * 1e20**-0.125)


# --- collapse ---------------------------------------------------------------------------------------------


def test_a_rung_that_leaves_the_collapse(tmp_path):
    for i, exponent in enumerate((0.2, 0.2, 0.2, 0.5)):
        (tmp_path / str(i)).mkdir()
        steps = np.arange(1, 101 * (i + 1))
        rows = [{"step": int(s), "loss": 1.7 + (1 + i) * float(s / steps[-1]) ** -exponent} for s in steps]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / str(i) / "metrics.jsonl").write_text(text + '{"step": 7, "lo')
    path = tmp_path / "results.jsonl"
    write(isoflop(sizes=1), path)
    rows = [json.loads(line) | {"workdir": str(i)} for i, line in enumerate(path.read_text().splitlines())]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = collapse.curves(read(str(path)))
    assert len(curves) == 4
    shown, leaving = collapse.collapsed(curves, 1.7)
    assert list(leaving) == ["run-3"] and shown["run-0"][-1] == 1.0
    assert shown["run-0"] == pytest.approx(shown["run-2"], rel=0.02)


# --- the commands -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep's results and the law fitted to them by the command."""
    folder = tmp_path_factory.mktemp("sweep")
    write(isoflop(BUDGETS, 7, noise=0.003), folder / "results.jsonl")
    code, out, err = main_of("gptjax.scaling.fit", f"--points={folder}/results.jsonl", "--samples=200", "--json")
    assert code == 0, err
    assert json.loads(out) == json.loads((folder / "law.json").read_text())
    return folder


def test_fit_command(folder):
    made = json.loads((folder / "law.json").read_text())
    assert made["law"] == "chinchilla" and made["runs"] == 28 and made["metric"] == "nats/token"
    for name, row in made["parameters"].items():
        assert row["low"] <= row["value"] <= row["high"], name
    assert made["exponents"]["a"]["value"] == pytest.approx(0.456, abs=0.05)
    assert "3 sizes" in made["approach_1"]["unusable"] and "expected_bias_a" in made["approach_2"]
    assert made["least_squares"]["objective_from_there"] == pytest.approx(made["objective"], rel=1e-6)
    assert made["least_squares"]["difference"]["N_ratio"] == pytest.approx(1, abs=0.3)
    code, out, _ = main_of(
        "gptjax.scaling.fit", f"--points={folder}/results.jsonl", "--law=gpt4", "--samples=100", "--compute=1e22",
        f"--out={folder}/gpt4.json",
    )  # fmt: skip
    assert code == 0 and "c pinned at 0.9 of the lowest loss" in out and "at 1e+22" in out


@pytest.fixture(scope="module")
def sealed(folder):
    """The forecast of a run of ten times the compute."""
    code, out, err = main_of("gptjax.scaling.predict", *_big(folder), "--json")
    assert code == 0, err
    return json.loads(out)


def _big(folder):
    return [f"--law={folder}/law.json", "--C=1e22", "--name=big"]


def test_predict_seals_once(folder, sealed):
    file = folder / "forecasts" / "big.json"
    assert sealed == json.loads(file.read_text()) == predict.open_sealed(file)
    truth = CHINCHILLA.loss(HOFFMANN, N=sealed["target"]["N"], D=sealed["target"]["D"])[0]
    assert sealed["low"] < truth < sealed["high"] and sealed["beyond"] == pytest.approx(10)
    assert sealed["degrees_of_freedom"] == 23 and len(sealed["baselines"]) == 4 and sealed["leave_future_out"]
    code, _, err = main_of("gptjax.scaling.predict", *_big(folder))
    assert code == 2 and "is sealed" in err
    (folder / "changed.json").write_text(file.read_text().replace('"level": 0.9', '"level": 0.8'))
    with pytest.raises(InputError, match="was changed since it was sealed"):
        predict.open_sealed(folder / "changed.json")


def test_what_predict_refuses(folder, tmp_path):
    first = json.loads((folder / "results.jsonl").read_text().splitlines()[0])
    run = [f"--law={folder}/law.json", "--D=1e12"]
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    for arguments, said in [
        ([f"--law={folder}/law.json", f"--N={first['N']}", f"--D={first['D']}"], "The target has a result: run run-0"),
        ([*run, "--N=1e10", "--name=run-3"], "The target has a result: run run-3"),
        ([*run, "--N=1e10", f"--target_workdir={tmp_path}"], "The target has begun"),
        ([*run, "--N=1e10", "--metric=bits/byte"], "The law is of metric 'nats/token'"),
        ([*run, "--N=1e10", "--tokenizer=other"], "The law is of tokenizer 'abc'"),
        (run, "needs N and D of the target: give --N"),
        ([f"--law={tmp_path}/law.json", "--C=1e22"], "There is no law"),
    ]:
        code, _, err = main_of("gptjax.scaling.predict", *arguments)
        assert code == 2 and said in err, err


def test_a_law_and_its_points_belong_together(folder, tmp_path):
    """Runs that came since: the law is to be fitted again, and a target among them is refused."""
    for name in ("results.jsonl", "law.json"):
        (tmp_path / name).write_text((folder / name).read_text().replace(str(folder), str(tmp_path)))
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"name": "late", "N": 1e10, "D": 1e11, "loss": 2.2, "metric": "nats/token", "tokenizer": "abc", '
                   '"count": "with_embedding", "C": 6e21}\n')  # fmt: skip
    law = f"--law={tmp_path}/law.json"
    code, _, err = main_of("gptjax.scaling.predict", law, "--N=1e10", "--D=1e11")
    assert code == 2 and "The target has a result: run late" in err
    code, _, err = main_of("gptjax.scaling.predict", law, "--C=1e23")
    assert code == 2 and "has changed since the law was fitted" in err


def test_predict_takes_a_config(folder):
    """The target's N and D from a pre-training config, as describe counts them."""
    made = json.loads((folder / "law.json").read_text())
    from gptjax.config import config_dict
    from gptjax.pretrain import PretrainConfig

    c = config_dict(PretrainConfig).to_dict()
    c["model"] = c["model"] | dict(vocab_size=1000, n_layer=2, n_head=2, d_model=64, context_length=128)
    c |= dict(steps=10, batch_size=8)
    run = predict.target(made, c)
    assert run["D"] == 10 * 8 * 128 and run["C"] == 6 * run["N"] * run["D"]
    assert predict.target(made | {"count": "without_embedding"}, c)["N"] == run["N"] - (1000 + 128) * 64
    with pytest.raises(InputError, match="given twice"):
        predict.target(made, c, N=1e9)


@pytest.mark.parametrize("count", ["with_embedding", "without_embedding"])
@pytest.mark.parametrize("rule", ["6nd", "exact"])
def test_the_target_of_a_sweep_is_its_point(monkeypatch, count, rule):
    """N, D and C of a config are those that the sweep would give its run, however it counts."""
    monkeypatch.syspath_prepend(str(ROOT))
    from configs.scaling import isoflop

    monkeypatch.setattr(isoflop, "COUNT", count)
    monkeypatch.setattr(isoflop, "FLOPS", rule)
    (point,) = isoflop.get_sweep(isoflop.base(), "target").points
    made = {"law": "chinchilla", "count": count, "rule": rule}
    run = predict.target(made, isoflop.get_config("target").to_dict())
    assert run == {"N": point.params, "D": point.tokens, "C": point.flops}


def test_metric_and_tokenizer_of_a_target_are_its_configs(folder, tmp_path):
    """A law in nats per token says nothing of a sweep in bits per byte, nor one of 512 tokens of a model of 1024."""
    target = f"{ROOT}/configs/scaling/isoflop.py:target"
    code, _, err = main_of("gptjax.scaling.predict", f"--law={folder}/law.json", f"--config={target}")
    assert code == 2 and "The law is of metric 'nats/token', the target of 'bits/byte'" in err, err
    assert predict.metric_of(f"{ROOT}/configs/gpt2.py:124m", None) is None
    (tmp_path / "run").mkdir()
    run = {"stage": "pretrain", "data": {"tokenizer": "bpe:512", "source": str(tmp_path / "text"), "mixture": {}}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(run))
    points = read(str(write(isoflop(), tmp_path / "results.jsonl", workdir="run")))
    ours = lambda **changes: {"data": run["data"] | changes}
    assert predict.tokenizer_of(ours(mixture=None), points) == points.tokenizer == "abc"
    other = predict.tokenizer_of(ours(tokenizer="bpe:1024"), points)
    with pytest.raises(InputError, match="of tokenizer 'abc', the target of 'bpe:1024 of .*text'"):
        predict.refuse_other({"metric": points.metric, "tokenizer": points.tokenizer}, None, other)
    assert predict.tokenizer_of(ours(source="stdlib"), points) == "bpe:512 of stdlib"
    tokenizer = train_bpe(["the cat sat on the mat"], 260)
    tokenizer.save(tmp_path / "tokenizer")
    assert predict.tokenizer_of(ours(tokenizer=str(tmp_path / "tokenizer")), points) == tokenizer.fingerprint
    assert predict.tokenizer_of(ours(), isoflop()) is None  # made from the text, by runs whose folders are not known


def test_6_n_d_is_not_the_compute_of_runs_that_were_counted_otherwise():
    made = {"law": "chinchilla", "count": None, "rule": "exact"}
    assert predict.target(made, N=1e9, D=2e10) == {"N": 1e9, "D": 2e10}
    with pytest.raises(InputError, match="gpt4 needs C of the target: give --C"):
        predict.target(made | {"law": "gpt4"}, N=1e9, D=2e10)


def test_plan_command(folder, sealed):
    code, out, err = main_of("gptjax.scaling.plan", f"--law={folder}/law.json", "--compute=1e23", "--json")
    assert code == 0, err
    made = json.loads(out)
    assert made["N"]["low"] < made["N"]["value"] < made["N"]["high"] and len(made["rules"]) == 3
    assert made["N"]["value"] * made["D"]["value"] * 6 == pytest.approx(1e23) and made["next_runs"]
    assert made["loss"]["widening"] == pytest.approx(sealed["widening"])  # as that of a forecast from the same points
    said = plan.text(made)
    assert "next runs" in said and "times by earlier forecasts" in said and "of sampling alone" in said
    gpt3, _, kaplan = made["rules"]  # at the critical batch twice the least steps, twice the least compute
    assert kaplan["over_least_steps"] == pytest.approx(2) and kaplan["over_least_compute"] == pytest.approx(2)
    assert gpt3["steps"] == pytest.approx(made["D"]["value"] / gpt3["batch"]["value"])
    swept = write(rates(), folder / "rates.jsonl")
    code, out, _ = main_of("gptjax.scaling.plan", f"--law={folder}/law.json", "--compute=1e23", f"--rates={swept}")
    assert code == 0 and "next runs" in out and "1e+06 to 1.6e+07: 3 N^-0.4, at N*" in out
    code, _, err = main_of("gptjax.scaling.plan", f"--law={folder}/law.json", "--compute=1e23",
                           f"--rates={folder}/results.jsonl")  # fmt: skip
    assert code == 2 and "has no column of learning rates" in err
    code, _, err = main_of("gptjax.scaling.plan", f"--law={folder}/gpt4.json", "--compute=1e23")
    assert code == 2


def test_report_command(folder, sealed):
    with (folder / "results.jsonl").open("a") as file:  # the forecast's target has run since
        row = {"name": "big", **sealed["target"], "loss": 2.1, "metric": "nats/token", "tokenizer": "abc",
               "count": "with_embedding"}  # fmt: skip
        file.write(json.dumps(row) + "\n")
    code, _, err = main_of("gptjax.scaling.report", f"--points={folder}/results.jsonl")
    assert code == 0, err
    page = (folder / "scaling" / "report.html").read_text()
    assert "outcome 2.1000" in page and "up to" in page
    names = {path.stem for path in (folder / "scaling").glob("*.png")}
    assert names == {"loss_over_compute", "isoflop", "contours", "residuals", "leave_future_out", "forecasts"}


def test_commands_refuse_an_unknown_law(folder):
    code, _, err = main_of("gptjax.scaling.fit", f"--points={folder}/results.jsonl", "--law=chinchila")
    assert code == 2 and "did you mean 'chinchilla'" in err
    code, _, err = main_of("gptjax.scaling.fit", f"--points={folder}/results.jsonl", "--law=gpt4", "--pin=E=1")
    assert code == 2 and "is no parameter of the law: it has a, c, b" in err
