"""FineWeb's rules (Penedo et al. 2024) on extracted text, in their order; needs the extra `curate`.

    python -m gptjax.curate --config=configs/curate/fineweb.py --workdir=runs/curated --config.input='crawl/*.jsonl.gz'

Language (py3langid in place of fastText's model, which is a download), Gopher's repetition and quality, C4's without
its rule of terminal punctuation, FineWeb's own, MinHash of 14 x 8, personal data. Ours: exact deduplication before
MinHash, which only nominates; more kinds of personal data than addresses. `:spacy` counts words as datatrove
does, with spaCy.
"""

from gptjax.config import choose, config_dict
from gptjax.curation import tokens
from gptjax.curation.config import CurateConfig
from gptjax.curation.exact import Exact
from gptjax.curation.fuzzy import Fuzzy
from gptjax.curation.gopher import GopherQuality, GopherRepetition
from gptjax.curation.language import Language
from gptjax.curation.minhash import FINEWEB
from gptjax.curation.personal import Personal
from gptjax.curation.web_rules import C4, FineWeb

PRESETS = {"curate": ["fast", "spacy"]}

TOKENS = {
    "fast": (tokens.split_words, tokens.count_sentences),
    "spacy": (tokens.spacy_words, tokens.spacy_sentences),
}


def get_config(arg="fast"):
    choose(TOKENS, arg, "way to count words")
    return config_dict(CurateConfig)


def get_steps(config, arg="fast"):
    words, sentences = TOKENS[arg]
    rules = [GopherRepetition(words), GopherQuality(words), C4(sentences, terminal=False), FineWeb(words)]
    return [Language(), *rules, Exact(), Fuzzy(FINEWEB), Personal()]
