"""The engine: shards of the input through phases of steps, by any number of workers that share a folder.

A step has one of three forms.

    step(document) -> Document | Drop | list of those

A function, or an object with __call__. A list divides the document.

    step.prepare(folder) -> figures
    step.opened(folder) -> function of a document

It learns from files first, once, and keeps in the folder what it has learned.

    step.sketch(prefix, folder) -> object with add(document) and close()
    step.decide(sketches, folder) -> figures
    step.applied(folder, shard) -> function of a document

It decides when it has seen a sketch of every document. It may have `prepare` too. Any step may have `check()`, which
raises InputError before anything runs.

A phase is a chain of functions, which each document goes through at once, up to a step that must see all: that one
sketches what is left. Then it decides, and the next phase begins with its decision. Each phase writes the documents
that are left, shard by shard; the last one writes the output. Tasks (a shard of a phase, a decision) are points of a
queue of files (queue/claims.py), so that workers on any host can share them and a killed one loses its task alone.
"""

from __future__ import annotations

import dataclasses
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gptjax import json_files
from gptjax.curation import storage
from gptjax.curation.config import CurateConfig
from gptjax.curation.documents import Document, Drop, Unreadable, name_of
from gptjax.curation.finish import finish
from gptjax.curation.readers import Reading, read
from gptjax.queue.claims import FAILED, Lease, Queue
from gptjax.queue.workers import LOST

_POLL = 0.1  # seconds between two looks at a queue where others have all that is left
ATTEMPTS = 3  # times that a task may fail


class Phase(NamedTuple):
    """opening: the step whose decision the phase begins with, as an index; steps: of single documents; closing: the
    step that sketches what is left. None where there is none."""

    number: int
    opening: int | None
    steps: tuple[int, ...]
    closing: int | None


class Sketch(NamedTuple):
    """What a step has sketched of one shard. prefix: of its files; documents: the table of the same documents, in the
    same order; count: how many."""

    prefix: Path
    documents: Path
    count: int


@dataclasses.dataclass(frozen=True)
class Run:
    """A curation. shards: the files of each, as {'path', 'name', 'size'}."""

    workdir: Path
    config: CurateConfig
    steps: tuple[Any, ...]
    shards: tuple[tuple[dict, ...], ...]

    @property
    def phases(self) -> list[Phase]:
        found, opening, steps = [], None, []
        for i, step in enumerate(self.steps):
            if hasattr(step, "sketch"):
                found.append(Phase(len(found), opening, tuple(steps), i))
                opening, steps = i, []
            else:
                steps.append(i)
        return [*found, Phase(len(found), opening, tuple(steps), None)]

    def stages(self) -> list[tuple[str, list[str], Callable[[int], dict]]]:
        """(name, names of its tasks, what does the task of an index) in order: each begins when all before are done."""
        shards = [f"{i:05d}" for i in range(len(self.shards))]
        prepared = [i for i, step in enumerate(self.steps) if hasattr(step, "prepare")]
        stages = []
        if prepared:
            names = [f"{i}-{name_of(self.steps[i])}" for i in prepared]
            stages.append(("prepare", names, lambda i: self._prepare(prepared[i])))
        for phase in self.phases:
            stages.append((f"phase-{phase.number}", shards, lambda i, phase=phase: through(self, phase, i)))
            if phase.closing is not None:
                names = [f"{phase.closing}-{name_of(self.steps[phase.closing])}"]
                stages.append((f"decide-{phase.number}", names, lambda _, phase=phase: self._decide(phase)))
        return [*stages, ("finish", ["all"], lambda _: finish(self))]

    def queue(self, stage: str, lease: float = 60.0) -> Queue:
        return Queue(self.workdir / "work" / "queue" / stage, lease=lease, attempts=ATTEMPTS)

    def folder(self, step: int) -> Path:
        """Where a step keeps what it has learned or decided."""
        return self.workdir / "work" / f"step-{step}-{name_of(self.steps[step])}"

    def table(self, phase: int, shard: int, name: str) -> Path:
        return self.workdir / "work" / f"phase-{phase}" / f"{shard:05d}.{name}.parquet"

    def sketch(self, phase: Phase, shard: int) -> Path:
        return self.workdir / "work" / f"phase-{phase.number}" / f"{shard:05d}"

    def results(self, stage: str) -> list[dict]:
        """Of a stage that is done, by task."""
        queue = self.queue(stage)
        return [queue.result(task) for task in next(tasks for name, tasks, _ in self.stages() if name == stage)]

    def _prepare(self, step: int) -> dict:
        began, folder = time.thread_time(), self.folder(step)
        folder.mkdir(parents=True, exist_ok=True)
        figures = self.steps[step].prepare(folder)
        return {"seconds": time.thread_time() - began, "figures": figures}

    def _decide(self, phase: Phase) -> dict:
        began, step, folder = time.thread_time(), self.steps[phase.closing], self.folder(phase.closing)
        folder.mkdir(parents=True, exist_ok=True)
        counts = [row["documents"] for row in self.results(f"phase-{phase.number}")]
        sketches = [Sketch(self.sketch(phase, i), self.table(phase.number, i, "documents"), count)
                    for i, count in enumerate(counts)]  # fmt: skip
        figures = step.decide(sketches, folder)
        return {"seconds": time.thread_time() - began, "figures": figures}


