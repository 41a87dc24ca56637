"""Checkpoints that torch and transformers write are read, and ours by them: shards, nanoGPT's ckpt.pt, GPT-1's .npy.

Runs in an environment of its own (requirements-peers.txt), offline.
"""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest
from numerics import assert_close, model_terms
from safetensors.numpy import load_file
from test_huggingface import our_logits, random_params, their_logits, tokens_for, torch, transformers

from gptjax.errors import InputError
from gptjax.interop import gpt1, huggingface, nanogpt
from gptjax.model.spec import GPTConfig

hub = pytest.importorskip("huggingface_hub")

# --- Shards -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["20KB", "9KB", "1MB"])
def test_shards_are_those_of_transformers(tmp_path, size):
    """The index of huggingface_hub, name by name; 9 kB is less than some tensors. Either reads the other's."""
    config = GPTConfig(61, 2, 2, 32, context_length=40)
    params = random_params(config)
    huggingface.write(tmp_path / "ours", config, params, max_shard_size=size)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    split = hub.split_torch_state_dict_into_shards(state, max_shard_size=size)
    files = {path.name for path in (tmp_path / "ours").glob("*.safetensors")}
    assert files == set(split.filename_to_tensors)
    assert split.is_sharded == (size != "1MB") == (tmp_path / "ours/model.safetensors.index.json").exists()
    if split.is_sharded:
        index = json.loads((tmp_path / "ours/model.safetensors.index.json").read_text())
        assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for file, names in split.filename_to_tensors.items():
        tensors = load_file(tmp_path / "ours" / file)
        assert tensors.keys() == set(names)
        for name in names:
            np.testing.assert_array_equal(tensors[name], state[name].numpy())
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    assert (tmp_path / "theirs/model.safetensors.index.json").exists() == split.is_sharded
    found, again = huggingface.read(tmp_path / "theirs")
    assert found == config
    tokens = tokens_for(config)
    assert_close(our_logits(found, again, tokens), their_logits(model, tokens), terms=model_terms(config))


# --- nanoGPT ----------------------------------------------------------------------------------------------


class Norm(torch.nn.Module):
    def __init__(self, D, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(D))
        self.bias = torch.nn.Parameter(torch.zeros(D)) if bias else None

    def forward(self, x):
        return torch.nn.functional.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Block(torch.nn.Module):
    """With the names of nanoGPT's modules."""

    def __init__(self, D, heads, bias, gelu):
        super().__init__()
        linear = lambda i, o: torch.nn.Linear(i, o, bias=bias)
        self.ln_1, self.ln_2 = Norm(D, bias), Norm(D, bias)
        self.attn = torch.nn.ModuleDict({"c_attn": linear(D, 3 * D), "c_proj": linear(D, D)})
        self.mlp = torch.nn.ModuleDict({"c_fc": linear(D, 4 * D), "c_proj": linear(4 * D, D)})
        self.heads, self.gelu = heads, gelu

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.attn.c_attn(self.ln_1(x)).split(D, dim=2))
        y = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.c_proj(y.transpose(1, 2).reshape(B, T, D))
        return x + self.mlp.c_proj(self.gelu(self.mlp.c_fc(self.ln_2(x))))


class Nano(torch.nn.Module):
    def __init__(self, c, bias, gelu):
        super().__init__()
        blocks = [Block(c.d_model, c.n_head, bias, gelu) for _ in range(c.n_layer)]
        self.transformer = torch.nn.ModuleDict({
            "wte": torch.nn.Embedding(c.vocab_size, c.d_model),
            "wpe": torch.nn.Embedding(c.context_length, c.d_model),
            "h": torch.nn.ModuleList(blocks),
            "ln_f": Norm(c.d_model, bias),
        })  # fmt: skip
        self.lm_head = torch.nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, tokens):
        x = self.transformer.wte(tokens) + self.transformer.wpe(torch.arange(tokens.shape[1]))
        for block in self.transformer.h:
            x = block(x)
        return SimpleNamespace(logits=self.lm_head(self.transformer.ln_f(x)))


