"""The template: how a prompt, a response or a conversation becomes tokens, the same way in every stage.

A turn of the user is `<|user|>` and its text, of the system `<|system|>` and its text, of the assistant
`<|assistant|>`, its text and end-of-text. Each text is tokenized by itself, so a prompt's tokens don't
depend on what follows; no text can hold a special token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gptjax.data.specials import ASSISTANT, END_OF_TEXT, PAD, SYSTEM, USER
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError

ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
KINDS = ("chat", "plain")
Messages = Sequence[dict]  # of {"role": "system", "user" or "assistant", "content": text}


def chat_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with end-of-text, padding and the template's special tokens; those it has keep their ids.

    An imported tokenizer's own end-of-text and padding are used, unless its padding is also another special token.
    """
    end = [END_OF_TEXT] if tokenizer.eot_id is None else []
    pad = [PAD] if tokenizer.pad_id is None else []
    return tokenizer.with_specials([*end, *pad, SYSTEM, USER, ASSISTANT])


class Template:
    """Text to token ids and back. kind: 'chat', or 'plain' for texts with nothing put around them.

    eos_id: ends every response; pad_id: never part of one; vocab_size, lossless, byte_lengths: the tokenizer's.
    InputError: another kind, or a tokenizer without the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, kind: str):
        if kind not in KINDS:
            raise InputError(f"template {kind!r} is unknown; there are {' and '.join(map(repr, KINDS))}")
        ids = {END_OF_TEXT: tokenizer.eot_id, PAD: tokenizer.pad_id}
        ids |= {name: tokenizer.special_id(name) for name in (ROLES.values() if kind == "chat" else ())}
        missing = [name for name, index in ids.items() if index is None]
        if missing:
            raise InputError(
                f"template {kind!r}: the tokenizer has no {', '.join(missing)}; take the one that chat_tokenizer "
                "makes of it"
            )
        self.kind = kind
        self.eos_id, self.pad_id = tokenizer.eot_id, tokenizer.pad_id
        self.vocab_size = tokenizer.vocab_size
        self.lossless, self.byte_lengths = tokenizer.lossless, tokenizer.byte_lengths
        if self.pad_id == self.eos_id:
            raise InputError(f"padding and end-of-text are one token, {self.eos_id}; give padding an id of its own")
        self._tokenizer = tokenizer
        self._mark = {role: tokenizer.special_id(name) for role, name in ROLES.items()}
        self._hidden_ids = {self.pad_id, *self._mark.values()}

    def prompt(self, prompt: str | Messages) -> list[int]:
        """Ids of all that comes before a response; of messages, the last is the user's.

        InputError: not text or messages; in 'chat' an empty text, in 'plain' messages.
        """
        if isinstance(prompt, str) and self.kind == "plain":
            return self._tokenizer.encode(prompt)
        if isinstance(prompt, str):
            ids = self._text(prompt, "the prompt")
            return [self._mark["user"], *ids, self._mark["assistant"]]
        if not isinstance(prompt, list | tuple):
            raise InputError(f"the prompt is {type(prompt).__name__}, not text or a list of messages; fix it")
        ids, _ = self._turns(prompt, last="user")
        return [*ids, self._mark["assistant"]]

    def response(self, text: str) -> list[int]:
        """Ids of a response, end-of-text the last. InputError: not text, or empty."""
        return [*self._text(text, "the response"), self.eos_id]

    def conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """(ids, is_response): each assistant turn's text and end-of-text are response, its mark isn't.

        A system turn may come first; then user and assistant alternate, the assistant last. InputError
        otherwise, with the turn's number from 1; also for 'plain', which has no marks to part turns by.
        """
        return self._turns(messages, last="assistant")

    def encodes(self, text: str) -> bool:
        """Whether a text has any tokens."""
        return bool(self._tokenizer.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end-of-text, without special tokens. InputError: an id outside the vocabulary."""
        text = []
        for i in map(int, ids):
            if i == self.eos_id:
                break
            if i not in self._hidden_ids:
                text.append(i)
        return self._tokenizer.decode(text)

    def _turns(self, messages: Any, last: str) -> tuple[list[int], list[bool]]:
        if self.kind == "plain":
            raise InputError(
                "template 'plain' takes no messages; take the template 'chat', or give each prompt as text"
            )
        if not isinstance(messages, list | tuple):
            raise InputError(f"the messages are {type(messages).__name__}, not a list; fix them")
        ids, is_response = [], []
        expected = "user"
        for number, message in enumerate(messages, 1):
            role, text = _role_and_text(message, number)
            if role != expected and not (role == "system" and number == 1):
                raise InputError(
                    f"turn {number} is the {role}'s where the {expected}'s should be; a system turn may come "
                    "first, then user and assistant alternate"
                )
            turn = self._text(text, f"turn {number} ({role})")
            if role == "assistant":
                turn.append(self.eos_id)
            ids += [self._mark[role], *turn]
            is_response += [False, *[role == "assistant"] * len(turn)]
            if role != "system":
                expected = "assistant" if role == "user" else "user"
        if not messages or role != last:
            end = f"turn {len(messages)} is the {role}'s" if messages else "there are no messages"
            raise InputError(f"{end}; the last turn must be the {last}'s")
        return ids, is_response

    def _text(self, text: Any, what: str) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"{what} is {type(text).__name__}, not text; fix it")
        ids = self._tokenizer.encode(text)
        if not ids:
            raise InputError(f"{what} is empty; give it some text or leave it out")
        return ids


def _role_and_text(message: Any, number: int) -> tuple[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"turn {number} is {type(message).__name__}, not an object with 'role' and 'content'")
    for name in ("role", "content"):
        if message.get(name) is None:
            raise InputError(f"turn {number} has no {name!r}; a turn is {{'role': ..., 'content': ...}}")
    if message["role"] not in list(ROLES):  # a list: the role may be anything, even unhashable
        raise InputError(f"turn {number} has the unknown role {message['role']!r}; the roles are {', '.join(ROLES)}")
    return message["role"], message["content"]
