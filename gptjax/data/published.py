"""Published dataset formats, converted to what data/chat.py reads: messages, or a prompt and responses.

Supported are TRL's conversational and implicit-prompt formats; transcripts like those of Anthropic's HH (Bai et al.
2022), one text with "\\n\\nHuman:" and "\\n\\nAssistant:" turns; and ShareGPT's turns with "from" and "value".
"""

from __future__ import annotations

import re
from typing import Any

from gptjax.errors import InputError

_TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant", "human": "user", "gpt": "assistant"}
_ANSWER = "\n\nAssistant:"


def messages(value: Any) -> Any:
    """Messages {"role", "content"} of a list of turns or a transcript; anything else unchanged."""
    if _is_transcript(value):
        marks = list(_TURN.finditer(value))
        ends = [mark.start() for mark in marks[1:]] + [len(value)]
        return [
            {"role": _ROLES[mark[1]], "content": value[mark.end() : end].strip()}
            for mark, end in zip(marks, ends, strict=True)
        ]
    return [_message(turn) for turn in value] if isinstance(value, list | tuple) else value


def prompt(value: Any, kind: str, *, answered: bool = False) -> Any:
    """A prompt for Template.prompt of that kind. A transcript becomes messages, or stays text for 'plain'.

    answered: remove an assistant turn at the end; otherwise only an empty one is removed (a transcript's
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
    """The text of a response that is a list of one assistant message; anything else unchanged. InputError: other
    turns."""
    if not isinstance(value, list) or not value or not all(isinstance(turn, dict) for turn in value):
        return value
    turns = messages(value)
    roles = [turn["role"] for turn in turns]
    if roles != ["assistant"]:
        raise InputError(
            f"A response must be one turn of the assistant, but the turns are of {', '.join(map(str, roles))}: remove "
            "the prompt's turns, or those after the response."
        )
    return turns[0]["content"]


def preference(given: Any, chosen: Any, rejected: Any, kind: str) -> tuple[Any, Any, Any]:
    """(prompt, chosen response, rejected response). given: the row's own prompt, None if it has none.

    If chosen and rejected are conversations (message lists or transcripts), the turns that they share are the prompt
    (TRL's implicit prompt), whether or not the row also has one. InputError: they differ before their last turn, or
    there is no prompt.
    """
    if kind == "plain" and _is_transcript(chosen) and _is_transcript(rejected):
        (shared, better), (other, worse) = _split(chosen), _split(rejected)
        if shared != other:
            raise InputError(
                "The fields chosen and rejected differ before their last '\\n\\nAssistant:': they need the same prompt."
            )
        return shared, better, worse
    conversations = messages(chosen), messages(rejected)
    if all(isinstance(c, list) and c and all(isinstance(turn, dict) for turn in c) for c in conversations):
        shared = _shared(*(c[:-1] for c in conversations))
        rest = [c[len(shared) :] for c in conversations]
        if [len(r) for r in rest] != [1, 1]:
            raise InputError(
                f"The fields chosen and rejected differ from turn {len(shared) + 1} on: only their last turn, the "
                "assistant's, may differ."
            )
        if shared and isinstance(given, list | tuple) and prompt(given, kind) != shared:
            raise InputError(
                "The fields chosen and rejected begin with other turns than the prompt's: remove the prompt, or those "
                "turns."
            )
        if shared or given is not None:
            return shared or prompt(given, kind), response(rest[0]), response(rest[1])
    elif given is not None:
        return prompt(given, kind), response(chosen), response(rejected)
    raise InputError(
        "There is no field 'prompt', and the fields chosen and rejected are not conversations that begin with it "
        "(message lists, or transcripts of '\\n\\nHuman:' and '\\n\\nAssistant:' turns). Name the field of the prompt "
        "with --config.data.fields.prompt=NAME."
    )


def _shared(a: list, b: list) -> list:
    """The common prefix of two lists of turns."""
    count = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:count]


def _message(turn: Any) -> Any:
    """{"role", "content"} of a turn with these or ShareGPT's keys; other keys are removed."""
    if not isinstance(turn, dict):
        return turn
    if "role" not in turn and "from" in turn:
        role = turn["from"]
        return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": turn.get("value")}
    return {"role": turn.get("role"), "content": turn.get("content")}


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:") and _ANSWER in value


def _split(transcript: str) -> tuple[str, str]:
    """(the text up to and with the last '\\n\\nAssistant:', the text after it)."""
    end = transcript.rindex(_ANSWER) + len(_ANSWER)
    return transcript[:end], transcript[end:]
