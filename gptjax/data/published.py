"""Rows in the forms they are published in, as what data/chat.py reads: messages, or a prompt and responses.

Known are TRL's conversational and implicit-prompt forms, transcripts as of Anthropic's HH (Bai et al. 2022), one text
of "\\n\\nHuman:" and "\\n\\nAssistant:" turns, and ShareGPT's turns of "from" and "value".
"""

from __future__ import annotations

import re
from typing import Any

from gptjax.errors import InputError

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant", "human": "user", "gpt": "assistant"}
_ANSWER = "\n\nAssistant:"


def messages(value: Any) -> Any:
    """Messages {"role", "content"} of a list of turns or of a transcript; anything else as it is."""
    if _is_transcript(value):
        marks = list(_TURN.finditer(value))
        ends = [mark.start() for mark in marks[1:]] + [len(value)]
        return [
            {"role": _ROLES[mark[1]], "content": value[mark.end() : end].strip()}
            for mark, end in zip(marks, ends, strict=True)
        ]
    return [_message(turn) for turn in value] if isinstance(value, list | tuple) else value


def prompt(value: Any, kind: str, *, answered: bool = False) -> Any:
    """A prompt as Template.prompt of that kind takes it. A transcript becomes messages, in 'plain' it stays text.

    answered: an assistant's turn at the end is left out; without it, only one that is empty (a transcript's
    "\\n\\nAssistant:" with nothing after it).
    """
    if _is_transcript(value) and kind == "plain":
        return _split(value)[0] if answered else value
    value = value if isinstance(value, str) and not _is_transcript(value) else messages(value)
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        if answered or value[-1]["content"] == "":
            return value[:-1]
    return value


def response(value: Any) -> Any:
    """The text of a response that is one assistant message in a list; anything else as it is."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return value
    turns = messages(value)
    roles = [turn["role"] for turn in turns]
    if roles != ["assistant"]:
        raise InputError(
            f"a response is one turn of the assistant, and these turns are the {', '.join(map(str, roles))}'s; "
            "leave out the prompt's turns, or all that follow the response"
        )
    return turns[0]["content"]


def preference(given: Any, chosen: Any, rejected: Any, kind: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen response, rejected response). given: the row's own prompt, None where it has none.

    Where chosen and rejected are whole conversations, message lists or transcripts, what they share is the prompt
    (TRL's implicit prompt), whether or not the row names one too. InputError: they part before their last turn, or
    there is no prompt.
    """
    if kind == "plain" and _is_transcript(chosen) and _is_transcript(rejected):
        (shared, better), (other, worse) = _split(chosen), _split(rejected)
        if shared != other:
            raise InputError("chosen and rejected differ before their last '\\n\\nAssistant:'; they need one prompt")
        return shared, better, worse
    conversations = messages(chosen), messages(rejected)
    if all(isinstance(c, list) and c and all(isinstance(turn, dict) for turn in c) for c in conversations):
        shared = _shared(*(c[:-1] for c in conversations))
        rest = [c[len(shared) :] for c in conversations]
        if [len(r) for r in rest] != [1, 1]:
            raise InputError(
                f"chosen and rejected differ from turn {len(shared) + 1} on, before their last one; they need the same "
                "turns but for the assistant's last"
            )
        if shared and isinstance(given, list | tuple) and prompt(given, kind) != shared:
            raise InputError("chosen and rejected begin with turns other than the prompt's; leave out one of them")
        if shared or given is not None:
            return shared or prompt(given, kind), response(rest[0]), response(rest[1])
    elif given is not None:
        return prompt(given, kind), response(chosen), response(rejected)
    raise InputError(
        "no field 'prompt', and chosen and rejected are not whole conversations that begin with it (message lists, or "
        "transcripts of '\\n\\nHuman:' and '\\n\\nAssistant:' turns); name the field that holds the prompt with "
        "--config.data.fields.prompt=NAME"
    )


def _shared(a: list, b: list) -> list:
    """The turns that both begin with."""
    count = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:count]


def _message(turn: Any) -> Any:
    """{"role", "content"} of a turn in ShareGPT's names or these, without whatever else it holds."""
    if not isinstance(turn, dict):
        return turn
    if "role" not in turn and "from" in turn:
        role = turn["from"]
        return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": turn.get("value")}
    return {"role": turn.get("role"), "content": turn.get("content")}


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and _ANSWER in value


def _split(transcript: str) -> tuple[str, str]:
    """(up to the last '\\n\\nAssistant:', what follows it)."""
    end = transcript.rindex(_ANSWER) + len(_ANSWER)
    return transcript[:end], transcript[end:]
