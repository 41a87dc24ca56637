"""Forecast the loss of a run that does not exist yet, and seal the forecast: time, interval, hashes of law and points.

    python -m gptjax.scaling.predict --law=runs/isoflop/law.json --config=configs/scaling/isoflop.py:target
    python -m gptjax.scaling.predict --law=law.json --N=1e9 --D=2e10 [--name=1b] [--json]
    python -m gptjax.scaling.predict --law=law.json --C=1e21        # the compute-optimal run

--config: a pre-training config with steps or tokens, from which N (as the law counts it) and D are taken, and whatever
it says of the metric (get_sweep's, where the file has one) and of the tokenizer. The forecast is written to
forecasts/NAME.json next to the law and never overwritten. A target that has a result, in the points' file as it is now
or in --target_workdir, is refused; so is one in another metric, or of another tokenizer, than the law's. Next to the
law's forecast are four baselines, and how all of them would have done on the budgets so far.
"""

import datetime
import hashlib
import json
import sys

import numpy as np
from absl import flags
from etils import epath
from ml_collections import config_flags

from gptjax import command_line, json_files, paths
from gptjax.config import build
from gptjax.data.tokenizer import Tokenizer
from gptjax.describe import describe, with_vocabulary
from gptjax.errors import InputError
from gptjax.model.architecture import ModelConfig
from gptjax.run_config import read_config
from gptjax.scaling import forecast, law_file
from gptjax.scaling.bootstrap import bootstrap
from gptjax.scaling.fitting import Fit
from gptjax.scaling.laws import LAWS, optimum
from gptjax.scaling.points import Points
from gptjax.sweep import __main__ as sweep
from gptjax.sweep.grid import flops_per_token

SAME = 0.005  # relative: runs whose N and D are closer are the same run


def target(made: dict, config: dict | None = None, N=None, D=None, C=None) -> dict[str, float]:
    """{N, D, C} of the run to forecast, as far as they are given or follow: C from a config as the law's runs count it,
    else by 6 N D if they do. InputError: too little, or too much, is given."""
    exact = made.get("rule") == "exact"
    if config is not None:
        if N or D or C:
            raise InputError("The target is given twice: leave out --config, or --N, --D and --C.")
        d = describe(config)
        if not d["tokens"]:
            raise InputError("The target's config has no length: give --config.steps=N or --config.tokens=N.")
        N, D = d["params_non_embedding" if made["count"] == "without_embedding" else "params"], d["tokens"]
        if exact:
            model = build(ModelConfig, with_vocabulary(config)["model"], "config.model")
            C = flops_per_token(model, made["count"], "exact") * D
    law = LAWS[made["law"]]
    if C and not N and not D and made["law"] == "chinchilla":
        N, D = map(float, optimum({name: row["value"] for name, row in made["parameters"].items()}, C))
    if not exact:
        if N and D:
            C = C or 6 * N * D
        elif N and C:
            D = C / (6 * N)
        elif D and C:
            N = C / (6 * D)
    given = {name: float(value) for name, value in (("N", N), ("D", D), ("C", C)) if value}
    if missing := [name for name in law.inputs if name not in given]:
        needed = " and ".join(law.inputs)
        raise InputError(f"{law.name} needs {needed} of the target: give --{missing[0]}, or --config.")
    if low := [name for name, value in given.items() if not 0 < value < float("inf")]:
        raise InputError(f"--{low[0]}={given[low[0]]:g} must be a positive number.")
    return given


def outcome(points: Points, run: dict, name: str | None) -> int | None:
    """Which of the points is this run: by its name, or by N and D (or C) within .5 %. None: it has no result."""
    if name in points.names:
        return points.names.index(name)
    known = [column for column in ("N", "D") if column in run and column in points.columns] or ["C"]
    if not all(column in run and column in points.columns for column in known):
        return None
    apart = np.max([np.abs(np.log(points[column] / run[column])) for column in known], axis=0)
    return int(apart.argmin()) if apart.min() < SAME else None


def refuse_known(points: Points, run: dict, name: str | None, workdir=None):
    """InputError: the target has a result, so that nothing about it can be forecast."""
    if (i := outcome(points, run, name)) is not None:
        raise InputError(
            f"The target has a result: run {points.names[i]} of {points.path}, loss {points['loss'][i]:.4f}. A "
            "forecast is of a run that does not exist yet: give another target."
        )
    if workdir is not None:
        for file in ("metrics.jsonl", "evaluations.jsonl"):
            found = paths.local(workdir) / file
            if found.exists() and found.read_text().strip():
                raise InputError(f"The target has begun: {found} has lines. Seal the forecast before the run.")


