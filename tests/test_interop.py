"""Weights in and out: our own round trip, what is refused, and trained weights reproduced tensor by tensor.

That transformers computes the same from the same files is shown in tests/peers/test_huggingface.py.
"""

import base64
import dataclasses
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from numerics import assert_close, model_terms
from safetensors.numpy import load_file, save_file

from gptjax.data.bpe import character_tokenizer, train_bpe
from gptjax.data.tokenizer import Tokenizer
from gptjax.errors import InputError
from gptjax.interop import huggingface, layout
from gptjax.model import gpt, layers
from gptjax.model.attention import causal_mask, reference_attention
from gptjax.model.spec import GPTConfig

SMALL = GPTConfig(vocab_size=17, n_layer=3, n_head=2, d_model=8, context_length=6)


def random_params(config, seed=0):
    """Every parameter random, LayerNorm gains and biases too: a swap of any two tensors then shows."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: gpt.init(config, key), jax.random.key(0))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def assert_same(found, expected):
    found, expected = flatten_dict(found, sep="/"), flatten_dict(expected, sep="/")
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name].dtype == np.float32
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def edit_settings(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit):
    tensors = load_file(directory / "model.safetensors")
    save_file(edit(tensors), directory / "model.safetensors")


@pytest.fixture
def exported(tmp_path):
    """A small GPT-2 checkpoint: (directory, its parameters)."""
    params = random_params(SMALL)
    huggingface.write(tmp_path / "export", SMALL, params)
    return tmp_path / "export", params


# --- Round trip -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("tied", [True, False])
def test_round_trip_is_bitwise(tmp_path, norm, tied):
    config = dataclasses.replace(SMALL, norm=norm, tied_head=tied, dropout=0.2)
    params = random_params(config)
    huggingface.write(tmp_path / "a", config, params)
    found_config, found = huggingface.read(tmp_path / "a")
    assert found_config == config
    assert_same(found, params)


def test_names_and_layout_are_those_of_gpt2(exported):
    """Pinned by hand, since a wrong name in the table would survive a round trip."""
    directory, params = exported
    tensors = load_file(directory / "model.safetensors")
    block = {
        "ln_1.weight": (8,), "ln_1.bias": (8,), "ln_2.weight": (8,), "ln_2.bias": (8,),
        "attn.c_attn.weight": (8, 24), "attn.c_attn.bias": (24,),
        "attn.c_proj.weight": (8, 8), "attn.c_proj.bias": (8,),
        "mlp.c_fc.weight": (8, 32), "mlp.c_fc.bias": (32,),
        "mlp.c_proj.weight": (32, 8), "mlp.c_proj.bias": (8,),
    }  # fmt: skip
    expected = {f"transformer.h.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    expected |= {f"transformer.ln_f.{name}": (8,) for name in ("weight", "bias")}
    expected |= {"transformer.wte.weight": (17, 8), "transformer.wpe.weight": (6, 8)}
    assert {name: tensor.shape for name, tensor in tensors.items()} == expected
    kernel = params["blocks"]["attn"]["c_attn"]["kernel"]  # q, k, v side by side
    np.testing.assert_array_equal(
        tensors["transformer.h.1.attn.c_attn.weight"], np.concatenate([kernel[1, :, i] for i in range(3)], -1)
    )
    for ours, theirs in (("ln_1", "ln_1"), ("ln_2", "ln_2")):
        np.testing.assert_array_equal(tensors[f"transformer.h.2.{theirs}.weight"], params["blocks"][ours]["scale"][2])


def test_names_of_gpt1(tmp_path):
    config = dataclasses.replace(SMALL, norm="post", n_layer=1)
    huggingface.write(tmp_path / "a", config, random_params(config))
    names = {name for name in load_file(tmp_path / "a/model.safetensors") if ".h." not in name}
    assert names == {"transformer.tokens_embed.weight", "transformer.positions_embed.weight"}
    assert json.loads((tmp_path / "a/config.json").read_text())["model_type"] == "openai-gpt"


def test_file_of_the_bare_model_without_prefix_and_with_mask_buffers(exported):
    """The published gpt2: no prefix, and in older files the causal masks."""
    directory, params = exported
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 6, 6), np.float32)) for i in range(3)}
    masks |= {"h.0.attn.masked_bias": np.float32([-1e4])}
    edit_tensors(directory, lambda tensors: {k.removeprefix("transformer."): v for k, v in tensors.items()} | masks)
    assert_same(huggingface.read(directory)[1], params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrow_floats_are_widened(exported, dtype):
    directory, params = exported
    edit_tensors(directory, lambda tensors: {k: v.astype(dtype) for k, v in tensors.items()})
    assert_same(huggingface.read(directory)[1], jax.tree.map(lambda x: x.astype(dtype).astype("f4"), params))


def test_shards(exported):
    directory, params = exported
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, directory / file)
    weight_map = {name: file for file, own in shards.items() for name in own}
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(huggingface.read(directory)[1], params)
    (directory / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(InputError, match="names missing shards: model-00002-of-00002.*Put them in the same"):
        huggingface.read(directory)
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": "../secret.safetensors"}}))
    with pytest.raises(InputError, match="has no valid weight_map.*download it again"):
        huggingface.read(directory)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_sizes_of_a_bare_file(tmp_path, norm):
    config = GPTConfig(5, n_layer=2, n_head=2, d_model=128, context_length=7, norm=norm)
    params = random_params(config)
    huggingface.write(tmp_path / "a", config, params)
    bare = (tmp_path / "a/model.safetensors").rename(tmp_path / "gpt.safetensors")
    found_config, found = huggingface.read(bare)
    assert found_config == config
    assert_same(found, params)


def test_a_bare_file_with_unknown_heads_needs_its_config(exported, tmp_path):
    bare = (exported[0] / "model.safetensors").rename(tmp_path / "gpt.safetensors")
    with pytest.raises(InputError, match="n_head cannot be determined from the tensors. Put the model's config.json"):
        huggingface.read(bare)


def test_head_is_untied_only_where_it_differs_or_config_says_so(exported):
    directory, params = exported
    copy = {"lm_head.weight": params["wte"]}
    edit_tensors(directory, lambda tensors: tensors | copy)
    config, found = huggingface.read(directory)
    assert config.tied_head and "lm_head" not in found
    edit_settings(directory, tie_word_embeddings=False)
    config, found = huggingface.read(directory)
    assert not config.tied_head
    np.testing.assert_array_equal(found["lm_head"], params["wte"])
    edit_settings(directory, tie_word_embeddings=True)
    edit_tensors(directory, lambda tensors: tensors | {"lm_head.weight": params["wte"] + 1})
    config, found = huggingface.read(directory)
    assert not config.tied_head
    np.testing.assert_array_equal(found["lm_head"], params["wte"] + 1)


def test_an_untied_head_that_equals_the_embedding_stays_untied(tmp_path):
    config = dataclasses.replace(SMALL, tied_head=False)
    params = random_params(config)
    params["lm_head"] = params["wte"].copy()
    huggingface.write(tmp_path / "a", config, params)
    found_config, found = huggingface.read(tmp_path / "a")
    assert not found_config.tied_head
    assert_same(found, params)


# --- Refused ----------------------------------------------------------------------------------------------


def test_one_error_lists_every_missing_extra_and_misshaped_tensor(exported):
    directory, _ = exported

    def damage(tensors):
        del tensors["transformer.h.1.ln_2.bias"], tensors["transformer.wpe.weight"]
        # A Linear's [out, in]: a square one would slip through, an oblong one must not.
        tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T.copy()
        tensors["transformer.h.2.ln_1.bias"] = np.ones(8, np.int32)
        return tensors | {"score.weight": np.ones((2, 8), np.float32)}

    edit_tensors(directory, damage)
    with pytest.raises(InputError) as error:
        huggingface.read(directory)
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "missing wpe.weight: expected shape [6, 8]",
        "missing h.1.ln_2.bias: expected shape [8]",
        "mis-shaped h.0.mlp.c_fc.weight: expected shape [8, 32], found [32, 8]",
        "extra score.weight: expected none, found shape [2, 8]",
        "h.2.ln_1.bias: expected floating-point numbers, found I32",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        {"activation_function": "gelu"},  # the erf form
        {"layer_norm_epsilon": 1e-6},
        {"n_inner": 16},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"add_cross_attention": True},
        {"model_type": "gpt_neo"},
        {"rotary_dim": 32},
        {"position_embedding_type": "relative_key"},
        {"pruned_heads": {"0": [1]}},
        {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnGPT"}},
        {"n_head": 3},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_unsupported_architectures_are_rejected_by_key(exported, settings):
    edit_settings(exported[0], **settings)
    with pytest.raises(InputError, match=next(iter(settings))):
        huggingface.read(exported[0])


def test_sizes_by_the_names_of_every_model(exported):
    """transformers takes hidden_size for n_embd, and so on."""
    path = exported[0] / "config.json"
    names = {"n_embd": "hidden_size", "n_positions": "max_position_embeddings", "n_layer": "num_hidden_layers",
             "n_head": "num_attention_heads"}  # fmt: skip
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({names.get(key, key): value for key, value in settings.items()}))
    assert huggingface.read(exported[0])[0] == SMALL
    edit_settings(exported[0], num_hidden_layers=4)
    with pytest.raises(InputError, match=r"missing h\.3\.ln_1"):
        huggingface.read(exported[0])


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_are_not_finite_are_rejected_by_tensor(exported, value):
    directory, _ = exported

    def spoil(tensors):
        bad = "transformer.h.1.attn.c_attn.weight"
        tensors[bad] = tensors[bad].astype(np.float64)
        tensors[bad][3, 5] = value
        return tensors

    edit_tensors(directory, spoil)
    with pytest.raises(InputError, match=r"NaN or infinite values in transformer\.h\.1\.attn\.c_attn\.weight:"):
        huggingface.read(directory)

    def spoil_all(tensors):
        return {name: np.full(tensor.shape, value) for name, tensor in tensors.items()}

    edit_tensors(directory, spoil_all)
    with pytest.raises(InputError, match="and 30 more tensors"):
        huggingface.read(directory)


def test_parameters_that_are_not_finite_are_not_exported(tmp_path):
    params = random_params(SMALL)
    params["blocks"]["mlp"]["c_fc"]["bias"][2, 7] = np.nan
    with pytest.raises(InputError, match=r"NaN or infinite values in transformer\.h\.2\.mlp\.c_fc\.bias:.*--step"):
        huggingface.write(tmp_path / "a", SMALL, params)
    assert list(tmp_path.iterdir()) == []


def test_gpt1_with_another_activation_is_rejected(tmp_path):
    config = dataclasses.replace(SMALL, norm="post")
    huggingface.write(tmp_path / "a", config, random_params(config))
    edit_settings(tmp_path / "a", afn="relu")
    with pytest.raises(InputError, match="afn='relu'"):
        huggingface.read(tmp_path / "a")


def test_equivalent_settings_are_accepted(exported):
    edit_settings(exported[0], n_inner=32, activation_function="gelu_pytorch_tanh", reorder_and_upcast_attn=True)
    assert_same(huggingface.read(exported[0])[1], exported[1])


def test_three_dropout_rates_become_one_with_a_warning(exported):
    edit_settings(exported[0], resid_pdrop=0.3)
    with pytest.warns(UserWarning, match="model.dropout is set to resid_pdrop"):
        assert huggingface.read(exported[0])[0].dropout == 0.3


def test_unreadable_files(exported, tmp_path):
    directory, _ = exported
    with pytest.raises(InputError, match="does not exist"):
        huggingface.read(tmp_path / "nothing")
    with pytest.raises(InputError, match="hf download NAME"):
        huggingface.read("openai-community/gpt2")
    with pytest.raises(InputError, match="not a local path: copy the directory"):
        huggingface.read("gs://bucket/gpt2")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match="model.safetensors is damaged.*download it again"):
        huggingface.read(directory)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(InputError, match="Git LFS pointer.*run git lfs pull"):
        huggingface.read(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json cannot be read"):
        huggingface.read(directory)
    weights.unlink()
    with pytest.raises(InputError, match="contains no model.safetensors"):
        huggingface.read(directory)
    (directory / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"Pickles are not read.*save_pretrained"):
        huggingface.read(directory)


def test_other_models_are_rejected(tmp_path):
    save_file({"model.embed_tokens.weight": np.ones((3, 4), np.float32)}, tmp_path / "llama.safetensors")
    with pytest.raises(InputError, match="contains model.embed_tokens.weight .*neither wte.weight"):
        huggingface.read(tmp_path / "llama.safetensors")


def test_a_band_is_not_exported(tmp_path):
    banded = dataclasses.replace(SMALL, local_window=5)
    with pytest.raises(InputError, match="local_window=5 is narrower.*context_length=6.*model.local_window=None"):
        huggingface.write(tmp_path / "a", banded, random_params(SMALL))
    assert not (tmp_path / "a").exists()
    # A band that nothing is outside of, or that no layer has, is dense attention.
    huggingface.write(tmp_path / "a", dataclasses.replace(SMALL, local_window=6), random_params(SMALL))
    one = dataclasses.replace(banded, n_layer=1)
    huggingface.write(tmp_path / "b", one, random_params(one))


def test_parameters_of_another_configuration_are_not_exported(tmp_path):
    params = random_params(SMALL)
    untied = dataclasses.replace(SMALL, tied_head=False, vocab_size=18)
    params["value_head"] = np.ones(3, np.float32)
    with pytest.raises(InputError) as error:
        huggingface.write(tmp_path / "a", untied, params)
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "missing lm_head: expected shape [18, 8]",
        "mis-shaped wte: expected shape [18, 8], found [17, 8]",
        "extra value_head: expected none, found shape [3]",
    ]
    assert list(tmp_path.iterdir()) == []


def test_export_is_atomic_and_overwrites_nothing(tmp_path, monkeypatch):
    params = random_params(SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(huggingface, "settings_of", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(InputError, match="No space left.*no files were left behind. Free some space"):
            huggingface.write(tmp_path / "a", SMALL, params)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a").mkdir()
    huggingface.write(tmp_path / "a", SMALL, params)  # an empty directory is no loss
    with pytest.raises(InputError, match="not an empty directory: give another path"):
        huggingface.write(tmp_path / "a", SMALL, params)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# --- Tokenizers -------------------------------------------------------------------------------------------

TEXT = ["the cat sat on the mat, and the cat ran.\n"] * 3


def test_a_path_that_begins_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    params = random_params(SMALL)
    huggingface.write("~/a", SMALL, params)
    assert (tmp_path / "a/model.safetensors").exists() and not (tmp_path / "~").exists()
    assert_same(huggingface.read("~/a")[1], params)


def test_tokenizer_files(tmp_path):
    tokenizer = train_bpe(TEXT, 265)
    config = dataclasses.replace(SMALL, vocab_size=272)  # padded: more rows than tokens
    huggingface.write(tmp_path / "a", config, random_params(config), tokenizer)
    settings = json.loads((tmp_path / "a/config.json").read_text())
    assert settings["vocab_size"] == 272 and settings["eos_token_id"] == tokenizer.eot_id == 264
    assert json.loads((tmp_path / "a/tokenizer_config.json").read_text())["tokenizer_class"] == "GPT2Tokenizer"
    merges = (tmp_path / "a/merges.txt").read_text(encoding="utf-8").splitlines()
    assert merges[0] == "#version: 0.2" and len(merges) == 1 + 8
    assert Tokenizer.load(tmp_path / "a").fingerprint == tokenizer.fingerprint
    assert json.loads((tmp_path / "a/vocab.json").read_text())["<|endoftext|>"] == 264
    with pytest.raises(InputError, match="The tokenizer has 265 ids and the model 17: give"):
        huggingface.write(tmp_path / "b", SMALL, random_params(SMALL), tokenizer)


def test_byte_level_tokenizer_unlike_gpt2s_keeps_its_own_rules(tmp_path):
    """GPT2Tokenizer would rebuild it from vocabulary and merges alone, and drop the added blank."""
    train_bpe(TEXT, 265).save(tmp_path)
    path = tmp_path / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    spec["pre_tokenizer"]["add_prefix_space"] = True
    path.write_text(json.dumps(spec), encoding="utf-8")
    (tmp_path / "tokenizer_meta.json").unlink()
    config = dataclasses.replace(SMALL, vocab_size=265)
    huggingface.write(tmp_path / "a", config, random_params(config), Tokenizer.load(tmp_path))
    settings = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_characters_have_no_special_tokens(tmp_path):
    tokenizer = character_tokenizer(TEXT)
    config = dataclasses.replace(SMALL, vocab_size=tokenizer.vocab_size)
    huggingface.write(tmp_path / "a", config, random_params(config), tokenizer)
    assert json.loads((tmp_path / "a/config.json").read_text())["eos_token_id"] is None
    settings = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and "eos_token" not in settings
    assert not (tmp_path / "a/merges.txt").exists()
    assert Tokenizer.load(tmp_path / "a").kind == "char"


# --- Trained weights: minGPT's sorting model, with its intermediate tensors -------------------------------

SORT = Path(__file__).parents[2] / "shared/data/weights/nano_gpt_sort"
needs_sort = pytest.mark.skipif(not SORT.exists(), reason="needs ../shared/data/weights/nano_gpt_sort")


def load_json(name):
    def tensor(value):
        return np.frombuffer(base64.b64decode(value["data"]), "<f4").reshape(value["shape"])

    content = json.loads((SORT / name).read_text())
    return content["config"], {k: tensor(v) for k, v in content.items() if k != "config"}


@pytest.fixture(scope="module")
def sort_model():
    """minGPT saves torch Linear layers, [out, in]; transposed they are GPT-2's."""
    c, tensors = load_json("gpt-nano-sort-model.json")
    config = GPTConfig(
        c["vocab_size"], c["n_layer"], c["n_head"], c["n_embd"], c["block_size"],
        tied_head=False, dropout=c["resid_pdrop"],
    )  # fmt: skip
    params = {}
    for row in layout.table(config):
        name = row.theirs if row.theirs.startswith("lm_head") else f"transformer.{row.theirs}"
        linear = ".attn." in name or ".mlp." in name
        layers = [tensors.pop(name.format(i)) for i in range(config.n_layer)] if "{}" in name else [tensors.pop(name)]
        layers = [(x.T if linear else x).reshape(row.shape_here) for x in layers]
        params[row.ours] = np.stack(layers) if "{}" in name else layers[0]
    assert all(name.endswith(".attn.bias") for name in tensors)  # the masks: nothing else is unused
    return config, unflatten_dict(params, sep="/")


