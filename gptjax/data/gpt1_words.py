"""GPT-1's text normalization and word splitting, which precede its BPE.

Source: openai/finetune-transformer-lm text_utils.py.
"""

import functools
import re
from typing import Any

from gptjax.errors import InputError


def gpt1_words(text: str) -> list[str]:
    """The words of a text: ftfy, spaces around punctuation, spaCy's English rules, lower case. InputError: no spaCy."""
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
    """spaCy's rule-based English tokenizer, which needs no model download."""
    try:
        import spacy
    except ImportError:
        raise InputError("GPT-1's tokenizer needs spaCy: run `pip install spacy`.") from None
    return spacy.blank("en").tokenizer
