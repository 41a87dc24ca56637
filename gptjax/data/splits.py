"""The train and validation split of the documents of a source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

from gptjax.data import sources
from gptjax.data.hashing import draw
from gptjax.errors import InputError

SPLITS = ("train", "validation")
HOW = ("documents", "lines", "position")


def held_out(source: str, validation: float, *, text_field: str = "text", seed: int = 0) -> set[str]:
    """Names of the documents that `prepare` puts into the validation split of a source with several documents."""
    read = functools.partial(sources.documents, source, text_field=text_field)
    limit, _ = _limit(read, validation, seed)
    return {d.name for d in read() if draw(seed, d.name) < limit}


def splitter(
    source: str,
    validation: float | str,
    text_field: str,
    seed: int,
    *,
    split: str | None = None,
    separator: str | None = None,
) -> Callable[[], Iterator[tuple[str, str]]]:
    """A function that reads the source from the start and yields (split, text) of each document.

    validation: fraction that is held out, or another source. split: how a fraction is held out. 'documents': by a hash
    of seed and name; 'lines': the same, with each line of a text file as a document; 'position': the last fraction of
    the source's characters, in order; None: documents if there are several, else position, with a message.
    separator: as `sources.documents`.
    InputError: a single document where several are needed, too little text, an unknown split.
    """
    if split not in (None, *HOW):
        raise InputError(f"data.split={split!r} is unknown: use one of {', '.join(HOW)}.")
    options = {"text_field": text_field, "separator": separator, "lines": split == "lines"}
    read = functools.partial(sources.documents, source, **options)
    if isinstance(validation, str):
        if split == "position":
            raise InputError(
                "data.split=position holds out a fraction, but data.validation names another source: set only one."
            )

        def two_sources() -> Iterator[tuple[str, str]]:
            yield from (("train", d.text) for d in read())
            held_out = sources.documents(validation, **options)
            yield from (("validation", d.text) for d in held_out)

        return two_sources

    limit, count = (0, 1) if split == "position" else _limit(read, validation, seed)
    if count == 1 and split in ("documents", "lines"):
        raise InputError(
            f"The source {source!r} has only one of the {split} that data.split names, so none can be held out: use "
            "data.split=position, or give another source as data.validation."
        )
    if count == 1 and split is None:
        print(
            f"The source {source} is a single document, so the last {validation:.3g} of its characters are held out. "
            "(data.split=lines makes each line a document, data.document_separator splits it at a text.)"
        )

    def by_document() -> Iterator[tuple[str, str]]:
        yield from (("validation" if draw(seed, d.name) < limit else "train", d.text) for d in read())

    def by_position() -> Iterator[tuple[str, str]]:
        total = sum(len(d.text) for d in read())
        end = int(total * (1 - validation))
        if not 0 < end < total:
            raise InputError(
                f"The source {source!r} has {total} characters, too few to hold out {validation} of them: give more "
                "text."
            )
        for document in read():
            if end > 0:
                yield "train", document.text[:end]
            if end < len(document.text):
                yield "validation", document.text[max(end, 0) :]
            end -= len(document.text)

    return by_document if count > 1 else by_position


def _limit(read: Callable[[], Iterator[sources.Document]], validation: float, seed: int) -> tuple[int, int]:
    """(limit of the draws of held-out documents, 1 if there is just one document, else more)."""
    limit, least, most, count = int(validation * 2**64), 2**64, -1, 0
    for document in read():
        count += 1
        place = draw(seed, document.name)
        least, most = min(least, place), max(most, place)
        if least < limit <= most:  # both splits have a document: no need to read on
            break
    # At least the document with the lowest draw is held out, and the one with the highest is not.
    return min(max(limit, least + 1), most), count
