"""What the tests of rows share: a file of them, and a template whose tokens are letters."""

import functools
import json

from gptjax.data.bpe import character_tokenizer
from gptjax.data.chat import Template, chat_tokenizer


@functools.cache
def template(kind="chat") -> Template:
    return Template(chat_tokenizer(character_tokenizer(["abcdefghijklmnopqrstuvwxyz 0123456789"])), kind)


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