# --- a shard through a phase ----------------------------------------------------------------------------------


class Counter:
    """What one step did to the documents of a shard: documents and characters in and out, of edits and reasons."""

    def __init__(self, step: str):
        self.step, self.seconds, self.figures = step, 0.0, dict.fromkeys(("in", "out", "chars_in", "chars_out"), 0)
        self.reasons: dict[str, int] = {}

    def row(self) -> dict:
        return {"step": self.step, "seconds": self.seconds, **self.figures, "reasons": self.reasons}


def through(run: Run, phase: Phase, shard: int) -> dict:
    """Takes the documents of a shard through a phase; the task's result: counts by step."""
    last = phase.closing is None
    chain = _chain(run, phase, shard)
    counters = [Counter(name) for name, _ in chain]
    removed = storage.Table(run.table(phase.number, shard, "removed"), storage.RECORD)
    left = run.table(phase.number, shard, "documents")
    kept = _Output(run, phase, shard) if last else storage.Table(left, storage.DOCUMENT)
    sketch = None if last else run.steps[phase.closing].sketch(run.sketch(phase, shard), run.folder(phase.closing))
    samples, unreadable, count, sketching = storage.Samples(run.config.samples, run.config.seed), {}, 0, 0.0
    read_counter = Counter("read")
    for item in _documents(run, phase, shard):
        if isinstance(item, tuple):
            unreadable[item[1].reason] = unreadable.get(item[1].reason, 0) + 1
            removed.add(storage.unreadable_record(item[1], item[0]))
            continue
        read_counter.figures["out"] += 1
        read_counter.figures["chars_out"] += len(item.text)
        for document, drop, step in _apply(item, chain, counters, samples):
            if drop is not None:
                removed.add(storage.removed_record(document, step, drop))
                kind, text = f"{step}.{drop.reason}", document.text
                samples.add(kind, document.id, lambda d=document, r=drop, t=text: _sample(d, r, t))
                continue
            count += 1
            kept.add(document if last else storage.document_row(document))
            if sketch is not None:
                began = time.thread_time()
                sketch.add(document)
                sketching += time.thread_time() - began
    removed.close()
    kept.close()
    if sketch is not None:
        sketch.close()
    if last:
        _manifest(run, phase, shard, kept)
    rows = [c.row() for c in ([read_counter] if phase.number == 0 else []) + counters]
    return {"documents": count, "steps": rows, "unreadable": unreadable, "sketch_seconds": sketching,
            "samples": samples.found()}  # fmt: skip


def _documents(run: Run, phase: Phase, shard: int) -> Iterator[Document | tuple[int, Unreadable]]:
    """The documents that a phase begins with; of a file's faults (place, what)."""
    if phase.number:
        for number, row in enumerate(storage.rows(run.table(phase.number - 1, shard, "documents"))):
            yield storage.document_of(row, number)
        return
    c, place = run.config, 0
    for file in run.shards[shard]:
        for item in read(file, Reading(c.text_field, c.invalid_utf8, c.longest)):
            if isinstance(item, Document):
                item.place = item.row = place
                if c.id_field != "id" and c.id_field in item.fields:
                    item.fields["id"] = item.fields.pop(c.id_field)
                yield item
            else:
                yield place, item
            place += 1


