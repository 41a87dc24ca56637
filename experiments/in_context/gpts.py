"""The GPTs of the study: their sizes, and the pre-training of one."""

import dataclasses
from pathlib import Path
from typing import NamedTuple

from gptjax.config import config_dict
from gptjax.data.specials import END_OF_TEXT
from gptjax.data.tokenizer import Tokenizer
from gptjax.pretrain import PretrainConfig, pretrain
from gptjax.trained import Model, load_model

SIZES = {"1x16": (1, 1, 16), "2x16": (2, 1, 16), "2x32": (2, 2, 32), "2x64": (2, 2, 64)}  # layers, heads, width
BATCH = 32


class Corpus(NamedTuple):
    """What they learn. source: documents. context: tokens. steps: of BATCH contexts."""

    source: Path
    tokenizer: Tokenizer
    context: int
    steps: int


def size_config(corpus: Corpus, size: str, seed: int):
    c, folder = config_dict(PretrainConfig), corpus.source.parent
    n_layer, n_head, d_model = SIZES[size]
    c.model.update(n_layer=n_layer, n_head=n_head, d_model=d_model, context_length=corpus.context, dropout=0.0)
    c.model.unroll = n_layer
    c.data.update(source=str(corpus.source), validation="0.02", isolate_documents=True)
    c.data.update(tokenizer=str(folder / "tokenizer"), cache=str(folder / "tokens"))  # the same for all sizes
    c.steps, c.batch_size, c.seed = corpus.steps, BATCH, seed
    c.schedule.warmup_tokens = min(100.0, corpus.steps / 2) * c.batch_size * corpus.context
    c.optimizer.update(learning_rate=3e-3, b2=0.99, weight_decay=0.1)
    c.eval.every = c.checkpoint.every = max(corpus.steps // 4, 1)
    c.eval.batches = 8
    return c


def train(corpus: Corpus, size: str, seed: int, workdir: Path) -> Model:
    """A pre-trained GPT; the same call resumes an interrupted run. SystemExit: it was stopped."""
    after_end_of_text(corpus.tokenizer).save(corpus.source.parent / "tokenizer")
    if not pretrain(size_config(corpus, size, seed), str(workdir)).finished:
        raise SystemExit("stopped; the same command resumes from there")
    return load_model(workdir)


def after_end_of_text(tokenizer: Tokenizer) -> Tokenizer:
    """A tokenizer with which a prompt begins with end-of-text: as documents do in training, where what comes after an
    end-of-text is isolated from what came before it."""
    found = tokenizer.with_specials([END_OF_TEXT])
    found.specials = dataclasses.replace(found.specials, eos=END_OF_TEXT, bos=END_OF_TEXT, adds_bos=True)
    return found
