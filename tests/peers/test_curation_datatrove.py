"""Our rules of quality against datatrove's filters, on the same documents: the same ones go, for the same reason."""

import random

import pytest

from gptjax.curation import gopher, web_rules
from gptjax.curation.documents import Document, Drop
from gptjax.curation.punctuation import PUNCTUATION, TERMINAL
from gptjax.curation.tokens import spacy_sentences, spacy_words
from gptjax.data import sources

pytest.importorskip("datatrove", reason="needs datatrove, a peer")

from datatrove.data import Document as Theirs  # noqa: E402
from datatrove.pipeline.filters import (  # noqa: E402
    C4ParagraphFilter,
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.utils import text as their_text  # noqa: E402

REASONS = {  # theirs: ours
    "gopher_short_doc": "few_words", "gopher_long_doc": "many_words", "gopher_below_avg_threshold": "short_words",
    "gopher_above_avg_threshold": "long_words", "gopher_too_many_hashes": "hashes",
    "gopher_too_many_ellipsis": "ellipses", "gopher_too_many_bullets": "bullets",
    "gopher_too_many_end_ellipsis": "unfinished_lines", "gopher_below_alpha_threshold": "alphabetic",
    "gopher_enough_stop_words": "stop_words", "dup_para_frac": "paragraphs",
    "dup_para_char_frac": "paragraph_characters", "dup_line_frac": "lines", "dup_line_char_frac": "line_characters",
    "lorem_ipsum": "lorem_ipsum", "curly_bracket": "curly_bracket", "too_few_sentences": "few_sentences",
    "< 3 paragraphs": "few_long_lines", "line_punct_ratio": "lines_without_end", "short_line_ratio": "short_lines",
    "char_dup_ratio": "repeated_lines", "list_ratio": "line_breaks", "empty": "empty",
} | {f"top_{n}_gram": f"top_{n}_gram" for n in (2, 3, 4)} | {
    f"duplicated_{n}_n_grams": f"repeated_{n}_grams" for n in range(5, 11)
}  # fmt: skip


def distorted(rng, text):
    """A text with what the rules look for."""
    lines = text.splitlines() or [text]
    kind = rng.randrange(10)
    if kind == 0:
        lines = [f"• {line}" for line in lines]
    elif kind == 1:
        lines = [f"{line.rstrip()}..." for line in lines]
    elif kind == 2:
        lines = lines + lines[: len(lines) // rng.choice((2, 4, 50))]
    elif kind == 3:
        lines = [" # ".join(line.split()) for line in lines]
    elif kind == 4:
        lines = ["Lorem ipsum dolor"] * rng.randrange(2) + [f"{line.strip().capitalize()}." for line in lines]
    elif kind == 5:
        lines = [line.replace("e", "").replace("a", "") for line in lines]
    elif kind == 6:
        lines = [" ".join(line.split() * 3) for line in lines]
    elif kind == 7:
        lines = [f"{line} We use cookies. {line}?" for line in lines]
    elif kind == 8:
        lines = [" ".join(lines).replace("{", "(")] * rng.choice((1, 1, 3))
    return "\n".join(lines)


@pytest.fixture(scope="module")
def texts():
    rng = random.Random(0)
    found = [d.text for d in sources.documents("stdlib")]
    found = [text[start : start + rng.choice((300, 2_000, 8_000))] for text in rng.sample(found, 250)
             for start in [rng.randrange(max(len(text) - 4_000, 1))]]  # fmt: skip
    return [text for text in found if text.strip()] + [distorted(rng, t) for t in found * 2 if t.strip()]


PAIRS = [
    (gopher.GopherQuality, GopherQualityFilter, "words"), (gopher.GopherRepetition, GopherRepetitionFilter, "words"),
    (web_rules.C4, C4QualityFilter, "sentences"), (web_rules.MC4Paragraphs, C4ParagraphFilter, None),
    (web_rules.FineWeb, FineWebQualityFilter, "words"),
]  # fmt: skip


@pytest.mark.parametrize("ours, theirs, tokens", PAIRS, ids=lambda value: getattr(value, "__name__", None))
def test_the_same_documents_go_for_the_same_reason(texts, ours, theirs, tokens):
    exact = ours(**({} if tokens is None else {tokens: spacy_words if tokens == "words" else spacy_sentences}))
    fast, filter_, agree, reasons = ours(), theirs(), 0, set()
    for text in texts:
        document = Theirs(text=text, id="x")
        result = filter_.filter(document)
        expected = None if result is True else REASONS[result[1]]
        found = exact(Document("x", text))
        assert (found.reason if isinstance(found, Drop) else None) == expected, text
        if expected is None:
            assert found.text == document.text
        reasons.add(expected)
        agree += isinstance(fast(Document("x", text)), Drop) == (expected is not None)
    print(f"{ours.__name__}: {len(reasons)} outcomes; without spaCy {agree / len(texts):.4f} agree")
    assert len(reasons) > 1 and agree >= 0.9 * len(texts)  # most of these are code, where words are least clear


def test_punctuation():
    assert TERMINAL == their_text.TERMINAL_PUNCTUATION and PUNCTUATION == their_text.PUNCTUATION_SET