def refuse_other(made: dict, metric: str | None, tokenizer: str | None):
    """InputError: the target's loss is in another metric, or over another tokenizer's tokens, than the law's."""
    for what, theirs in (("metric", metric), ("tokenizer", tokenizer)):
        ours = made[what]
        if what == "tokenizer" and made["metric"] == "bits/byte":
            continue  # compares across tokenizers
        if theirs and ours and theirs != ours:
            raise InputError(
                f"The law is of {what} {ours!r}, the target of {theirs!r}: such losses do not compare. Fit a law to "
                "runs that have the target's, or give bits/byte for both."
            )


def metric_of(path: str, config) -> str | None:
    """The metric that a sweep's file gives its results; None of a config without get_sweep."""
    try:
        return sweep.load(path, config).metric
    except InputError:
        return None


def tokenizer_of(config: dict, points: Points) -> str | None:
    """The fingerprint of the tokenizer that a pre-training config names. One that is made from the text is the law's
    where it is made like that of the law's runs; else its description. None: it cannot be told."""
    made = {key: config["data"].get(key) for key in ("tokenizer", "source", "mixture")}
    if paths.is_path(made["tokenizer"], paths.TOKENIZER):
        return Tokenizer.load(paths.local(made["tokenizer"])).fingerprint
    for workdir in filter(None, points.workdirs):
        try:
            theirs = read_config(workdir)["data"]
        except (InputError, KeyError):
            continue
        same = all(_same_text(value, theirs.get(key)) for key, value in made.items())
        return points.tokenizer if same else f"{made['tokenizer']} of {made['source'] or made['mixture']}"
    return None


def _same_text(ours, theirs) -> bool:
    """Whether two values of a config are the same, a path being that wherever it is named from."""
    if isinstance(ours, str) and isinstance(theirs, str):
        return paths.same(ours, theirs)
    return (ours or None) == (theirs or None)


