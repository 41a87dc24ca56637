"""What a sweep is before and while it runs: its table, its cost, where it is, a picture of its grid; sweep.json."""

import io
import json
from collections.abc import Mapping

from gptjax import json_files
from gptjax.errors import InputError
from gptjax.queue.claims import State
from gptjax.queue.files import Folder
from gptjax.sweep.grid import Point, Sweep, short

# What may differ between two starts of a sweep: where and how fast its runs are computed, not what.
_MAY_CHANGE = ("mesh", "log", "checkpoint", "samples", "data.cache", "steps_per_dispatch")
CONVENTIONS = {
    ("with_embedding", "6nd"): "N: all parameters; C = 6 N D",
    ("without_embedding", "6nd"): "N: without embeddings and head; C = 6 N D",
    ("with_embedding", "exact"): "N: all parameters; C: every matrix product, the head's too",
    ("without_embedding", "exact"): "N: without embeddings and head; C: every matrix product but the head's",
}


# --- sweep.json ------------------------------------------------------------------------------------------


def claim(folder: Folder, sweep: Sweep):
    """Records the sweep in a new workdir, or checks that the one there is the same, which may have got more points.
    InputError: as `check`."""
    text = json_files.dumps(_record(sweep), indent=1).encode()
    if not folder.create("sweep.json", text) and check(folder, sweep):
        folder.write("sweep.json", text)


def _record(sweep: Sweep) -> dict:
    """What sweep.json holds, as it is read back."""
    points = {p.name: p.config.to_dict() for p in sweep.points}
    return json.loads(json_files.dumps({"metric": sweep.metric, "points": points}))


def check(folder: Folder, sweep: Sweep) -> bool:
    """Whether the sweep in a workdir is this one with fewer points, or with settings that may change. InputError: a
    point has another config now, or is not in the grid any more."""
    now, saved = _record(sweep), folder.read("sweep.json")
    if saved is None:
        return False
    try:
        then = json.loads(saved)
    except ValueError as error:
        raise InputError(
            f"{folder.path}/sweep.json is damaged ({error}): delete it, if you are sure that the config is the same."
        ) from error
    different = [f"  metric: it was {then['metric']!r} and is {now['metric']!r}"] * (then["metric"] != now["metric"])
    for name, config in then["points"].items():
        if name not in now["points"]:
            different.append(f"  {name}: it is not in the grid any more")
            continue
        before, after = _flat(config), _flat(now["points"][name])
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key) and not _may_change(key):
                different.append(f"  {name}: {key} was {before.get(key)!r} and is {after.get(key)!r}")
    if different:
        more = f"\n  and {len(different) - 10} more" * (len(different) > 10)
        raise InputError(
            f"{folder.path} holds another sweep:\n" + "\n".join(different[:10]) + more + "\n"
            "Give another --workdir, or the same config to continue that sweep; points may be added."
        )
    return now != then


def _may_change(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in _MAY_CHANGE)


def _flat(config: Mapping, prefix: str = "") -> dict:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


# --- table and cost ---------------------------------------------------------------------------------------


def table(sweep: Sweep, states: Mapping[str, State], rows: Mapping[str, dict]) -> str:
    """A line for each point, the convention of N and C, and how often text is seen. states, rows: by name; {} before
    anything has run."""
    lines, seen = [("point", "N", "D", "D/N", "epochs", "C", "steps", "shape", "rate", "state")], epochs(sweep, rows)
    for p in sweep.points:
        of_compute = (
            (f"{p.params:,}", f"{p.tokens:,}", f"{p.tokens / p.params:.1f}",
             f"{seen[p.name]:.2f}" if p.name in seen else "", f"{p.flops:.3e}") if p.params
            else ("", "", "", "", "")
        )  # fmt: skip
        rate = f"{p.config.optimizer.learning_rate:.3g}" if "optimizer" in p.config else ""
        steps = f"{p.config.steps:,}" if p.config.get("steps") else ""
        lines.append((p.name, *of_compute, steps, _shape(p), rate, state(states.get(p.name), rows.get(p.name))))
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    left = {0, 7, 9}
    pad = lambda i, text: f"{text:<{widths[i]}}" if i in left else f"{text:>{widths[i]}}"
    shown = ["  ".join(pad(i, text) for i, text in enumerate(line)).rstrip() for line in lines]
    conventions = sorted({CONVENTIONS[p.count, p.rule] for p in sweep.points if p.count})
    return "\n".join([*shown, *conventions, *repetition(sweep, seen)])


def epochs(sweep: Sweep, rows: Mapping[str, dict]) -> dict[str, float]:
    """{point: how often its run sees its text}, as far as results tell how long that is: a point without one is taken
    to have the text of the others, if that is the same for all of them."""
    lengths = {name: row["text_tokens"] for name, row in rows.items() if row.get("text_tokens")}
    common = next(iter(lengths.values())) if len(set(lengths.values())) == 1 else None
    lengths = {p.name: lengths.get(p.name, common) for p in sweep.points}
    return {p.name: p.tokens / lengths[p.name] for p in sweep.points if p.tokens and lengths[p.name]}


