"""De-tokenizers: natural text of corpora that are published in tokens ('red @-@ tipped', "do n't", '-LRB-'), and back.

A GPT models text as people write it, so it is measured on a corpus without the marks of another tokenizer; the
perplexity is still that of the corpus, exp(-log p / its own units), if no two corpora have the same text (GPT-2,
section 3.1, "invertible de-tokenizers"; OpenAI's are not published). Here that is so of any string x:

    tokenize(detokenize(x, corpus), corpus) == x

How: a word of the text is made of one or more tokens, and what `split` makes of a word depends on nothing but that
word. Tokens are joined only where `split` gives the same ones back. What cannot be inverted that way is left as it was,
marked by spaces that no text has otherwise: a token that would be split into others ('approx.' -> 'approx', '.') comes
after two spaces instead of one, and a line that is not tokens with one space between them begins with two. Everything
else about the rules (which quote opens, what is an abbreviation) only changes how natural the text is.

What is not made natural: <unk>; the period of a sentence that ends in an abbreviation or a single letter, which keeps
its space ('Structures Ltd .'); quotations that are nested or go on in the next line; casing.
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

APOSTROPHE = "'"  # opens and closes quotations, and marks possessives and what is left out


@dataclasses.dataclass(frozen=True, eq=False)  # compared and hashed by identity, for the cache of `split`
class Corpus:
    """The tokens of a corpus. `inner`: (text, token, where it is found in a word); `opening`, `closing`: text -> token
    at the two ends of a word; `whole`: text -> token of words; `cuts`: places in a word, of no width, where a token
    ends; `abbreviations`: words whose period belongs to them; `margins`: every line has a space before and after it."""

    inner: tuple[tuple[str, str, str], ...] = ()
    opening: Mapping[str, str] = dataclasses.field(default_factory=dict)
    closing: Mapping[str, str] = dataclasses.field(default_factory=dict)
    whole: Mapping[str, str] = dataclasses.field(default_factory=dict)
    cuts: str = "(?!)"
    abbreviations: frozenset[str] = frozenset()
    margins: bool = False

    @functools.cached_property
    def text_of(self) -> dict[str, str]:
        """Token -> text, of the tokens that differ from it."""
        pairs = [(token, text) for text, token, _ in self.inner]
        pairs += [(token, text) for ends in (self.opening, self.closing, self.whole) for text, token in ends.items()]
        return dict(pairs)

    @functools.cached_property
    def inner_tokens(self) -> frozenset[str]:
        return frozenset(token for _, token, _ in self.inner)

    def join(self, tokens: Sequence[str]) -> str:
        return "".join(self.text_of.get(token, token) for token in tokens)

    def ends(self, piece: str, opening: Mapping[str, str]) -> list[str]:
        """A piece with what opens and closes it as tokens of their own."""
        if piece in self.inner_tokens:
            return [piece]
        before, after = [], []
        while len(piece) > 1 and piece[0] in opening:
            before.append(opening[piece[0]])
            piece = piece[1:]
        while len(piece) > 1:
            if "." in self.closing and re.search(r"[^.]\.\.\.$", piece):
                end = "..."
            elif piece[-1] in self.closing and not self._keeps_period(piece):
                end = piece[-1]
            else:
                break
            after.insert(0, self.closing.get(end, end))
            piece = piece.removesuffix(end)
        alone = self.whole.get(piece) or self.closing.get(piece) or self.opening.get(piece, piece)
        return [*before, alone, *after]

    def _keeps_period(self, piece: str) -> bool:
        stem = piece[:-1]
        single = len(stem) == 1 and stem.isalpha()
        return piece[-1] == "." and (single or "." in stem or stem in self.abbreviations)

    def gaps(self, tokens: Sequence[str]) -> list[bool]:
        """Whether there is no space between token i and i + 1."""
        either = set(self.opening.values()) & set(self.closing.values())
        closing = set().union(*(self._closing_places(tokens, mark) for mark in either))

        def opens(i):
            return tokens[i] in self.opening.values() and i not in closing

        def closes(i):
            return tokens[i] in self.closing.values() and (tokens[i] not in either or i in closing)

        def joined(i):
            pair = (tokens[i], tokens[i + 1])
            if self.inner_tokens & set(pair):
                return True
            return opens(i) or closes(i + 1) or (not either & set(pair) and self._restored(pair))

        return [joined(i) for i in range(len(tokens) - 1)]

    def _closing_places(self, tokens: Sequence[str], mark: str) -> set[int]:
        """Where a mark that also opens closes: every second one, and an apostrophe after an s (a possessive)."""
        places, within, found = [i for i, token in enumerate(tokens) if token == mark], False, set()
        for place in places:
            if within or (mark == APOSTROPHE and place and tokens[place - 1].endswith("s")):
                found.add(place)
                within = False
            else:  # the last one of a line opens nothing that ends: "the ' 70s"
                within = place != places[-1]
        return found

    def words(self, tokens: Sequence[str]):
        """The words of a line: tokens that are joined where `split` restores them; (text, whether it is verbatim)."""
        groups, gaps = [], self.gaps(tokens)
        for token, joined in zip(tokens, [False, *gaps], strict=False):
            groups[-1].append(token) if joined else groups.append([token])
        for group in groups:
            while group:
                size = next((n for n in range(len(group), 0, -1) if self._restored(group[:n])), 0)
                yield self.join(group[:size]) or group[0], not size
                group = group[size or 1 :]

    def _restored(self, tokens) -> bool:
        return split(self.join(tokens), self) == tuple(tokens)

    def frame(self, tokens: Sequence[str], last: bool) -> str:
        """A line of tokens; `last`: it is the text's last one, which a newline would end, and may be empty."""
        if not self.margins or (last and not tokens):
            return " ".join(tokens)
        return " " + "".join(token + " " for token in tokens)


