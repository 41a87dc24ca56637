"""Fit a scaling law to finished runs, with intervals, and write it to law.json.

    python -m gptjax.scaling.fit --points=runs/isoflop/results.jsonl [--law=chinchilla] [--json]
    python -m gptjax.scaling.fit --points=points.csv --columns=N=params,loss=loss_c4_val --where=dataset=c4 \
        --compute=1e21,1e22

--points: results.jsonl of a sweep, or any CSV, TSV, JSONL or JSON with N, D, loss or N, C, loss (scaling/points.py has
the aliases). --law: chinchilla (approach 3; 1 and 2 are printed beside it), farseer, gpt4, pass_rate, kaplan_n,
kaplan_d, kaplan_c, kaplan_nd, kaplan_ns. --pin=c=1.69 holds a parameter, as gpt4's irreducible loss.

The fit is the lowest minimum of the sum of Huber terms (delta 1e-3, of log loss) over all starts; intervals are 90 %,
by the bootstrap. Rows whose status is not "done" are left out, and listed.
"""

import math
import sys

from absl import flags

from gptjax import command_line, json_files, paths
from gptjax.config import choose
from gptjax.errors import InputError
from gptjax.scaling import law_file
from gptjax.scaling.bootstrap import FAILED
from gptjax.scaling.fitting import fit
from gptjax.scaling.laws import LAWS, Law
from gptjax.scaling.points import pairs, read


def text(made: dict) -> str:
    """law.json for people."""
    lines = [f"{made['law']}: {made['formula']}", f"  {made['source']}", ""]
    runs = f"{made['runs']} runs, {len(made['left_out'])} left out; scatter {100 * made['scatter']:.2f} % of the loss"
    lines += [f"{runs}, {made['metric'] or 'metric not said'}", ""]
    for name, row in made["parameters"].items():
        what = "pinned" if name in made["pinned"] else _range(row)
        if "profile" in row:
            what += "; by the profile likelihood {} to {}".format(*map(_number, row["profile"]))
        lines.append(f"  {name:<8} {_number(row['value']):>12}   {what}")
    share = f"reached from {100 * made['starts_at_optimum']:.0f} % of the starts"
    lines.append(f"  objective {made['objective']:.6e}, {share}")
    if "exponents" in made:
        lines += ["", *_chinchilla(made)]
    if "sensitivity" in made:
        lines += ["", "the irreducible loss c:"]
        for row in made["sensitivity"]:
            losses = ", ".join(f"{r['loss']:.4f} at {r['C']:.3g}" for r in row["losses"])
            lines.append(f"  c = {row['c']:.4f} ({row['what']}): {losses}; objective {row['objective']:.4e}")
    for title in ("left_out", "flags"):
        if made[title]:
            lines += ["", f"{title.replace('_', ' ')}:", *(f"  {line}" for line in made[title])]
    return "\n".join(lines)


def _chinchilla(made):
    a, b = made["exponents"]["a"], made["exponents"]["b"]
    lines = [f"N* ~ C^{a['value']:.3f} ({_range(a)}), D* ~ C^{b['value']:.3f}"]
    for row in made["optima"]:
        parts = [f"{name.replace('_per_', '/')}* {_number(row[name]['value'])} ({_range(row[name])})"
                 for name in ("N", "D", "D_per_N")]  # fmt: skip
        lines.append(f"  C {row['C']:.3g}: {', '.join(parts)}")
    squares = made["least_squares"]
    lines.append(
        f"least squares in the loss instead: E {squares['E']:.4f}, alpha {squares['alpha']:.4f}, "
        f"beta {squares['beta']:.4f}; this fit's N* is {squares['difference']['N_ratio']:.3f} times theirs; from there "
        f"its objective falls to {squares['objective_from_there']:.6e}"
    )
    for name in ("approach_1", "approach_2"):
        row, title = made[name], name.replace("_", " ")
        if "a" not in row:
            lines.append(f"{title}: {row['unusable']}")
            continue
        bias = ""
        if "centered" in row:
            centered = "centered" if row["centered"] else "not centered"
            bias = (f"; expected bias of this grid, which is {centered}: a {row['expected_bias_a']:+.3f}, "
                    f"N* {100 * row['expected_bias_N']:+.1f} %")  # fmt: skip
        best = f"N*({row['C']:.3g}) = {_number(row['N'])}"
        lines.append(f"{title}: N* ~ C^{row['a']:.3f} ({_range(row)}), {best}{bias}")
    return lines


def _range(row) -> str:
    missing = row.get("failed", 0.0)
    if missing > FAILED:
        return f"no interval: {100 * missing:.0f} % of the samples have no optimum"
    said = f", without the {100 * missing:.1g} % of the samples that have no optimum" if missing else ""
    return f"{_number(row['low'])} to {_number(row['high'])}{said}"


def _number(value) -> str:
    if value is None:
        return "unbounded"
    return f"{value:.4g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.3e}"


def main(_):
    law = choose(LAWS, FLAGS.law, "law")
    columns, where = pairs(FLAGS.columns, "columns"), pairs(FLAGS.where, "where")
    points = read(FLAGS.points, columns, where)
    pinned = numbers(pairs(FLAGS.pin, "pin"), law)
    status = lambda message: print(f"{message} …", file=sys.stderr, flush=True)
    status(f"fitting {law.name} to {len(points)} runs from {len(law.starts):,} starts")
    found = fit(law, points, pinned=pinned)
    status(f"{FLAGS.samples:,} bootstrap samples")
    compute = [number(value, "compute", 0) for value in FLAGS.compute or []]
    made = law_file.record(found, FLAGS.samples, {"columns": columns, "where": where}, compute)
    made = json_files.json_safe(made)
    out = FLAGS.out or paths.local(FLAGS.points).parent / "law.json"
    law_file.write(out, made)
    status(f"wrote {out}")
    print(json_files.dumps(made) if FLAGS.json else text(made))


def numbers(given: dict[str, str], law: Law) -> dict[str, float]:
    """--pin's values. InputError: not a parameter of the law, or not a number."""
    for name in given:
        if name not in law.parameters:
            raise InputError(f"--pin={name}=… is no parameter of the law: it has {', '.join(law.parameters)}.")
    return {name: number(value, "pin") for name, value in given.items()}


def number(value: str, flag: str, low: float = -math.inf) -> float:
    """A finite number above `low`. InputError otherwise."""
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not low < found < math.inf:
        raise InputError(f"--{flag}: {value!r} is not a {'positive ' * (low == 0)}number.")
    return found


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    command_line.define_path("points", None, "The runs: results.jsonl of a sweep, or a table of them.", required=True)
    flags.DEFINE_string("law", "chinchilla", "Which law.")
    flags.DEFINE_string("columns", "", "Columns that go by another name, as N=params,loss=c4.")
    flags.DEFINE_string("where", "", "Only the rows with these values, as dataset=c4.")
    flags.DEFINE_string("pin", "", "Parameters that are given instead of fitted, as c=1.69.")
    flags.DEFINE_list("compute", None, "FLOPs to give the optimum N*, D* (gpt4: the loss) at, with commas.")
    flags.DEFINE_integer("samples", 4000, "Samples of the bootstrap.", lower_bound=100)
    command_line.define_path("out", None, "Where the law is written; law.json next to the points if not given.")
    flags.DEFINE_bool("json", False, "Print the law as JSON.")
    command_line.run(main)
