"""The end of a curation: counts of all shards together, texts for reading, the report, and the output in its place."""

from __future__ import annotations

import html
import json
import shutil
from collections import Counter

from gptjax import json_files, web_page
from gptjax.curation import storage
from gptjax.curation.documents import describe, name_of

SUMMARY = "manifest.json"


def finish(run) -> dict:
    """Writes manifest.json, removed/, changed/ and report.html, and moves the documents to where pre-training reads
    them. Returns the summary. It may be done again, by whoever is not sure that it was."""
    phases = {p.number: run.results(f"phase-{p.number}") for p in run.phases}
    summary = summarize(run, phases)
    texts = _texts(run, phases)
    for kind, rows in texts.items():
        changed = kind.endswith(".changed")
        name = kind.removesuffix(".changed").replace("/", "-").replace(" ", "-")
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        storage.write_bytes(run.workdir / ("changed" if changed else "removed") / f"{name}.jsonl", lines.encode())
    seconds = _seconds(run, phases)
    storage.write_bytes(run.workdir / "report.html", report(run, summary, seconds, texts).encode())
    built, there = run.workdir / "work" / "documents", run.workdir / "documents"
    if built.exists():
        built.replace(there)
    storage.write_bytes(run.workdir / SUMMARY, json_files.dumps(summary, indent=1).encode() + b"\n")
    for phase in run.phases:
        shutil.rmtree(run.workdir / "work" / f"phase-{phase.number}", ignore_errors=True)
    return summary


def summarize(run, phases: dict[int, list[dict]]) -> dict:
    """{'read', 'unreadable', 'kept', 'kept_characters', 'steps'}: of each step documents and characters in and out, and
    how many it removed for which reason; figures: what it measured of itself."""
    steps, unreadable = {}, Counter()
    for rows in phases.values():
        for row in rows:
            unreadable.update(row["unreadable"])
            for step in row["steps"]:
                empty = {"in": 0, "out": 0, "chars_in": 0, "chars_out": 0, "reasons": {}}
                total = steps.setdefault(step["step"], empty)
                for key in ("in", "out", "chars_in", "chars_out"):
                    total[key] += step[key]
                for reason, count in step["reasons"].items():
                    total["reasons"][reason] = total["reasons"].get(reason, 0) + count
    read = steps.pop("read", {"out": 0, "chars_out": 0})
    for total in steps.values():
        total["reasons"] = dict(sorted(total["reasons"].items()))
    for i, step in enumerate(run.steps):
        if figures := _figures(run, i):
            steps.setdefault(name_of(step), {})["figures"] = figures
    last = list(phases.values())[-1]
    outs = [total["chars_out"] for total in steps.values() if "chars_out" in total]
    return {
        "read": read["out"], "read_characters": read["chars_out"], "unreadable": dict(sorted(unreadable.items())),
        "kept": sum(row["documents"] for row in last), "kept_characters": outs[-1] if outs else read["chars_out"],
        "steps": steps, "recipe": [describe(step) for step in run.steps],
    }  # fmt: skip


def _figures(run, step: int) -> dict:
    """What a step said of its preparation and its decision."""
    found = {}
    for stage, names, _ in run.stages():
        for i, task in enumerate(names):
            if task == f"{step}-{name_of(run.steps[step])}" and not stage.startswith("phase"):
                found |= run.results(stage)[i]["figures"] or {}
    return found


def _seconds(run, phases) -> dict[str, float]:
    """CPU seconds of each step, over all workers."""
    found = Counter()
    for phase in run.phases:
        for row in phases[phase.number]:
            for step in row["steps"]:
                found[step["step"]] += step["seconds"]
            if phase.closing is not None:
                found[name_of(run.steps[phase.closing])] += row["sketch_seconds"]
    for stage, names, _ in run.stages():
        if stage.startswith("decide"):
            found[names[0].partition("-")[2]] += run.results(stage)[0]["seconds"]
    return found


def _texts(run, phases) -> dict[str, list[dict]]:
    """{'step.reason': texts for reading}, those with the lowest draws of all shards."""
    found: dict[str, list] = {}
    for rows in phases.values():
        for row in rows:
            for kind, drawn in row["samples"].items():
                found.setdefault(kind, []).extend(drawn)
    return {kind: [row for _, _, row in sorted(drawn, key=lambda d: (d[0], d[1]))[: run.config.samples]]
            for kind, drawn in sorted(found.items())}  # fmt: skip


# --- the report -----------------------------------------------------------------------------------------------


def report(run, summary: dict, seconds: dict[str, float], texts: dict[str, list[dict]]) -> str:
    """report.html: the funnel, what each rule removed, and texts before and after."""
    share = 100 * summary["kept_characters"] / max(summary["read_characters"], 1)
    lost = sum(summary["unreadable"].values())
    about = [
        ("input", run.config.input),
        ("read", f"{summary['read']:,} documents, {summary['read_characters']:,} characters"),
        ("unreadable", ", ".join(f"{n:,} {reason}" for reason, n in summary["unreadable"].items()) if lost else "0"),
        ("kept", f"{summary['kept']:,} documents, {summary['kept_characters']:,} characters ({share:.1f} %)"),
    ]
    parts = [f"<h1>{html.escape(run.workdir.name)}</h1>", web_page.table(about), _funnel(summary, seconds)]
    for kind, rows in texts.items():
        step, _, reason = kind.partition(".")
        title = f"{step}: changed" if reason == "changed" else f"{step}: removed, {reason}"
        parts.append(f"<h2>{html.escape(title)}</h2>" + "".join(_text(row) for row in rows[:3]))
    parts.append("<h2>Recipe</h2><pre>" + html.escape("\n".join(summary["recipe"])) + "</pre>")
    return web_page.page(run.workdir.name, parts)


def _funnel(summary: dict, seconds: dict[str, float]) -> str:
    total = max(summary["read"], 1)
    rows = ["<tr><th>step<th>documents left<th><th>removed<th>characters left<th>characters a CPU second<th>why</tr>"]
    for name, step in summary["steps"].items():
        if "in" not in step:
            continue
        bar = f"<div style='background:#3b6fb6;height:.8em;width:{12 * step['out'] / total:.2f}em'></div>"
        speed = f"{step['chars_in'] / seconds[name]:,.0f}" if seconds.get(name) else ""
        why = ", ".join(f"{n:,} {html.escape(reason)}" for reason, n in step["reasons"].items())
        rows.append(
            f"<tr><th>{html.escape(name)}<td class=n>{step['out']:,}<td>{bar}"
            f"<td class=n>{sum(step['reasons'].values()):,}<td class=n>{step['chars_out']:,}"
            f"<td class=n>{speed}<td>{why}</tr>"
        )
    return "<h2>What each step left</h2><table>" + "".join(rows) + "</table>"


def _text(row: dict) -> str:
    about = ", ".join(f"{k} {v}" for k, v in row.items() if k not in ("text", "before", "after"))
    texts = [row[key] for key in ("text", "before", "after") if key in row]
    return "<pre><b>" + html.escape(about) + "</b>\n" + "\n<b>⟶</b>\n".join(map(html.escape, texts)) + "</pre>"
