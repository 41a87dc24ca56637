"""Which text is held out: the documents of a source, dealt out to a train and a validation split."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator

from gptjax.data import sources
from gptjax.errors import InputError

SPLITS = ("train", "validation")


def held_out(source: str, validation: float, *, text_field: str = "text", seed: int = 0) -> set[str]:
    """The names of the documents that `tokens.prepare` puts into the validation split, of a source that has several."""
    read = functools.partial(sources.documents, source, text_field=text_field)
    limit, _ = _limit(read, validation, seed)
    return {d.name for d in read() if _draw(seed, d.name) < limit}


def splitter(
    source: str, validation: float | str, text_field: str, seed: int
) -> Callable[[], Iterator[tuple[str, str]]]:
    """A function that reads the source anew and yields (split, text) of each document."""
    read = functools.partial(sources.documents, source, text_field=text_field)
    if isinstance(validation, str):

        def two_sources() -> Iterator[tuple[str, str]]:
            yield from (("train", d.text) for d in read())
            held_out = sources.documents(validation, text_field=text_field)
            yield from (("validation", d.text) for d in held_out)

        return two_sources

    limit, count = _limit(read, validation, seed)

    def by_document() -> Iterator[tuple[str, str]]:
        yield from (("validation" if _draw(seed, d.name) < limit else "train", d.text) for d in read())

    def by_position() -> Iterator[tuple[str, str]]:
        (document,) = read()
        end = int(len(document.text) * (1 - validation))
        if not 0 < end < len(document.text):
            raise InputError(
                f"source {source!r} has {len(document.text)} characters, too few to hold out {validation} of "
                "them; give more text"
            )
        yield from zip(SPLITS, (document.text[:end], document.text[end:]), strict=True)

    return by_document if count > 1 else by_position


def _limit(read: Callable[[], Iterator[sources.Document]], validation: float, seed: int) -> tuple[int, int]:
    """Documents that draw less are held out; and 1 if there is just one document, else more."""
    limit, least, most, count = int(validation * 2**64), 2**64, -1, 0
    for document in read():
        count += 1
        draw = _draw(seed, document.name)
        least, most = min(least, draw), max(most, draw)
        if least < limit <= most:  # both sides have a document: the rest needn't be read for this
            break
    # Else the document with the lowest draw is held out, or the one with the highest kept.
    return min(max(limit, least + 1), most), count


def _draw(seed: int, name: str) -> int:
    """A number in [0, 2⁶⁴) that depends on nothing but seed and name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")
