"""De-tokenizers: any string comes back, text comes out natural, and perplexity is counted in the original's units."""

import math
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptjax.tasks import detokenize as d
from gptjax.tasks.detokenize import CBT, LAMBADA, ONE_BILLION_WORD, PTB, WIKITEXT, detokenize, tokenize

CORPORA = {"wikitext": WIKITEXT, "ptb": PTB, "lambada": LAMBADA, "1bw": ONE_BILLION_WORD, "cbt": CBT}
corpora = pytest.mark.parametrize("corpus", CORPORA.values(), ids=CORPORA)

GOLDEN = [
    (WIKITEXT, " = Homarus gammarus = \n", "= Homarus gammarus =\n"),
    (WIKITEXT, " = = = Early life = = = ", "=== Early life ==="),
    (WIKITEXT, ' only becoming " lobster red " on cooking . ', 'only becoming "lobster red" on cooking.'),
    (WIKITEXT, " red @-@ tipped ( 0 @.@ 7 – 2 @.@ 2 kg ) of 1 @,@ 234 ; ", "red-tipped (0.7–2.2 kg) of 1,234;"),
    (WIKITEXT, " H. americanus and the U.S. , at 79 % : ", "H. americanus and the U.S., at 79%:"),
    (WIKITEXT, " don 't , Blythe 's . Amos ' land in the ' 70s ", "don't, Blythe's. Amos' land in the '70s"),
    (WIKITEXT, " $ 25 @,@ <unk> ... , <unk> 's , and 5 ° C ", "$25,<unk>..., <unk>'s, and 5°C"),
    (PTB, " mr. vinken 's stake was n't $ N million or N % of the traders ' <unk> \n",
     "mr. vinken's stake wasn't $1 million or 1% of the traders' <unk>\n"),
    (LAMBADA, "`` no , '' he said , `` i do n't . '' mr. smith 's dog", '"no," he said, "i don\'t." mr. smith\'s dog'),
    (ONE_BILLION_WORD, 'He said : " We ca n\'t pay $ 5 ( or 10 % ) . " -- Mr. Obama',
     'He said: "We can\'t pay $5 (or 10%)." -- Mr. Obama'),
    (CBT, "`` I 'll go , '' said the XXXXX -LRB- a king -RRB- ; `` do n't ! ''",
     '"I\'ll go," said the XXXXX (a king); "don\'t!"'),
]  # fmt: skip


@pytest.mark.parametrize("corpus, tokens, text", GOLDEN)
def test_text_is_natural_and_comes_back(corpus, tokens, text):
    assert detokenize(tokens, corpus) == text
    assert tokenize(text, corpus) == tokens


def test_what_no_rule_restores_is_marked_by_a_second_space():
    for tokens, text in {
        "a approx. b": "a  approx. b", "(x y": " (x y", "a @-@": "a @-@", "the Ltd .": "the Ltd .", "": "",
        "two  spaces": "  two  spaces", " at the edge": "   at the edge", "\n\n": "\n\n", "x\n": "x\n",
    }.items():  # fmt: skip
        assert detokenize(tokens, ONE_BILLION_WORD) == text
        assert tokenize(text, ONE_BILLION_WORD) == tokens
    assert detokenize(" a-b @,@ \n\n \n", WIKITEXT) == " a-b  @,@\n  \n\n"  # an empty line without its space


TOKENS = [
    *"a b I 5 N 1 s . , ; : ! ? ( ) [ ] ' \" ` `` '' - -- ... = / – — ° $ # % n't 's 'll @-@ @,@ @.@ <unk>".split(),
    *"-LRB- -RRB- U.S. No. Mr mr. a.b (x x) \"x x' don't ca 1990s 0.7 2,000 x-y == \t \r é \u00a0 \u2028".split(" "),
]
token_lines = st.lists(st.sampled_from(TOKENS), max_size=9).map(" ".join)
token_texts = st.lists(token_lines | token_lines.map(lambda line: f" {line} "), max_size=4).map("\n".join)


@corpora
@settings(max_examples=100, deadline=None)
@given(text=token_texts | st.text(alphabet=" \n\t.,'\"`@-=<>aN1$%°–é", max_size=30) | st.text(max_size=12))
@example(text=" ")
@example(text=" \n ")
@example(text="   x")
def test_any_string_comes_back(corpus, text):
    assert tokenize(detokenize(text, corpus), corpus) == text


@corpora
def test_different_texts_stay_different(corpus):
    """All lines of up to three of some tokens, by themselves: as many texts as lines."""
    some = ["a", ".", '"', "''", "``", "'s", "@-@", "-", "(", "-LRB-", "1", "N", "x.", ""]
    lines = {f"{a} {b} {c}" for a in some for b in some for c in some}
    assert len({detokenize(line, corpus) for line in lines}) == len(lines)


def test_units_are_those_of_the_original():
    text = " = A = \n \n The red @-@ tipped <unk> . \n"
    assert d.words(text) == 9
    assert d.words_and_line_ends(text) == 12
    # a uniform model over 256 bytes of the text, per word of the original
    nats = len(detokenize(text, WIKITEXT).encode()) * math.log(256)
    assert math.exp(nats / d.words(text)) == pytest.approx(256 ** (29 / 9), rel=1e-12)


# --- lm-eval's ------------------------------------------------------------------------------------------------

PAGE = (
    " \n = A N = \n\n = = B 's = = \n Boys ' 5 @-@ 6 ° ( [ x ] , y ) ; said : \" no ! \" ' z ' { q } of N 's "
    "1 @,@ 000 . \n"
)
EXPECTED = '\n= A 1 =\n\n== B\'s ==\nBoys\' 5-6°([x], y); said: "no!" \'z\' {q} of 1\'s 1,000.\n'


def test_lm_evals_protocol():
    """The expected text is what wikitext_detokenizer of lm-eval 0.4.13 returned for it."""
    assert d.lm_eval_wikitext(PAGE) == EXPECTED
    assert d.lm_eval_words(PAGE) == len(PAGE.split()) + 2  # the empty strings at both ends
    assert d.lm_eval_words("one two") == 2
    assert re.split(r"\s+", " a ") == ["", "a", ""]


def test_lm_evals_own_function_says_the_same():
    theirs = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext", reason="needs lm-eval")
    assert d.lm_eval_wikitext(PAGE) == theirs.wikitext_detokenizer({"page": PAGE})


def test_wikitext2(shared_data):
    """The counts of Merity et al. 2017; three tokens of all of it need a mark."""
    tokens = (shared_data / "lm/wikitext2/valid.txt").read_bytes().decode()
    assert d.words(tokens) == 213_886 and d.words_and_line_ends(tokens) == 217_646
    start = tokens[: tokens.index("\n", 200_000) + 1]
    text = detokenize(start, WIKITEXT)
    assert tokenize(text, WIKITEXT) == start
    assert text.count("  ") == 3