def repetition(sweep: Sweep, seen: Mapping[str, float]) -> list[str]:
    """What `epochs` says, in at most one sentence."""
    if not seen:
        known = any(p.tokens for p in sweep.points)
        return ["epochs: not known before a run has ended; a law of loss takes every token to be new"] * known
    repeated = [name for name, times in seen.items() if times > 1]
    return [f"{len(repeated)} points see their text more than once, up to {max(seen.values()):.2f} times: a law of "
            "loss takes every token to be new. Give more text with --config.data.source=PATH."] * bool(repeated)


def _shape(point: Point) -> str:
    model = point.config.get("model") or {}
    if model.get("n_layer"):
        return f"{model['n_layer']} x {model['d_model']}"
    return f"{model['units']} units" if model.get("units") else ""


def state(state: State | None, row: dict | None) -> str:
    if row is not None:
        loss = f" {row['loss']:.4f} {row['metric']}" if row["loss"] is not None else ""
        return f"{row['status']}{loss}" + (f" ({row['reason']})" if row["reason"] else "")
    if state is None:
        return ""
    if state.kind == "running" and state.beat and "step" in state.beat:
        return f"running on {state.owner.get('host')}, step {state.beat['step']:,}"
    return state.kind + (f" ({state.reason})" if state.reason else "")


def speed(sweep: Sweep, states: Mapping[str, State], rows: Mapping[str, dict]) -> float | None:
    """FLOP/s of a worker, measured: of the finished runs together, else of those that are running; compiling,
    evaluating and saving are not in it."""
    pairs = [(p.flops, rows[p.name]["seconds"]) for p in sweep.points if p.name in rows and p.flops
             and rows[p.name]["status"] == "done"] or [
        (p.flops * states[p.name].beat["step"] / p.config.steps, states[p.name].beat["seconds"]) for p in sweep.points
        if p.flops and p.name in states and fraction(p, states[p.name])
    ]  # fmt: skip
    seconds = sum(s for _, s in pairs if s)
    return sum(f for f, s in pairs if s) / seconds if seconds else None


def fraction(point: Point, state: State) -> float:
    """The share of a running point's own steps that are done, as far as is known."""
    steps = point.config.get("steps")
    beat = state.beat if state.kind == "running" else None
    if not (steps and beat and "step" in beat):
        return 0.0
    return max(beat["step"] - point.branch_step, 0) / (steps - point.branch_step)


def cost(sweep: Sweep, states: Mapping[str, State], rows: Mapping[str, dict], *, workers: int = 1,
         rate: float | None = None, price: float | None = None) -> str:  # fmt: skip
    """The compute of the sweep and what is left of it, in a line: FLOPs, hours, money.

    workers: that share the rest. rate: FLOP/s of each; None = as measured so far. price: of an hour of a worker."""
    points = [p for p in sweep.points if p.flops]
    total = sum(p.to_compute for p in points)
    left = sum(p.to_compute * (1 - (fraction(p, states[p.name]) if p.name in states else 0)) for p in points
               if p.name not in rows and (p.name not in states or states[p.name].kind != "failed"))  # fmt: skip
    parts = [f"{len(rows)} of {len(sweep.points)} points"]
    if points:
        parts.append(f"{total - left:.3g} of {total:.3g} FLOPs")
    used = rate or speed(sweep, states, rows)
    if used and points:
        hours, all_hours = left / used / 3600, total / used / 3600
        parts += [f"at {used:.3g} FLOP/s a worker {_hours(hours / max(workers, 1))} left with {workers}",
                  f"{_hours(all_hours)} of a worker in all"]  # fmt: skip
        if price is not None:
            parts.append(f"{price * all_hours:,.2f} in all at {price:g} an hour")
    elif points:
        parts.append("hours: not known before a run is under way; give --rate=FLOP/s of a worker")
    return "; ".join(parts)


def _hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 10 else f"{int(hours)}:{int(hours * 60) % 60:02d} h"


# --- the grid, drawn --------------------------------------------------------------------------------------


def picture(sweep: Sweep) -> bytes:
    """PNG: N against D, both logarithmic, with a line for each budget. InputError: no point has N and D."""
    points = [p for p in sweep.points if p.params]
    if not points:
        raise InputError("The points of this sweep have no N and D to draw: they were made without a budget.")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5))
    budgets = sorted({p.budget for p in points if p.budget})
    for i, budget in enumerate(budgets):
        on_it = sorted((p.params, p.tokens) for p in points if p.budget == budget)
        color = plt.cm.viridis(i / len(budgets))
        axes.plot([n for n, _ in on_it], [d for _, d in on_it], "o-", color=color, lw=1, ms=4,
                  label=f"{short(budget)} FLOPs")  # fmt: skip
    if others := [p for p in points if not p.budget]:
        axes.plot([p.params for p in others], [p.tokens for p in others], "s", color="gray", ms=4, label="other runs")
    axes.set(xscale="log", yscale="log", xlabel="parameters N", ylabel="training tokens D")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both", lw=0.4)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=150, bbox_inches="tight")
    plt.close(figure)
    return data.getvalue()