@functools.lru_cache(maxsize=1 << 17)
def split(word: str, corpus: Corpus) -> tuple[str, ...]:
    """The tokens of a word of text (without spaces)."""
    for _, token, pattern in corpus.inner:
        word = re.sub(pattern, f" {token} ", word)
    tokens = []
    for part in word.split(" "):
        first, *clitics = re.sub(corpus.cuts, " ", part).split(" ")
        tokens += corpus.ends(first, corpus.opening)
        for clitic in clitics:  # "'s" opens no quotation
            tokens += corpus.ends(clitic, {})
    return tuple(filter(None, tokens))


def detokenize(text: str, corpus: Corpus) -> str:
    """Natural text of a corpus in tokens; `tokenize` inverts it."""
    return _by_line(_detokenize_line, text, corpus)


def _by_line(convert, text: str, corpus: Corpus) -> str:
    *lines, last = text.split("\n")
    return "\n".join([*(convert(line, corpus, False) for line in lines), convert(last, corpus, True)])


def _detokenize_line(line: str, corpus: Corpus, last: bool) -> str:
    tokens = [token for token in line.split(" ") if token]
    if corpus.frame(tokens, last) != line:
        return "  " + line
    return " ".join(" " * verbatim + word for word, verbatim in corpus.words(tokens))


def tokenize(text: str, corpus: Corpus) -> str:
    """The inverse of `detokenize`; any other text too is split into the corpus's tokens."""
    return _by_line(_tokenize_line, text, corpus)


def _tokenize_line(line: str, corpus: Corpus, last: bool) -> str:
    if line.startswith("  "):
        return line[2:]
    tokens, verbatim = [], False
    for word in line.split(" ") if line else []:
        if not word:
            verbatim = True
            continue
        tokens += [word] if verbatim else split(word, corpus)
        verbatim = False
    return corpus.frame(tokens, last)


# --- the corpora --------------------------------------------------------------------------------------------

_SAME = lambda characters: {c: c for c in characters}
_TITLES = frozenset(
    "Mr Mrs Ms Dr St Jr Sr Prof Rev Gen Gov Sen Rep Lt Col Capt Sgt Co Corp Inc Ltd Bros No Nos vs pp var".split()
)
_CLITICS = r"(?<=[\w>.])(?=(?:n't|'(?:s|re|ve|ll|d|m))(?!\w))"