@needs_sort
@pytest.mark.parametrize("path", ["reference", "cpu", "xla"])
def test_trained_weights_reproduce_every_intermediate_tensor(sort_model, path):
    config, params = sort_model
    config = dataclasses.replace(config, attention=path)
    _, expected = load_json("gpt-nano-sort-t0-partials.json")
    tokens = expected.pop("idx").astype(np.int32)
    B, T = tokens.shape

    def out(module):
        return module["__call__"][0]

    def by_head(x):
        return jnp.swapaxes(x, 1, 2)

    with jax.default_matmul_precision("highest"):
        (x, _, _), state = gpt.GPT(config).apply(
            {"params": params}, tokens, jnp.broadcast_to(jnp.arange(T), (B, T)),
            capture_intermediates=True, mutable="intermediates",
        )  # fmt: skip
        seen = state["intermediates"]
        block = jax.tree.map(lambda x: x[0], seen["blocks"])  # of the first layer
        q, k, v = (out(block["attn"]["c_attn"])[:, :, i].reshape(B, T, config.n_head, config.d_head) for i in range(3))
        # Probabilities are the output where the values are the unit vectors.
        unit = jnp.broadcast_to(jnp.eye(T)[:, None], (B, T, config.n_head, T))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(config.d_head)
        y, projected = block["attn"]["attn_out"][0], out(block["attn"]["c_proj"])
        logits = gpt.logits(params, config, x)
        mlp_hidden = block["mlp"]["c_fc_out"][0]
        found = {
            "tok_emb": params["wte"][tokens],
            "pos_emb": params["wpe"][None],
            "x": seen["embedding"][0],
            "ln1": out(block["ln_1"]),
            "qkv": out(block["attn"]["c_attn"]).reshape(B, T, -1),
            "q": by_head(q),
            "k": by_head(k),
            "v": by_head(v),
            "att": jnp.where(causal_mask(jnp.arange(T), jnp.arange(T)), scores, -jnp.inf),
            "attSm": by_head(reference_attention(q, k, unit)),
            "y": y,
            "yProj": projected,
            "attnResid": seen["embedding"][0] + projected,
            "ln2": out(block["ln_2"]),
            "fc": mlp_hidden,
            "gelu": layers.gelu(mlp_hidden),
            "mlp": out(block["mlp"]),
            "mlpResid": block["block"][0],
            **{f"block{i}": seen["blocks"]["block"][0][i] for i in range(config.n_layer)},
            "ln_f": out(seen["ln_f"]),
            "lm_head": logits,
            "probs": jax.nn.softmax(logits),
        }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(found[name], value, terms=model_terms(config), err_msg=name)


@needs_sort
def test_trained_weights_sort_every_input(sort_model, tmp_path):
    """Exported, read back, and given all 3^6 inputs: greedy decoding writes them sorted."""
    huggingface.write(tmp_path / "sort", *sort_model)
    config, params = huggingface.read(tmp_path / "sort")
    assert config == sort_model[0]
    inputs = np.array(list(itertools.product(range(3), repeat=6)))
    tokens = np.zeros((729, 12), np.int32)
    tokens[:, :6] = inputs

    @jax.jit
    def forward(params, tokens):
        return gpt.logits(params, config, gpt.hidden(params, config, tokens)).argmax(-1)

    for i in range(6, 12):  # causal: what stands after position i-1 does not matter yet
        tokens[:, i] = forward(params, tokens[:, :11])[:, i - 1]
    np.testing.assert_array_equal(tokens[:, 6:], np.sort(inputs, axis=1))
