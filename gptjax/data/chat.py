"""The template: encodes prompts, responses and conversations, in the same way in every stage.

A user turn is `<|user|>` and its text, a system turn `<|system|>` and its text, an assistant turn `<|assistant|>`, its
text and end-of-text. Each text is tokenized separately, so the tokens of a prompt do not depend on what follows, and no
text can contain a special token.
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
    """The tokenizer with end-of-text, padding and the template's special tokens; existing ones keep their ids.

    An imported tokenizer keeps its own end-of-text and padding tokens, unless its padding token has another role too.
    """
    end = [END_OF_TEXT] if tokenizer.eot_id is None else []
    pad = [PAD] if tokenizer.pad_id is None else []
    return tokenizer.with_specials([*end, *pad, SYSTEM, USER, ASSISTANT])


class Template:
    """Text to token ids and back. kind: 'chat', or 'plain' for texts without role tokens.

    eos_id: ends every response; pad_id: never part of one; vocab_size, lossless, byte_lengths: of the tokenizer.
    InputError: another kind, or a tokenizer without the special tokens.
    """

    def __init__(self, tokenizer: Tokenizer, kind: str):
        if kind not in KINDS:
            raise InputError(f"The template {kind!r} is unknown: use {' or '.join(map(repr, KINDS))}.")
        ids = {END_OF_TEXT: tokenizer.eot_id, PAD: tokenizer.pad_id}
        ids |= {name: tokenizer.special_id(name) for name in (ROLES.values() if kind == "chat" else ())}
        missing = [name for name, index in ids.items() if index is None]
        if missing:
            raise InputError(
                f"The tokenizer has no {', '.join(missing)}, which the template {kind!r} needs: add them with "
                "chat_tokenizer."
            )
        self.kind = kind
        self.eos_id, self.pad_id = tokenizer.eot_id, tokenizer.pad_id
        self.vocab_size = tokenizer.vocab_size
        self.lossless, self.byte_lengths = tokenizer.lossless, tokenizer.byte_lengths
        if self.pad_id == self.eos_id:
            raise InputError(f"Padding and end-of-text are the same token, {self.eos_id}: give padding its own id.")
        self._tokenizer = tokenizer
        self._role_id = {role: tokenizer.special_id(name) for role, name in ROLES.items()}
        self._hidden_ids = {self.pad_id, *self._role_id.values()}

    def prompt(self, prompt: str | Messages) -> list[int]:
        """Ids of everything before a response. The last of messages is the user's.

        InputError: neither text nor messages; for 'chat' an empty text, for 'plain' messages.
        """
        if isinstance(prompt, str) and self.kind == "plain":
            return self._tokenizer.encode(prompt)
        if isinstance(prompt, str):
            ids = self._text(prompt, "The prompt")
            return [self._role_id["user"], *ids, self._role_id["assistant"]]
        if not isinstance(prompt, list | tuple):
            raise InputError(f"The prompt is {type(prompt).__name__}, not text or a list of messages: fix it.")
        ids, _ = self._turns(prompt, last="user")
        return [*ids, self._role_id["assistant"]]

    def response(self, text: str) -> list[int]:
        """Ids of a response, ending with end-of-text. InputError: not text, or empty."""
        return [*self._text(text, "The response"), self.eos_id]

    def conversation(self, messages: Messages) -> tuple[list[int], list[bool]]:
        """(ids, is_response): the text and end-of-text of assistant turns are response, their role token is not.

        A system turn may come first; then user and assistant alternate, and the assistant is last. InputError
        otherwise, with the number of the turn, from 1; also for 'plain', which has no role tokens to separate turns.
        """
        return self._turns(messages, last="assistant")

    def encodes(self, text: str) -> bool:
        """Whether a text has any tokens."""
        return bool(self._tokenizer.encode(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text up to the first end-of-text, without role and padding tokens. InputError: an id out of range."""
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
                "The template 'plain' does not accept messages: use the template 'chat', or give each prompt as text."
            )
        if not isinstance(messages, list | tuple):
            raise InputError(f"The messages are {type(messages).__name__}, not a list: fix them.")
        ids, is_response = [], []
        expected = "user"
        for number, message in enumerate(messages, 1):
            role, text = _role_and_text(message, number)
            if role != expected and not (role == "system" and number == 1):
                raise InputError(
                    f"Turn {number} is the {role}'s but should be the {expected}'s: a system turn may come first, then "
                    "user and assistant alternate."
                )
            turn = self._text(text, f"Turn {number} ({role})")
            if role == "assistant":
                turn.append(self.eos_id)
            ids += [self._role_id[role], *turn]
            is_response += [False, *[role == "assistant"] * len(turn)]
            if role != "system":
                expected = "assistant" if role == "user" else "user"
        if not messages or role != last:
            end = f"Turn {len(messages)} is the {role}'s" if messages else "There are no messages"
            raise InputError(f"{end}, but the last turn must be the {last}'s: fix the messages.")
        return ids, is_response

    def _text(self, text: Any, what: str) -> list[int]:
        if not isinstance(text, str):
            raise InputError(f"{what} is {type(text).__name__}, not text: fix it.")
        ids = self._tokenizer.encode(text)
        if not ids:
            raise InputError(f"{what} is empty: give it some text, or remove it.")
        return ids


def _role_and_text(message: Any, number: int) -> tuple[str, Any]:
    if not isinstance(message, dict):
        raise InputError(f"Turn {number} is {type(message).__name__}: give an object with 'role' and 'content'.")
    for name in ("role", "content"):
        if message.get(name) is None:
            raise InputError(f"Turn {number} has no {name!r}: a turn is {{'role': ..., 'content': ...}}.")
    if message["role"] not in list(ROLES):  # a list, because the role may be unhashable
        raise InputError(f"Turn {number} has the unknown role {message['role']!r}: use one of {', '.join(ROLES)}.")
    return message["role"], message["content"]