# WikiText (Merity et al. 2017), in both versions: Moses' tokens with split hyphens; headings are ' = Title = '.
WIKITEXT = Corpus(
    inner=(
        ("-", "@-@", r"(?<=[^\s-])-(?=[^\s-])"), (",", "@,@", r"(?<=[\w>]),(?=[\w<])"),
        (".", "@.@", r"(?<=[\d>])\.(?=[\d<])"), ("/", "/", r"(?<=[^\s/])/(?=[^\s/])"), ("–", "–", r"(?<=\d)–(?=\d)"),
        ("—", "—", r"(?<=\S)—(?=\S)"), ("°", "°", r"(?<=\S)°(?=\S)"),
    ),
    opening=_SAME("([{\"'$£€"), closing=_SAME(")]}\"',;:!?.%°"), cuts=r"(?<=[\w>.])(?='\w)|(?<==)(?==)",
    abbreviations=_TITLES, margins=True,
)  # fmt: skip

# Penn Treebank as Mikolov prepared it: lower case, no punctuation, N for numbers (here 1), <unk>.
PTB = Corpus(opening=_SAME("$#"), closing=_SAME("%'"), whole={"1": "N"}, cuts=_CLITICS, margins=True)

# LAMBADA as its authors published it (Paperno et al. 2016), lower case. OpenAI's own file of it is natural text.
LAMBADA = Corpus(
    opening={'"': "``", "(": "(", "[": "["}, closing={'"': "''", **_SAME(")],;:!?.'")}, cuts=_CLITICS,
    abbreviations=frozenset(word.lower() for word in _TITLES - {"No", "Gen", "Col", "Co", "Rep"}),
)  # fmt: skip

# One Billion Word Benchmark (Chelba et al. 2014): straight quotes for both ends.
ONE_BILLION_WORD = Corpus(
    opening=_SAME('(["$'), closing=_SAME(")]\",;:!?.%'"), cuts=_CLITICS, abbreviations=_TITLES
)  # fmt: skip

# Children's Book Test (Hill et al. 2016). XXXXX, the word to be found, is a token as any.
CBT = Corpus(
    opening={"(": "-LRB-", "[": "-LSB-", "{": "-LCB-", '"': "``"},
    closing={")": "-RRB-", "]": "-RSB-", "}": "-RCB-", '"': "''", **_SAME(",;:!?.'")}, cuts=_CLITICS,
    abbreviations=_TITLES - {"No"},
)  # fmt: skip

# By name, for task files. text8 and enwik8 are not tokenized: they are scored as they are, in bits per byte.
wikitext, ptb, lambada, one_billion_word, cbt = (
    functools.partial(detokenize, corpus=corpus) for corpus in (WIKITEXT, PTB, LAMBADA, ONE_BILLION_WORD, CBT)
)


# --- units: what a corpus's perplexity is counted in, always of the original -----------------------------------


def words(text: str) -> int:
    """Tokens between white space."""
    return len(text.split())


def words_and_line_ends(text: str) -> int:
    """The tokens and an end of sentence for each line, which the perplexities of PTB, WikiText and 1BW count
    (Merity et al. 2017: WikiText-2's 217,646 validation tokens are 213,886 words and 3,760 lines)."""
    return words(text) + text.count("\n")


# --- lm-eval's protocol ---------------------------------------------------------------------------------------

_MARKS = ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), *((f" {c} ", f"{c} ") for c in ":;.!?,"))
_PAIRS = (r"\(\)", r"\[\]", r"{}", r"\"\"", "''")
_LAST = (
    ("= = = =", "===="), ("= = =", "==="), ("= =", "=="), (" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "),
    (" 's", "'s"),
)  # fmt: skip


def lm_eval_wikitext(page: str) -> str:
    """What lm-eval's task `wikitext` scores of a page (lm-eval 0.4.13, wikitext_detokenizer, which is Megatron-LM's):
    for comparison with its figures. It is not invertible: "s '" and "s'" become one, and so do headings of levels."""
    page = page.replace("s '", "s'")
    for mark, text in _MARKS:
        page = page.replace(mark, text)
    for pair in _PAIRS:
        left, right = re.findall(r"\\?.", pair)
        page = re.sub(rf"{left}\s*([^{right}]*?)\s*{right}", _within(left, right), page)
    for mark, text in _LAST:
        page = page.replace(mark, text)
    return page


def _within(left: str, right: str):
    return lambda match: left[-1] + match[1] + right[-1]


def lm_eval_words(page: str) -> int:
    """The words that lm-eval divides by: pieces between white space, of the original page, the empty ones before the
    first and after the last word among them, so that a page has up to two more than `words`."""
    return len(re.split(r"\s+", page))
