"""Stop strings, which end a generated text before the earliest of them. They are strings, not tokens: a stop may begin
within a token and end within a later one, so text is compared with them, and a decoder looks at the text so far."""

from collections.abc import Sequence

from gptjax.errors import InputError


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins; None without one. Raises InputError for an empty stop string."""
    if isinstance(stops, str) or "" in stops:
        raise InputError(f"Stop strings {stops!r}: give a list of texts, none of them empty.")
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the earliest stop string, which is not part of it; the whole text without one."""
    return text[: find_stop(text, stops)]