def seal(made: dict, law_path: str, law_hash: str, found: Fit, run: dict, name: str) -> dict:
    """The forecast as it is written."""
    theta = bootstrap(found, forecast.SAMPLES)
    pin = forecast.irreducible_loss(found)
    points, (table, wide) = found.points, forecast.earlier(found)
    ahead = forecast.predict(found, run, theta, wide)
    sealed = {
        "name": name, "target": run, "metric": made["metric"], "tokenizer": made["tokenizer"], "count": made["count"],
        "loss": ahead.loss, "low": ahead.low, "high": ahead.high, "level": ahead.level,
        "widening": wide, "degrees_of_freedom": len(points) - found.free,
        "baselines": forecast.baselines(points, run["C"], pin) if "C" in run and "C" in points.columns else {},
        "beyond": run["C"] / float(points["C"].max()) if "C" in run and "C" in points.columns else None,
        "leave_future_out": table,
        "law": {"path": str(law_path), "sha256": law_hash, "law": made["law"],
                "parameters": {name: row["value"] for name, row in made["parameters"].items()}},
        "points": {"path": made["points"]["path"], "sha256": made["points"]["sha256"], "runs": len(points)},
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip
    sealed = json_files.json_safe(sealed)
    return sealed | {"sha256": digest(sealed)}


def digest(sealed: dict) -> str:
    """Of everything in a forecast but its own hash."""
    rest = {key: value for key, value in sealed.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def open_sealed(path) -> dict:
    """A forecast. InputError: it was changed since it was sealed."""
    try:
        sealed = json.loads(epath.Path(path).read_text())
        unchanged = digest(sealed) == sealed["sha256"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is not a forecast of gptjax.scaling.predict: delete or move it.") from None
    if not unchanged:
        raise InputError(f"{path} was changed since it was sealed: its hash does not match. Restore or delete it.")
    return sealed


def text(sealed: dict) -> str:
    """A forecast for people."""
    run = ", ".join(f"{name} {value:.4g}" for name, value in sealed["target"].items())
    beyond = f", {sealed['beyond']:.3g} times the largest fitted compute" if sealed["beyond"] else ""
    lines = [
        f"{sealed['name']}: {run}{beyond}",
        f"loss {sealed['loss']:.4f}, with {100 * sealed['level']:.0f} % between {sealed['low']:.4f} and "
        f"{sealed['high']:.4f} ({sealed['metric'] or 'metric not said'}; widened {sealed['widening']:.2f} times by "
        "earlier forecasts)",
    ]
    lines += [f"  {name.replace('_', ' ')} instead: {loss:.4f}" for name, loss in sealed["baselines"].items()]
    return "\n".join([*lines, *table(sealed["leave_future_out"])])


def table(rows: list[dict]) -> list[str]:
    """The leave-future-out table."""
    if not rows:
        return ["There are too few budgets for a table of earlier forecasts."]
    names = [name for name in rows[0]["best"] if name not in ("compute", "loss")]
    lines = ["", "fitted up to each budget, all later runs forecast; then errors at the last budget's best run:"]
    head = f"{'up to':>9}{'runs':>6}{'ahead':>6}{'error':>8}{'max':>8}{'bias':>8}{'covered':>9} |"
    lines.append(head + "".join(f"{name.replace('_', ' '):>11}" for name in names))
    for row in rows:
        best = row["best"]
        errors = "".join(f"{100 * (best[name] / best['loss'] - 1):>+10.2f}%" if name in best else f"{'':>11}"
                         for name in names)  # fmt: skip
        lines.append(
            f"{row['cutoff']:>9.2g}{row['fitted']:>6}{row['forecast']:>6}{100 * row['error']:>7.2f}%"
            f"{100 * row['max_error']:>7.2f}%{100 * row['bias']:>+7.2f}%{100 * row['covered']:>8.0f}% |{errors}"
        )
    return lines


def main(_):
    made, law_hash = law_file.load(FLAGS.law)
    config = FLAGS.config and FLAGS.config.to_dict()
    run = target(made, config, FLAGS.N, FLAGS.D, FLAGS.C)
    name = FLAGS.name or "-".join(f"{key}{value:.4g}" for key, value in run.items() if key != "C" or len(run) == 1)
    points = law_file.current_points(made)
    metric, tokenizer = FLAGS.metric, FLAGS.tokenizer
    if config is not None:
        path = config_flags.get_config_filename(FLAGS["config"])
        metric, tokenizer = metric or metric_of(path, FLAGS.config), tokenizer or tokenizer_of(config, points)
        if tokenizer is None and made["tokenizer"]:
            print("whether the target has the law's tokenizer is not known: it is made from the text", file=sys.stderr)
    refuse_other(made, metric, tokenizer)
    refuse_known(points, run, FLAGS.name, FLAGS.target_workdir)
    out = epath.Path(FLAGS.out or paths.local(FLAGS.law).parent / "forecasts" / f"{name}.json")
    if out.exists():
        raise InputError(f"{out} is sealed: a forecast is made once. Give another --name or --out.")
    found = law_file.reopen(made, points)
    print("fitting up to each budget …", file=sys.stderr, flush=True)
    sealed = seal(made, FLAGS.law, law_hash, found, run, name)
    out.parent.mkdir(parents=True, exist_ok=True)
    law_file.write(out, sealed)
    print(f"sealed {out}", file=sys.stderr)
    print(json_files.dumps(sealed) if FLAGS.json else text(sealed))


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("law", None, "law.json, as gptjax.scaling.fit writes it.", required=True)
    config_flags.DEFINE_config_file("config", None, "The target's config, of pre-training.", lock_config=True)
    flags.DEFINE_float("N", None, "Parameters of the target.", lower_bound=1)
    flags.DEFINE_float("D", None, "Its tokens.", lower_bound=1)
    flags.DEFINE_float("C", None, "Its FLOPs; alone: the compute-optimal run.", lower_bound=1)
    flags.DEFINE_string("name", None, "Its name, as results.jsonl will have it.")
    flags.DEFINE_string("metric", None, "What its loss is in, if not what the config says or the law's is in.")
    flags.DEFINE_string("tokenizer", None, "Its tokenizer's fingerprint, if not what the config says or the law's.")
    command_line.define_path("target_workdir", None, "The target's workdir: refused if a run is there.")
    command_line.define_path("out", None, "The forecast's file; forecasts/NAME.json next to the law if not given.")
    flags.DEFINE_bool("json", False, "Print the forecast as JSON.")
    command_line.run(main)
