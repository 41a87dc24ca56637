"""Stop strings, which end a generated text before the earliest of them. They are strings, not tokens: a stop may begin
within a token and end within a later one, so text is compared with them, and a decoder looks at the text so far."""

from collections.abc import Callable, Sequence

from gptjax.errors import InputError


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the earliest stop string begins; None without one. Raises InputError for an empty stop string."""
    if isinstance(stops, str) or "" in stops:
        raise InputError(f"Stop strings {stops!r}: give a list of texts, none of them empty.")
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the earliest stop string, which is not part of it; the whole text without one."""
    return text[: find_stop(text, stops)]


def safe_length(text: str, stops: Sequence[str]) -> int:
    """How many characters of an unfinished text are final, whatever comes next: those before its earliest stop string,
    or before the longest ending that a stop string begins with."""
    place = find_stop(text, stops)
    if place is not None:
        return place
    longest = max(map(len, stops), default=1) - 1
    return next((i for i in range(max(0, len(text) - longest), len(text)) if _begins(text[i:], stops)), len(text))


def _begins(ending: str, stops: Sequence[str]) -> bool:
    return any(stop.startswith(ending) for stop in stops)


def tokens_to_stop(tokens: Sequence[int], decode: Callable[[Sequence[int]], str], stops: Sequence[str]) -> int | None:
    """The least number of tokens whose text has a stop string: what had to be decoded. None where all of them together
    have none, so that decoding goes on. decode: tokens -> text; once a prefix has a stop string, longer ones do too.
    """
    if find_stop(decode(tokens), stops) is None:
        return None
    low, high = 0, len(tokens)  # the text of low tokens has none, of high one
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if find_stop(decode(tokens[:middle]), stops) is None else (low, middle)
    return high
