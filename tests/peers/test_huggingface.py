"""transformers and gptjax compute the same logits and the same text from the same files, both ways.

Runs in an environment of its own (requirements-peers.txt), offline.
"""

import dataclasses
import functools
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close, model_terms
from tokenizer_files import END, ROLES, write_legacy

from gptjax import convert
from gptjax.data.bpe import character_tokenizer, load_gpt1, make_tokenizer, train_bpe
from gptjax.data.chat import Template, chat_tokenizer
from gptjax.generation.sampling import Sampling
from gptjax.interop import huggingface
from gptjax.interop.hf_tokenizer import read_token_ids
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.rlhf.reward_model import score_at_end
from gptjax.sample import continue_texts
from gptjax.trained import load_model

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported
NEEDS = "needs torch and transformers: pip install -r requirements-peers.txt"
torch = pytest.importorskip("torch", reason=NEEDS)
transformers = pytest.importorskip("transformers", reason=NEEDS)

SHAPES = [  # vocabulary, layers, heads, width, context
    GPTConfig(61, 1, 1, 16, 9),
    GPTConfig(97, 3, 4, 32, 40),
    GPTConfig(50, 2, 3, 48, 130),  # head width 16, context neither a power of 2 nor below one block
]
VARIANTS = [("pre", True), ("pre", False), ("post", True), ("post", False)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda c: f"{c.n_layer}x{c.d_model}")
variants = pytest.mark.parametrize("norm, tied", VARIANTS, ids=lambda v: str(v))
MODELS = {
    "pre": (transformers.GPT2Config, transformers.GPT2LMHeadModel),
    "post": (transformers.OpenAIGPTConfig, transformers.OpenAIGPTLMHeadModel),
}


def tokens_for(config, time=None):
    time = time or config.context_length
    return np.random.default_rng(1).integers(0, config.vocab_size, (2, time))


def our_logits(config, params, tokens):
    with jax.default_matmul_precision("highest"):
        return np.asarray(gpt.logits(params, config, gpt.hidden(params, config, tokens)))


def their_logits(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.from_numpy(tokens)).logits.numpy()


