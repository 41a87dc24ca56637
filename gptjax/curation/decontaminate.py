"""Takes evaluation sets out of a training corpus, as GPT-3 meant to (Brown et al. 2020, appendix C).

Where 13 words of a document occur in an evaluation item, these and 200 characters on each side are cut out, and the
document is divided there. Pieces of less than 200 characters go, and so does all of a document that is cut into more
than 10. N-grams that occur in more than 10 documents are ignored: phrases, not copies. Words are letters and digits in
lower case (data/ngrams.py); items of fewer than 13 words cannot be found, and are counted.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from gptjax.curation import storage
from gptjax.curation.documents import Document, Drop
from gptjax.curation.words import Words, words
from gptjax.data import ngrams
from gptjax.data.evaluation_sets import evaluation_sets


@dataclasses.dataclass(frozen=True)
class Decontaminate:
    """evaluation: a file of rows or a folder of them, each an evaluation set. n: words; window: characters on each
    side; shortest: characters of a piece; most_pieces: of a document; most_documents: in which an n-gram may occur and
    still count."""

    evaluation: str
    n: int = 13
    window: int = 200
    shortest: int = 200
    most_pieces: int = 10
    most_documents: int = 10
    name = "decontaminate"

    def prepare(self, folder: Path) -> dict:
        sets = evaluation_sets(self.evaluation, None)
        hashes, short = [np.zeros(0, np.uint64)], 0
        for items in sets.values():
            for item in items:
                grams = ngrams.ngram_hashes(words(item).hashes, self.n)
                hashes.append(grams)
                short += not len(grams)
        known = np.unique(np.concatenate(hashes))
        storage.write_arrays(folder / "ngrams.npz", known=known)
        items = sum(map(len, sets.values()))
        return {"sets": len(sets), "items": items, "short_items": short, "ngrams": len(known)}

    def sketch(self, prefix: Path, folder: Path) -> _Sketch:
        return _Sketch(prefix, self.n, _known(folder))

    def decide(self, sketches, folder: Path) -> dict:
        """Which n-grams are ignored, and of each shard the documents that have others."""
        known = _known(folder).values
        hits = [storage.numbers(s.prefix, "hits", "<i8") for s in sketches]
        documents = np.zeros(len(known), np.int64)
        for of_shard in hits:
            documents += np.bincount(of_shard, minlength=len(known))
        counted = (documents > 0) & (documents <= self.most_documents)
        contaminated = 0
        for shard, (sketch, of_shard) in enumerate(zip(sketches, hits, strict=True)):
            counts = storage.numbers(sketch.prefix, "counts", "<i8")
            row = np.repeat(np.arange(len(counts)), counts)
            rows = np.unique(row[counted[of_shard]])
            contaminated += len(rows)
            storage.write_arrays(folder / f"{shard:05d}.npz", rows=rows)
        storage.write_arrays(folder / "counted.npz", known=known[counted])
        found = {"found": int((documents > 0).sum()), "ignored": int((documents > self.most_documents).sum())}
        return {**found, "documents": contaminated}

    def applied(self, folder: Path, shard: int):
        with np.load(folder / "counted.npz") as file:
            known = ngrams.Known(file["known"])
        with np.load(folder / f"{shard:05d}.npz") as file:
            rows = set(file["rows"].tolist())

        def step(document: Document) -> Document | Drop | list:
            return self.cut(document, known) if document.row in rows else document

        return step

    def cut(self, document: Document, known: ngrams.Known) -> Document | Drop | list:
        """The pieces of a document between the windows around what it shares with evaluation items."""
        found = words(document.text)
        places = self._matches(found, known)
        if not len(places):
            return document
        pieces, end, cuts = [], 0, 0
        for place in places:
            begin = max(int(found.starts[place]) - self.window, 0)
            stop = int(found.ends[place + self.n - 1]) + self.window
            if begin > end or not cuts:
                pieces.append(document.text[end:begin])
                cuts += 1
            end = max(end, stop)
        pieces = [piece for piece in [*pieces, document.text[end:]] if piece]
        if len(pieces) > self.most_pieces:
            return Drop("many_pieces", len(pieces))
        made: list = []
        for number, piece in enumerate(pieces, 1):
            if len(piece) < self.shortest:
                made.append(Drop("short_piece", len(piece), detail=f"piece {number}"))
            else:
                copied = {"fields": document.fields, "scores": dict(document.scores), "place": document.place}
                edits = document.edits | {"decontaminated": cuts}
                made.append(Document(f"{document.id}#{number}", piece, edits=edits, **copied))
        return made or Drop("nothing_left")

    def _matches(self, found: Words, known: ngrams.Known) -> np.ndarray:
        """The words that matching n-grams begin with, in order."""
        return known.find(ngrams.ngram_hashes(found.hashes, self.n))[0]


class _Sketch:
    """Of each document the n-grams of evaluation items that it has, each once."""

    def __init__(self, prefix: Path, n: int, known: ngrams.Known):
        self._n, self._known = n, known
        self._columns = storage.Columns(prefix, {"counts": "<i8", "hits": "<i8"})

    def add(self, document: Document) -> None:
        hashes = ngrams.ngram_hashes(words(document.text).hashes, self._n)
        hits = np.unique(self._known.find(hashes)[1])
        self._columns.add(counts=[len(hits)], hits=hits)

    def close(self) -> None:
        self._columns.close()


def _known(folder: Path) -> ngrams.Known:
    with np.load(folder / "ngrams.npz") as file:
        return ngrams.Known(file["known"])