def nano_file(path, c, bias=True, approximate="tanh", legacy=False, prefix="_orig_mod."):
    """A checkpoint after a step of AdamW, as nanoGPT's train.py saves it. Returns the model."""
    torch.manual_seed(0)
    model = Nano(c, bias, torch.nn.GELU(approximate=approximate))
    for name, parameter in model.named_parameters():
        gain = ".ln_" in name and name.endswith("weight")
        std = c.d_model**-0.5 if parameter.ndim == 2 else 0.3
        torch.nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=std)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros((1, 3), dtype=torch.long)).logits.sum().backward()
    optimizer.step()
    checkpoint = {
        "model": {prefix + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": c.n_layer, "n_head": c.n_head, "n_embd": c.d_model, "block_size": c.context_length,
                       "bias": bias, "vocab_size": c.vocab_size, "dropout": 0.0},
        "iter_num": 1,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dataset": "openwebtext", "compile": True},
    }  # fmt: skip
    if not prefix:
        checkpoint["model"] = model.state_dict()  # an OrderedDict with _metadata
    torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    return model


@pytest.mark.parametrize("bias, legacy, prefix", [(True, False, "_orig_mod."), (False, False, ""), (True, True, "")])
def test_nanogpts_checkpoint_gives_its_logits(tmp_path, bias, legacy, prefix):
    c = GPTConfig(61, 2, 2, 32, context_length=40)
    model = nano_file(tmp_path / "ckpt.pt", c, bias=bias, legacy=legacy, prefix=prefix)
    config, params, _ = nanogpt.read(tmp_path / "ckpt.pt")
    assert config == c
    np.testing.assert_array_equal(params["wte"], model.lm_head.weight.detach().numpy())
    tokens = tokens_for(config)
    theirs = their_logits(model, tokens)
    assert 0.3 < theirs.std() < 10
    assert_close(our_logits(config, params, tokens), theirs, terms=model_terms(config))


def test_exact_gelu_is_what_differs(tmp_path):
    """Of today's nanoGPT: visible, and small."""
    c = GPTConfig(61, 2, 2, 32, context_length=40)
    model = nano_file(tmp_path / "ckpt.pt", c, approximate="none")
    config, params, notes = nanogpt.read(tmp_path / "ckpt.pt")
    tokens = tokens_for(config)
    theirs = their_logits(model, tokens)
    difference = np.abs(our_logits(config, params, tokens) - theirs).max() / theirs.std()
    assert 1e-5 < difference < 5e-3 and "approximation" in notes[0]
    x = torch.linspace(-6, 6, 20_001)
    gap = (torch.nn.functional.gelu(x) - torch.nn.functional.gelu(x, approximate="tanh")).abs().max()
    assert 4e-4 < gap < 5e-4  # as the note says


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_would_execute_is_refused(tmp_path, legacy):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'trace'}",)

    content = {"model": {"x": torch.ones(3)}, "model_args": Attack()}
    torch.save(content, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="contains posix.system, which is neither a tensor nor plain data"):
        nanogpt.read(tmp_path / "ckpt.pt")
    assert not (tmp_path / "trace").exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)
    assert (tmp_path / "trace").exists()
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"contains torch\.nn\.modules\.linear\.Linear"):
        nanogpt.read(tmp_path / "whole.pt")


# --- OpenAI's GPT-1 ---------------------------------------------------------------------------------------


def test_the_released_layout_gives_transformers_logits(tmp_path):
    """A random OpenAIGPTLMHeadModel, written in the order of the released code's variables."""
    torch.manual_seed(0)
    settings = transformers.OpenAIGPTConfig(vocab_size=61, n_layer=2, n_head=2, n_embd=128, n_positions=40)
    model = transformers.OpenAIGPTLMHeadModel(settings)
    for name, parameter in model.named_parameters():
        gain = "ln_" in name and name.endswith("weight")
        std = 128**-0.5 if parameter.ndim == 2 else 0.3
        torch.nn.init.normal_(parameter, mean=1.0 if gain else 0.0, std=std)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    names = ["positions_embed.weight", "tokens_embed.weight"]
    parts = ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
    names += [f"h.{i}.{part}.{kind}" for i in range(2) for part in parts for kind in ("weight", "bias")]
    tensors = [state[f"transformer.{name}"] for name in names]
    tensors = [x[None] if x.ndim == 2 and i > 1 else x for i, x in enumerate(tensors)]
    (tmp_path / "params_shapes.json").write_text(json.dumps([x.shape for x in tensors]))
    for i, part in enumerate(np.array_split(np.concatenate([x.ravel() for x in tensors]), 10)):
        np.save(tmp_path / f"params_{i}.npy", part)
    config, params = gpt1.read(tmp_path)
    assert config == GPTConfig(61, 2, 2, 128, 40, norm="post", dropout=0.1)
    tokens = tokens_for(config)
    theirs = their_logits(model, tokens)
    assert 0.3 < theirs.std() < 10
    assert_close(our_logits(config, params, tokens), theirs, terms=model_terms(config))