def random_params(config, seed=0):
    """Every parameter random: gains about 1 +- .3, biases +- .3, matrices so that logits are of size 1."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: gpt.init(config, key), jax.random.key(0))

    def draw(path, x):
        name = path[-1].key
        std = {"scale": 0.3, "bias": 0.3, "kernel": x.shape[1] ** -0.5 if x.ndim > 1 else 0}.get(name, 0.3)
        return (rng.standard_normal(x.shape) * std + (name == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


@shapes
@variants
def test_weights_of_transformers_give_its_logits(tmp_path, shape, norm, tied):
    settings, model_class = MODELS[norm]
    torch.manual_seed(0)
    model = model_class(
        settings(
            vocab_size=shape.vocab_size, n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.d_model,
            n_positions=shape.context_length, tie_word_embeddings=tied,
        )
    )  # fmt: skip
    for name, parameter in model.named_parameters():
        gain = "ln_" in name and name.endswith("weight")
        std = shape.d_model**-0.5 if parameter.ndim == 2 else 0.3
        torch.nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=std)
    model.save_pretrained(tmp_path)
    config, params = huggingface.read(tmp_path)
    expected = dataclasses.replace(shape, norm=norm, tied_head=tied, dropout=0.1)
    assert config == expected
    tokens = tokens_for(config)
    ours, theirs = our_logits(config, params, tokens), their_logits(model, tokens)
    assert 0.3 < theirs.std() < 5  # or the tolerance would mean nothing
    assert_close(ours, theirs, terms=model_terms(config))


@shapes
@variants
def test_our_weights_give_our_logits_in_transformers(tmp_path, shape, norm, tied):
    config = dataclasses.replace(shape, norm=norm, tied_head=tied)
    params = random_params(config)
    huggingface.write(tmp_path / "a", config, params)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model) is MODELS[norm][1] and model.dtype == torch.float32
    tokens = tokens_for(config)
    ours, theirs = our_logits(config, params, tokens), their_logits(model, tokens)
    assert 0.3 < ours.std() < 5
    assert_close(ours, theirs, terms=model_terms(config))


def test_transformers_saves_an_export_in_shards_that_are_read_back(tmp_path):
    """More position rows than any input uses; bfloat16; shards as transformers itself cuts them."""
    config = GPTConfig(61, 2, 2, 32, context_length=300)
    huggingface.write(tmp_path / "a", config, random_params(config))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert (tmp_path / "b/model.safetensors.index.json").exists()
    found, params = huggingface.read(tmp_path / "b")
    assert found == config
    tokens = tokens_for(config, time=11)
    assert_close(our_logits(found, params, tokens), their_logits(model.float(), tokens), terms=model_terms(found))


# --- Text -------------------------------------------------------------------------------------------------

TEXT = [
    "def read(path):\n    return open(path).read()  # naïve, 12 lines\n\n\n",
    "The quick brown fox isn't lazy; it jumps   over 345 dogs — and a café.\n",
] * 4
PROMPT = "The fox jumps over"


def gpt1_like(tmp_path):
    """A vocabulary in GPT-1's files: characters, characters that end a word, two merges."""
    characters = sorted(set("".join(TEXT).lower()) - set(" \n"))
    tokens = ["<unk>", *characters, *(f"{c}</w>" for c in characters), "th", "the</w>"]
    (tmp_path / "encoder_bpe_40000.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (tmp_path / "vocab_40000.bpe").write_text("#version: 0.2\nt h\nth e</w>\n")
    return load_gpt1(tmp_path)


MAKE_TOKENIZER = {
    "bpe": lambda _: train_bpe(TEXT, 300),
    "char": lambda _: character_tokenizer(TEXT),
    "gpt1": gpt1_like,
}


def greedy(config, params, prompt, n_new, eot):
    """By full forwards over the whole row, padded to one shape; stops after end-of-text."""

    @functools.partial(jax.jit, static_argnums=2)
    def best(params, tokens, config):
        return gpt.logits(params, config, gpt.hidden(params, config, tokens)).argmax(-1)

    ids = list(prompt)
    for _ in range(n_new):
        row = np.zeros((1, len(prompt) + n_new), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(best(params, jnp.asarray(row), config)[0, len(ids) - 1]))
        if ids[-1] == eot:
            break
    return ids


@pytest.mark.parametrize(
    "norm, tied, kind, tokenizer_class",
    [
        ("pre", True, "bpe", "GPT2Tokenizer"),
        ("pre", False, "bpe", "GPT2Tokenizer"),
        ("pre", True, "char", "TokenizersBackend"),
        ("post", True, "gpt1", "OpenAIGPTTokenizer"),
        ("post", True, "bpe", "GPT2Tokenizer"),
    ],
)
def test_greedy_text_is_the_same(tmp_path, norm, tied, kind, tokenizer_class):
    if kind == "gpt1":
        pytest.importorskip("spacy", reason="GPT-1's tokenizer needs spaCy")
    tokenizer = MAKE_TOKENIZER[kind](tmp_path)
    config = GPTConfig(tokenizer.vocab_size + 3, 2, 2, 32, 48, norm=norm, tied_head=tied)  # padded vocabulary
    params = random_params(config, seed=1)
    # So that it writes varied text, and only tokens that exist.
    params["wte"] *= 0.1
    params["wte" if tied else "lm_head"][tokenizer.vocab_size :] = 0.0
    huggingface.write(tmp_path / "a", config, params, tokenizer)

    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert type(theirs).__name__ == tokenizer_class
    assert len(theirs) == tokenizer.vocab_size
    for text in [PROMPT, *TEXT[: 0 if kind == "gpt1" else 2]]:  # GPT-1's rules differ there at punctuation
        assert theirs(text)["input_ids"] == tokenizer.encode(text)

    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    prompt = theirs(PROMPT, return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    ids = greedy(config, params, tokenizer.encode(PROMPT), 24, tokenizer.eot_id)
    assert written.tolist() == ids
    assert theirs.decode(written) == tokenizer.decode(ids)
    assert len(set(ids[-24:])) >= 5


# --- Added and special tokens -----------------------------------------------------------------------------

ADDED = [END, "[NAME]", "<pad>", "<x>"]
WITH_ADDED = ["hello [NAME] the cat", "the[NAME]cat  [NAME]\n", "<x> y <x>z", "  <x>  [NAME]", "a  <y>  cat"]


def write_published(directory, layout, **config):
    """The layouts that transformers reads: as version 3 wrote it, with tokenizer.json beside it, as version 5 does."""
    write_legacy(directory, ADDED, ROLES | {"additional_special_tokens": ["<x>"]}, **config)
    (directory / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    if layout == "legacy":
        return directory
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([transformers.AddedToken("<y>", lstrip=True, rstrip=True, normalized=False)])
    tokenizer.save_pretrained(directory / "saved")
    if layout == "slow":  # tokenizer_config.json alone says what was added, with its flags
        path = directory / "saved/tokenizer_config.json"
        added = {
            str(i): {key: getattr(token, key) for key in ("content", "lstrip", "rstrip", "normalized", "special")}
            for i, token in tokenizer.added_tokens_decoder.items()
        }
        path.write_text(json.dumps(json.loads(path.read_text()) | config | {"added_tokens_decoder": added}))
        (directory / "saved/tokenizer.json").unlink()
        for name in ("vocab.json", "merges.txt"):
            (directory / "saved" / name).write_text((directory / name).read_text())
    return directory / "saved"


def assert_same_tokenizer(theirs, ours):
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eot_id, ours.pad_id)
    assert theirs.bos_token_id == ours.bos_id
    begin = [ours.bos_id] if ours.specials.adds_bos else []
    for text in WITH_ADDED:
        assert theirs(text)["input_ids"] == begin + ours.encode(text), text
    assert ours.eot_id not in ours.encode(f"a {theirs.eos_token}{theirs.pad_token}")  # where transformers has it


@pytest.mark.parametrize("bos", [{}, {"add_bos_token": True}], ids=["", "bos"])
@pytest.mark.parametrize("layout", ["legacy", "fast", "slow"])
def test_added_tokens_in_and_out_again(tmp_path, layout, bos):
    published = write_published(tmp_path / "published", layout, **bos)
    theirs = transformers.AutoTokenizer.from_pretrained(published)
    ours = make_tokenizer(str(published), list)
    assert_same_tokenizer(theirs, ours)
    assert ours.specials.adds_bos == bool(bos)

    config = GPTConfig(ours.vocab_size, 1, 1, 16, 9)
    huggingface.write(tmp_path / "a", config, random_params(config), ours.for_model(eos=[ours.eot_id, 7]))
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert_same_tokenizer(again, ours)
    assert again.special_tokens_map == theirs.special_tokens_map
    assert again.decode(again("hello [NAME]<x>")["input_ids"], skip_special_tokens=True) == "hello [NAME]"
    settings = transformers.AutoConfig.from_pretrained(tmp_path / "a")
    assert settings.eos_token_id == settings.bos_token_id == ours.eot_id
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "a").eos_token_id == [ours.eot_id, 7]
    (tmp_path / "a/tokenizer_meta.json").unlink()  # what transformers knows is enough
    found = make_tokenizer(str(tmp_path / "a"), list)
    assert found.fingerprint == ours.fingerprint
    assert found.for_model(**read_token_ids(tmp_path / "a")).stop_ids == (ours.eot_id, 7)


@pytest.mark.parametrize("many", [False, True])
def test_sampling_stops_where_transformers_does(tmp_path, many):
    """At `</s>`, which config.json names, or at any of generation_config.json's."""
    directory = write_published(tmp_path / "published", "legacy")
    ours = make_tokenizer(str(directory), list)
    config = GPTConfig(ours.vocab_size, 2, 2, 32, 48)
    params = random_params(config, seed=1)
    params["wte"] *= 0.1
    huggingface.write(tmp_path / "a", config, params, ours)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    prompt = torch.tensor([ours.encode("the cat")])
    free = model.generate(prompt, max_new_tokens=24, do_sample=False, eos_token_id=None)[0].tolist()
    later = free[prompt.shape[1] + 5]  # what it writes anyway ends it now
    for name in ("tokenizer.json", "tokenizer_meta.json"):
        (tmp_path / "a" / name).unlink()
    path = tmp_path / "a" / ("generation_config.json" if many else "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, later] if many else later}))
    if not many:
        (tmp_path / "a/generation_config.json").unlink()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    expected = model.generate(prompt, max_new_tokens=24, do_sample=False)[0].tolist()
    assert expected[-1] == later and len(expected) <= prompt.shape[1] + 6
    convert.import_weights(tmp_path / "a", tmp_path / "w")
    opened = load_model(tmp_path / "w")
    text = continue_texts(opened, ["the cat"], max_new_tokens=24, sampling=Sampling(0.0), seed=0)[0]
    assert text == ours.decode(expected[prompt.shape[1] : -1])


CONVERSATION = [
    {"role": "system", "content": "be kind. "},
    {"role": "user", "content": " the cat?\n"},
    {"role": "assistant", "content": "sat\n\n"},
    {"role": "user", "content": "  and then  "},
    {"role": "assistant", "content": "{{ ran }}"},
]


@pytest.mark.parametrize("kind", ["own", "imported", "char"])
def test_chat_template_gives_the_same_ids(tmp_path, kind):
    if kind == "imported":
        base = make_tokenizer(str(write_published(tmp_path / "published", "fast")), list)
    else:
        base = train_bpe(TEXT, 300) if kind == "own" else character_tokenizer([str(CONVERSATION), "\n"])
    ours = chat_tokenizer(base)
    template = Template(ours, "chat")
    config = GPTConfig(ours.vocab_size, 1, 1, 16, 9)
    huggingface.write(tmp_path / "a", config, random_params(config), ours, template="chat")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (theirs.eos_token_id, theirs.pad_token_id) == (template.eos_id, template.pad_id)
    for messages in (CONVERSATION, CONVERSATION[1:], CONVERSATION[:3], CONVERSATION[1:3]):
        ids = theirs.apply_chat_template(messages, return_dict=False)
        assert ids == template.conversation(messages)[0]
        prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
        assert prompt == template.prompt(messages[:-1])
    assert prompt == template.prompt(CONVERSATION[1]["content"])  # one turn, given as text
    for wrong in (CONVERSATION[2:], CONVERSATION[1:2] * 2, CONVERSATION[1:] + CONVERSATION[:1]):
        with pytest.raises(Exception, match="a system turn may come first, then user and assistant alternate"):
            theirs.apply_chat_template(wrong)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_reward_model_gives_the_same_scores(tmp_path, norm):
    """Of rows padded on the right, the bias of the head included."""
    tokenizer = chat_tokenizer(train_bpe(TEXT, 300))
    config = GPTConfig(tokenizer.vocab_size, 2, 2, 32, 24, norm=norm)
    trunk, rng = random_params(config), np.random.default_rng(2)
    head = {"kernel": rng.standard_normal(32).astype(np.float32), "bias": np.float32(1.7)}
    huggingface.write(tmp_path / "a", config, trunk, tokenizer, template="chat", head=head)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "a", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    lengths = np.array([3, 24, 11])
    tokens = np.where(np.arange(24) < lengths[:, None], rng.integers(0, 300, (3, 24)), tokenizer.pad_id)
    with jax.default_matmul_precision("highest"):
        ours = score_at_end({"trunk": trunk, "head": head}, tokens, lengths, config, jnp.float32)
    theirs = their_logits(model, tokens)[:, 0]
    assert theirs.std() > 1
    assert_close(ours, theirs, terms=model_terms(config))
