"""Draw the runs, their law, and forecasts beside outcomes: PNGs and one HTML page.

    python -m gptjax.scaling.report --points=runs/isoflop/results.jsonl [--law=runs/isoflop/law.json]

--law: law.json next to the points if not given; without one the runs alone are drawn. Sealed forecasts are read from
forecasts/ next to the law, and compared with the points where these have the target's result. Everything is written to
the folder scaling/ next to the points (--out): the pictures, and report.html, which has them inside.
"""

import html
import sys

from absl import flags

from gptjax import command_line, paths, report
from gptjax.errors import InputError
from gptjax.scaling import approaches, collapse, fit, forecast, law_file, plots, predict
from gptjax.scaling.points import Points, pairs, read


def compared(points: Points, folder) -> list[dict]:
    """The sealed forecasts of a folder, each with the outcome among the points, or None. InputError: one was changed,
    or the outcome is in another metric."""
    rows = []
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        sealed = predict.open_sealed(file)
        i = predict.outcome(points, sealed["target"], sealed["name"])
        if i is not None:
            predict.refuse_other(sealed, points.metric, points.tokenizer)
        loss = None if i is None else float(points["loss"][i])
        rows.append({k: sealed[k] for k in ("name", "loss", "low", "high", "time", "sha256")} | {"outcome": loss})
    return rows


def draw(points: Points, found, forecasts: list[dict]) -> tuple[dict, list[str]]:
    """({name: Figure} of everything that there is something of, the leave-future-out table and what leaves the
    collapse)."""
    figures, said = {}, []
    if "C" in points.columns:
        figures["loss_over_compute"] = plots.loss_over_compute(points, found)
    if {"C", "N"} <= points.columns.keys() and approaches.parabolas(points):
        figures["isoflop"] = plots.isoflop_curves(points)
    if found is not None:
        if found.law.inputs == ("N", "D"):
            figures["contours"] = plots.contours(found)
        figures["residuals"] = plots.residuals(found)
        if "C" in points.columns and (rows := forecast.leave_future_out(found.law, found.points)):
            figures["leave_future_out"] = plots.leave_future_out(rows)
            said.append("\n".join(predict.table(rows)))
    if forecasts:
        figures["forecasts"] = plots.forecasts(forecasts)
    if "C" in points.columns and (curves := collapse.curves(forecast.frontier(points))):
        lowest = min(curve.min() for curve in curves.values())
        irreducible = forecast.irreducible_loss(found) if found else 0.0
        shown, leaving = collapse.collapsed(curves, irreducible if irreducible < lowest else 0.0)
        figures["collapse"] = plots.collapse(shown, leaving)
        said += [f"{name} leaves the loss-curve collapse by {100 * value:.1f} %: check its tuning."
                 for name, value in leaving.items()]  # fmt: skip
    return figures, said


def write(points: Points, made: dict | None, forecasts: list[dict], out, title: str):
    """The pictures and report.html in a folder. made: law.json. InputError: it cannot be written to."""
    figures, said = draw(points, law_file.at(made, points) if made else None, forecasts)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png", dpi=110)
        (out / "report.html").write_text(page(title, made, figures, forecasts, said))
    except OSError as error:
        raise InputError(f"{out} cannot be written ({error.strerror}): name another folder by --out=DIR.") from None
    print(f"wrote {out / 'report.html'} and {len(figures)} pictures", file=sys.stderr)


def page(title: str, made: dict | None, figures: dict, forecasts: list[dict], said: list[str]) -> str:
    """The HTML page."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    if made is not None:
        parts.append("<pre>" + html.escape(fit.text(made)) + "</pre>")
    if forecasts:
        parts.append("<h2>Forecasts</h2>" + report.table([(row["name"], _verdict(row)) for row in forecasts]))
    parts += ["<pre>" + html.escape(text.strip("\n")) + "</pre>" for text in said]
    parts += [report.image(figure, name.replace("_", " ")) for name, figure in figures.items()]
    return report.page(title, parts)


def _verdict(row) -> str:
    said = f"{row['loss']:.4f} ({row['low']:.4f} to {row['high']:.4f}), sealed {row['time']}"
    if row["outcome"] is None:
        return f"{said}; no outcome yet"
    inside = "inside" if row["low"] <= row["outcome"] <= row["high"] else "outside"
    error = 100 * (row["loss"] / row["outcome"] - 1)
    return f"{said}; outcome {row['outcome']:.4f}, {inside}, error {error:+.2f} %"


def main(_):
    source = paths.local(FLAGS.points)
    law = paths.local(FLAGS.law) if FLAGS.law else source.parent / "law.json"
    made = law_file.load(str(law))[0] if FLAGS.law or law.exists() else None
    as_fitted = made["points"] if made else {}
    columns = pairs(FLAGS.columns, "columns") or as_fitted.get("columns")
    points = read(FLAGS.points, columns, pairs(FLAGS.where, "where") or as_fitted.get("where"))
    forecasts = compared(points, law.parent / "forecasts")
    write(points, made, forecasts, paths.local(FLAGS.out) if FLAGS.out else source.parent / "scaling", source.name)


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("points", None, "The runs, as for gptjax.scaling.fit.", required=True)
    command_line.define_path("law", None, "law.json; next to the points if not given.")
    flags.DEFINE_string("columns", "", "Columns that go by another name, if not those of the law's fit.")
    flags.DEFINE_string("where", "", "Only the rows with these values, if not those of the law's fit.")
    command_line.define_path("out", None, "The folder to write to; scaling/ next to the points if not given.")
    command_line.run(main)
