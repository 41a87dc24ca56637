"""Beam search finds what transformers finds, with transformers' penalty: the length to a power. Offline."""

import os

import numpy as np
import pytest
from numerics import approx, model_terms
from test_huggingface import random_params

from gptjax.generation.beam import beam_search
from gptjax.interop import huggingface
from gptjax.model.spec import GPTConfig

os.environ["HF_HUB_OFFLINE"] = "1"
NEEDS = "needs torch and transformers: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=NEEDS)
transformers = pytest.importorskip("transformers", reason=NEEDS)

CONFIG = GPTConfig(23, 2, 2, 16, 40, tied_head=False, attention="cpu")
ENDS = (5, 7)
PROMPTS = np.random.default_rng(0).integers(0, 23, (8, 6))
NEW = 9


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same weights here and there."""
    params = random_params(CONFIG)
    params = {**params, "lm_head": 2 * params["lm_head"]}
    folder = tmp_path_factory.mktemp("model")
    huggingface.write(folder, CONFIG, params)
    return params, transformers.GPT2LMHeadModel.from_pretrained(folder).eval()


@pytest.mark.parametrize("width", [4, 3])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0, 2.0])
def test_transformers_beam_search(models, width, alpha):
    """early_stopping=True is the rule of both: a row ends when `width` continuations have."""
    params, model = models
    found = beam_search(
        params, CONFIG, PROMPTS.tolist(), max_new_tokens=NEW, width=width, penalty=lambda n: n**alpha, eot_id=ENDS
    )
    for prompt, ours in zip(PROMPTS, found, strict=True):
        theirs = model.generate(
            torch.from_numpy(prompt)[None], max_new_tokens=NEW, num_beams=width, do_sample=False, length_penalty=alpha,
            early_stopping=True, eos_token_id=list(ENDS), pad_token_id=0, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        text = theirs.sequences[0, len(prompt) :].tolist()
        ends = [i for i, token in enumerate(text) if token in ENDS]
        assert ours.tokens == text[: ends[0] if ends else None]
        assert ours.score == approx(float(theirs.sequences_scores[0]), terms=NEW * model_terms(CONFIG))


def test_the_penalty_matters_here(models):
    params, _ = models
    texts = {
        str([h.tokens for h in beam_search(params, CONFIG, PROMPTS.tolist(), max_new_tokens=NEW, eot_id=ENDS,
                                           penalty=lambda n, alpha=alpha: n**alpha)])
        for alpha in (0.0, 0.6, 2.0)
    }  # fmt: skip
    assert len(texts) >= 2