def _chain(run: Run, phase: Phase, shard: int) -> list[tuple[str, Callable]]:
    """(name, function) of the steps that documents of a shard go through in a phase."""
    chain = []
    if phase.opening is not None:
        step = run.steps[phase.opening]
        chain.append((name_of(step), step.applied(run.folder(phase.opening), shard)))
    for i in phase.steps:
        step = run.steps[i]
        chain.append((name_of(step), step.opened(run.folder(i)) if hasattr(step, "opened") else step))
    return chain


def _apply(document: Document, chain, counters: list[Counter], samples: storage.Samples, at: int = 0):
    """(document, None, None) of what is left of it at the end of the chain, (document, Drop, step) of what is not."""
    for i in range(at, len(chain)):
        (name, step), counter, before, edits = chain[i], counters[i], document.text, len(document.edits)
        figures, began = counter.figures, time.thread_time()
        try:
            outcome = step(document)
        except Exception as error:
            raise RuntimeError(f"The step {name} failed on {document.id} ({type(error).__name__}: {error})") from error
        counter.seconds += time.thread_time() - began
        figures["in"] += 1
        figures["chars_in"] += len(before)
        pieces = outcome if isinstance(outcome, list) else [outcome]
        for piece in pieces:
            if isinstance(piece, Drop):
                counter.reasons[piece.reason] = counter.reasons.get(piece.reason, 0) + 1
                yield document, piece, name
            else:
                figures["out"] += 1
                figures["chars_out"] += len(piece.text)
        if isinstance(outcome, list):
            for piece in outcome:
                if isinstance(piece, Document):
                    yield from _apply(piece, chain, counters, samples, i + 1)
            return
        if isinstance(outcome, Drop):
            return
        document = outcome
        if document.text != before or len(document.edits) != edits:
            samples.add(f"{name}.changed", document.id,
                        lambda d=document, b=before: {"id": d.id, **storage.difference(b, d.text)})  # fmt: skip
    yield document, None, None


def _sample(document: Document, drop: Drop, text: str) -> dict:
    about = {k: v for k, v in dataclasses.asdict(drop).items() if v is not None}
    return {"id": document.id, **about, "text": storage.shown(text)}


class _Output:
    """The documents of the last phase: a file of documents/, and their records."""

    def __init__(self, run: Run, phase: Phase, shard: int):
        folder, flat = run.workdir / "work" / "documents", run.config.format == "jsonl"
        name = f"part-{shard:05d}"
        self._flat = flat
        self._documents = (storage.JsonLines(folder / f"{name}.jsonl.gz") if flat
                           else storage.Table(folder / f"{name}.parquet", storage.OUTPUT))  # fmt: skip
        self.records = run.table(phase.number, shard, "kept")
        self._records = storage.Table(self.records, storage.RECORD)

    def add(self, document: Document) -> None:
        self._documents.add(storage.output_row(document, self._flat))
        self._records.add(storage.kept_record(document))

    def close(self) -> None:
        self._documents.close()
        self._records.close()


def _manifest(run: Run, phase: Phase, shard: int, kept: _Output) -> None:
    """The records of all documents of a shard, in the order in which they were read."""
    removed = [run.table(p.number, shard, "removed") for p in run.phases]
    table = storage.Table(run.workdir / "manifest" / f"part-{shard:05d}.parquet", storage.RECORD)
    for row in storage.merged([*removed, kept.records]):
        table.add(row)
    table.close()


# --- a worker -------------------------------------------------------------------------------------------------


def work(run: Run, *, lease: float = 60.0, on_lost: Callable[[], None] | None = None) -> bool:
    """Does tasks until all are done; False if one has failed as often as it may. on_lost: called from a thread when
    another worker has taken over this one's task; None = this process ends."""
    for stage, names, do in run.stages():
        queue = run.queue(stage, lease)
        while True:
            states = queue.states(names)
            kinds = [states[name].kind for name in names]
            if "failed" in kinds:
                return False
            if all(kind == "finished" for kind in kinds):
                break
            taken = queue.acquire(names)
            if taken is None:
                time.sleep(_POLL)
                continue
            with taken.kept(dict, on_lost or (lambda: os._exit(LOST))):
                _attempt(queue, taken, do, names)
    return True


def _attempt(queue: Queue, lease: Lease, do: Callable[[int], dict], names: list[str]) -> None:
    try:
        row = do(names.index(lease.name))
    except Exception as error:
        traceback.print_exc()
        lease.end(FAILED, str(error))
    else:
        queue.keep(lease, json_files.json_safe(row))
