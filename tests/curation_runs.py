"""What tests of curation share: runs of a list of steps on rows, in this process."""

import json
from pathlib import Path

import pyarrow.parquet as pq

from gptjax.curation import plan
from gptjax.curation.config import CurateConfig
from gptjax.curation.engine import work


def write_rows(folder: Path, files: dict[str, list]) -> Path:
    """{name: rows} as .jsonl files, a text being the row {'text': text}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = [json.dumps({"text": row} if isinstance(row, str) else row) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def curated(folder: Path, files: dict[str, list], steps, **config) -> tuple[dict, dict[str, dict], list[dict]]:
    """(summary, {id: its record in the manifest}, documents) of a run with one shard a file."""
    source = write_rows(folder / "in", files)
    run = plan.begin(CurateConfig(input=str(source), shard_bytes=1, **config), steps, folder / "out", "-")
    assert work(run)
    return outcome(folder / "out")


def outcome(workdir: Path) -> tuple[dict, dict[str, dict], list[dict]]:
    records = rows_of(workdir / "manifest")
    by_id = {record["id"]: record for record in records}
    return json.loads((workdir / "manifest.json").read_text()), by_id, rows_of(workdir / "documents")


def rows_of(folder: Path) -> list[dict]:
    return [row for path in sorted(folder.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def contents(workdir: Path) -> dict[str, bytes]:
    """What must not depend on how the work was divided: documents, manifest, texts for reading, summary."""
    found = {}
    for name in ("documents", "manifest", "removed", "changed", "manifest.json"):
        path = workdir / name
        for file in [path] if path.is_file() else sorted(path.glob("*")):
            found[f"{name}/{file.name}"] = file.read_bytes()
    return found
