"""GPT-1's words: what its vocabulary was made from and is applied to.

Source: openai/finetune-transformer-lm text_utils.py.
"""

import functools
import re
from typing import Any

from gptjax.errors import InputError


def gpt1_words(text: str) -> list[str]:
    """GPT-1's text preparation: ftfy, punctuation spaced out, spaCy's English word rules, lower case."""
    import ftfy

    text = ftfy.fix_text(text)
    for old, new in (("—", "-"), ("–", "-"), ("―", "-"), ("…", "..."), ("´", "'")):
        text = text.replace(old, new)
    text = re.sub(r"""(-+|~+|!+|"+|;+|\?+|\++|,+|\)+|\(+|\\+|\/+|\*+|\[+|\]+|}+|{+|\|+|_+)""", r" \1 ", text)
    text = re.sub(r"\s*\n\s*", " \n ", text)
    text = re.sub(r"[^\S\n]+", " ", text).strip()
    words = (token.text.lower() for token in _spacy_english()(text))
    return ["\n" if "\n" in word and word.isspace() else word for word in words]


@functools.cache
def _spacy_english() -> Any:
    """spaCy's English rule tokenizer; it needs no model download."""
    try:
        import spacy
    except ImportError:
        raise InputError("GPT-1's tokenizer needs spaCy's word rules; run `pip install spacy`") from None
    return spacy.blank("en").tokenizer
