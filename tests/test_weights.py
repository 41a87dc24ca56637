"""Weights in other forms than one safetensors file: shards, nanoGPT's ckpt.pt, OpenAI's GPT-1 release.

Files that torch and transformers themselves write and read are in tests/peers/test_weights.py.
"""

import dataclasses
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch_files
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file
from test_interop import SMALL, assert_same, random_params
from torch_files import Stored

from gptjax import convert
from gptjax.data.bpe import character_tokenizer, load_gpt1, train_bpe
from gptjax.errors import InputError
from gptjax.interop import gpt1, huggingface, layout, nanogpt, shards, torch_file
from gptjax.model.spec import GPT1, GPTConfig
from gptjax.trained import load_model

# --- Shards -----------------------------------------------------------------------------------------------


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint in shards of 2 kB: (directory, its parameters)."""
    params = random_params(SMALL)
    huggingface.write(tmp_path / "a", SMALL, params, max_shard_size="2KB")
    return tmp_path / "a", params


def test_shards_are_bitwise_and_those_of_the_index(sharded, tmp_path):
    directory, params = sharded
    assert_same(huggingface.read(directory)[1], params)
    assert_same(huggingface.read(directory / "model.safetensors.index.json")[1], params)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    n = len(files)
    assert files == [f"model-{i:05d}-of-{n:05d}.safetensors" for i in range(1, n + 1)] and n > 3
    found = {name: file for file in files for name in load_file(directory / file)}
    assert found == index["weight_map"]
    sizes = {file: sum(x.nbytes for x in load_file(directory / file).values()) for file in files}
    assert max(sizes.values()) <= 2000 and sum(sizes.values()) == index["metadata"]["total_size"]
    huggingface.write(tmp_path / "one", SMALL, params)
    one = load_file(tmp_path / "one/model.safetensors")
    assert one.keys() == found.keys() and not (tmp_path / "one/model.safetensors.index.json").exists()


def test_split_is_huggingface_hubs():
    """Its documented example, and the order that its code gives."""
    sizes = dict(zip("abcdef", (6, 6, 2, 6, 2, 2), strict=True))
    assert shards.split(sizes, 10) == [["a"], ["b", "c"], ["d", "e", "f"]]
    assert shards.split({"a": 3, "large": 11, "b": 7, "c": 1}, 10) == [["large"], ["a", "b"], ["c"]]
    assert shards.split({"a": 5, "b": 5}, 10) == [["a", "b"]]


@pytest.mark.parametrize("text, size", [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("200KB", 200_000)])
def test_sizes(text, size):
    assert shards.parse_size(text) == size


@pytest.mark.parametrize("text", ["5", "5GiB", "-1GB", "0GB", "GB"])
def test_bad_sizes(text, tmp_path):
    with pytest.raises(InputError, match=f"--max_shard_size={text}: give a number with KB, MB, GB or TB"):
        huggingface.write(tmp_path / "a", SMALL, random_params(SMALL), max_shard_size=text)


def test_a_truncated_shard_is_named(sharded):
    directory, _ = sharded
    path = directory / sorted(path.name for path in directory.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(InputError, match=f"{path.name} is damaged.*download it again"):
        huggingface.read(directory)


def test_tensors_that_index_and_shards_disagree_on(sharded):
    """Lost, left over from another export, and in a second shard too: all in one message."""
    directory, params = sharded
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    lost, doubled = "transformer.h.1.ln_2.bias", "transformer.wpe.weight"
    first, last = directory / index[doubled], directory / sorted(set(index.values()))[-1]
    tensors = load_file(directory / index[lost])
    del tensors[lost]
    save_file(tensors, directory / index[lost])
    save_file(load_file(last) | {doubled: params["wpe"] + 1, "score.weight": params["wpe"]}, last)
    with pytest.raises(InputError) as error:
        huggingface.read(directory)
    assert first != last
    assert {line.strip() for line in str(error.value).splitlines()[1:-1]} == {
        "missing h.1.ln_2.bias: expected shape [8]",
        f"extra wpe.weight ({last.name}): expected none, found shape [6, 8]",
        f"extra score.weight ({last.name}): expected none, found shape [6, 8]",
    }


# --- nanoGPT ----------------------------------------------------------------------------------------------

NANO = {"n_layer": 3, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 17, "bias": True, "dropout": 0.2}


def nano_state(config, params, bias=True, dtype=np.float32, prefix="_orig_mod.", masks=True):
    """state_dict() of nanoGPT with our parameters: Linear layers [out, in], the head a view of the embedding."""
    flat, state = flatten_dict(params, sep="/"), OrderedDict()
    for row in layout.table(config):
        if bias or not row.ours.endswith("/bias"):
            for i, array in enumerate(flat[row.ours] if row.stacked else [flat[row.ours]]):
                array = array.reshape(row.shape)
                if row.ours.endswith("kernel"):
                    array = np.ascontiguousarray(array.T)
                state[f"{prefix}transformer.{row.theirs.format(i)}"] = Stored(array.astype(dtype))
    if masks:
        mask = np.tril(np.ones((1, 1, config.context_length, config.context_length), np.float32))
        state |= {f"{prefix}transformer.h.{i}.attn.bias": Stored(mask) for i in range(config.n_layer)}
    embedding = state[f"{prefix}transformer.wte.weight"]
    state[f"{prefix}lm_head.weight"] = Stored(np.empty(embedding.shape), embedding.storage)
    return state


def nano_checkpoint(state, **changes):
    moment = Stored(np.ones(5, np.float32))
    return {
        "model": state,
        "optimizer": {"state": {0: {"step": Stored(np.float32(7)), "exp_avg": moment}}, "param_groups": [{"lr": 1e-3}]},
        "model_args": NANO | changes,
        "iter_num": 2000,
        "best_val_loss": Stored(np.float32(1.5)),
        "config": {"dataset": "shakespeare_char", "device": "cuda", "compile": True},
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_nanogpt_is_bitwise(tmp_path, monkeypatch, legacy, dtype):
    params = random_params(SMALL)
    torch_files.save(nano_checkpoint(nano_state(SMALL, params, dtype=dtype)), tmp_path / "ckpt.pt", monkeypatch, legacy)
    config, found, notes = nanogpt.read(tmp_path)
    assert config == dataclasses.replace(SMALL, dropout=0.2)
    for name, array in flatten_dict(params, sep="/").items():
        np.testing.assert_array_equal(flatten_dict(found, sep="/")[name], array.astype(dtype).astype("f4"), name)
    assert "tanh approximation" in notes[0] and notes[1:] == ["The optimizer state is not imported."]


def test_nanogpt_without_biases(tmp_path, monkeypatch):
    params = random_params(SMALL)
    state = nano_state(SMALL, params, bias=False, prefix="", masks=False)
    torch_files.save(nano_checkpoint(state, bias=False), tmp_path / "ckpt.pt", monkeypatch)
    _, found, notes = nanogpt.read(tmp_path / "ckpt.pt")
    assert any("no biases (bias=False): here they are zero" in note for note in notes)
    for name, array in flatten_dict(params, sep="/").items():
        expected = np.zeros_like(array) if name.endswith("/bias") else array
        np.testing.assert_array_equal(flatten_dict(found, sep="/")[name], expected, name)
    torch_files.save(nano_checkpoint(state), tmp_path / "ckpt.pt", monkeypatch)
    with pytest.raises(InputError, match=r"missing h\.0\.ln_1\.bias"):
        nanogpt.read(tmp_path)


def test_every_fault_of_a_nanogpt_checkpoint_in_one_message(tmp_path, monkeypatch):
    state = nano_state(SMALL, random_params(SMALL))
    del state["_orig_mod.transformer.h.2.ln_1.weight"]
    state["_orig_mod.transformer.h.0.mlp.c_fc.weight"] = Stored(np.ones((8, 32), np.float32))  # [in, out]
    state["_orig_mod.transformer.ln_f.weight"] = Stored(np.ones(8, np.int64))
    state["_orig_mod.transformer.h.3.ln_1.weight"] = Stored(np.ones(8, np.float32))
    torch_files.save(nano_checkpoint(state), tmp_path / "ckpt.pt", monkeypatch)
    with pytest.raises(InputError) as error:
        nanogpt.read(tmp_path)
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "missing h.2.ln_1.weight: expected shape [8]",
        "mis-shaped h.0.mlp.c_fc.weight: expected shape [32, 8], found [8, 32]",
        "extra h.3.ln_1.weight: expected none, found shape [8]",
        "ln_f.weight: expected floating-point numbers, found I64",
    ]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_kv_head": 1}, "unsupported architecture: n_kv_head=1"),
        ({"n_head": 3}, "model_args has an invalid value.*n_head"),
        ({"n_embd": "8"}, "model_args has an invalid value"),
    ],
)
def test_other_architectures(tmp_path, monkeypatch, change, message):
    state = nano_state(SMALL, random_params(SMALL))
    torch_files.save(nano_checkpoint(state, **change), tmp_path / "ckpt.pt", monkeypatch)
    with pytest.raises(InputError, match=message):
        nanogpt.read(tmp_path)


def test_files_that_are_not_nanogpts(tmp_path, monkeypatch):
    path = tmp_path / "ckpt.pt"
    with pytest.raises(InputError, match="ckpt.pt does not exist: give nanoGPT's ckpt.pt"):
        nanogpt.read(tmp_path)
    torch_files.save({"model": OrderedDict()}, path, monkeypatch)
    with pytest.raises(InputError, match="has no model_args: give a checkpoint"):
        nanogpt.read(path)
    torch_files.save({"model": OrderedDict(), "model_args": {"n_layer": 1}}, path, monkeypatch)
    with pytest.raises(InputError, match="model_args has no vocab_size, n_head"):
        nanogpt.read(path)
    for legacy in (False, True):
        torch_files.save(nano_checkpoint(nano_state(SMALL, random_params(SMALL))), path, monkeypatch, legacy)
        whole = path.read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 40):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError, match="ckpt.pt is damaged or not a file of torch.save.*copy it again"):
                nanogpt.read(path)
    path.write_bytes(pickle.dumps("something else"))
    with pytest.raises(InputError, match="is not a file of torch.save"):
        nanogpt.read(path)


class Foreign:
    """Writes a pickle that calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def in_archive(pickled, path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("where", ["zip", "legacy", "meta"])
@pytest.mark.parametrize("function, name", [(os.system, "posix.system"), (eval, "(builtins|__builtin__).eval")])
def test_a_malicious_pickle_does_not_run(tmp_path, monkeypatch, protocol, where, function, name):
    """The same bytes run when Python's own pickle reads them."""
    trace, path = tmp_path / "trace", tmp_path / "ckpt.pt"
    code = f"touch {trace}" if function is os.system else f"open({str(trace)!r}, 'w').close()"
    pickled = pickle.dumps({"model": Foreign(function, code), "model_args": {}}, protocol)
    if where == "zip":
        in_archive(pickled, path)
    else:
        path.write_bytes(pickled)
    with pytest.raises(InputError, match=f"contains {name}, which is neither"):
        (nanogpt.read_characters if where == "meta" else nanogpt.read)(path)
    assert not trace.exists()
    pickle.loads(pickled)
    assert trace.exists()


@pytest.mark.parametrize("module, name", [
    ("torch", "load"), ("torch.nn.modules.linear", "Linear"), ("numpy.core.multiarray", "scalar"),
    ("collections", "OrderedDict.__init__"), ("builtins", "getattr"), ("torch._utils", "_rebuild_parameter"),
])  # fmt: skip
def test_names_beyond_tensors_are_refused(tmp_path, module, name):
    in_archive(f"c{module}\n{name}\n.".encode(), tmp_path / "ckpt.pt")
    with pytest.raises(InputError, match=f"contains {module}.{name}, which is neither a tensor nor plain data"):
        nanogpt.read(tmp_path)


def test_a_tensor_beyond_its_storage_is_refused(tmp_path, monkeypatch):
    """as_strided would read other memory."""
    numbers = np.arange(6, dtype=np.float32)
    good = Stored(np.empty((2, 2)), numbers, offset=1, stride=(3, 1))
    torch_files.save({"x": good}, tmp_path / "good", monkeypatch)
    with torch_file.opened(tmp_path / "good") as content:
        np.testing.assert_array_equal(content["x"].load(), [[1, 2], [4, 5]])
        assert not content["x"].load().flags.writeable
    for offset, shape, stride in [(2, (2, 2), (3, 1)), (0, (7,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)),
                                  (0, (10**12,), (0,)), (0, (2, 2), (1,))]:  # fmt: skip
        bad = Stored(np.empty(1), numbers, offset=offset, stride=stride)
        bad.shape = shape
        torch_files.save({"x": bad}, tmp_path / "bad", monkeypatch)
        with pytest.raises(InputError, match="is damaged"), torch_file.opened(tmp_path / "bad"):
            pass


def test_a_pickle_cannot_change_the_reader(tmp_path):
    """BUILD sets attributes of whatever was made before it: here of our stand-in for _rebuild_tensor_v2."""
    for state in ({"load": 1}, (None, {"__call__": 1}), (None, {"__class__": OrderedDict})):
        pickled = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + pickle.dumps(state, 2)[2:-1] + b"b."
        with pytest.raises(InputError, match="is damaged"):
            torch_file._unpickle(tmp_path, io.BytesIO(pickled), torch_file._GLOBALS, None)


def test_rows_that_pad_the_vocabulary_are_cut():
    config = GPTConfig(50304, 1, 1, 2, 4)
    params = {"wte": np.arange(50304 * 2).reshape(50304, 2), "wpe": np.zeros((4, 2))}
    cut, found = nanogpt.without_padding(config, params, None)
    assert (cut.vocab_size, found["wte"].shape) == (50257, (50257, 2)) and found["wpe"] is params["wpe"]
    np.testing.assert_array_equal(found["wte"], params["wte"][:50257])
    assert nanogpt.without_padding(config, params, 50304)[0] is config  # a tokenizer that uses all of them
    assert nanogpt.without_padding(config, params, 300)[0] is config
    exact = dataclasses.replace(config, vocab_size=50257)
    assert nanogpt.without_padding(exact, params, 50257)[0] is exact


@pytest.mark.parametrize("vocabulary", ["meta", "padded", "none"])
def test_nanogpt_becomes_a_workdir(tmp_path, monkeypatch, capsys, vocabulary):
    """With the characters of meta.pkl in their own order, or a tokenizer of fewer tokens than padded rows."""
    text = "to be, or not\n"
    characters = sorted(set(text), reverse=True)
    tokenizer = train_bpe([text * 20], 260)
    size, rows = {"meta": (len(characters),) * 2, "padded": (tokenizer.vocab_size, 320), "none": (99, 99)}[vocabulary]
    config = dataclasses.replace(SMALL, vocab_size=rows)
    params = random_params(config)
    (tmp_path / "out").mkdir()
    checkpoint = nano_checkpoint(nano_state(config, params), vocab_size=rows)
    torch_files.save(checkpoint, tmp_path / "out/ckpt.pt", monkeypatch)
    source = tmp_path / "out/ckpt.pt"
    with pytest.raises(InputError, match="There is no usable tokenizer next to the weights.*--tokenizer=DIR"):
        convert.import_weights(source, tmp_path / "w", form="nanogpt")
    given = None
    if vocabulary == "meta":
        itos = dict(enumerate(characters))
        meta = {"vocab_size": size, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        (tmp_path / "out/meta.pkl").write_bytes(pickle.dumps(meta))
    elif vocabulary == "padded":
        tokenizer.save(tmp_path / "tok")
        given = str(tmp_path / "tok")
    else:
        given = "none"
    convert.import_weights(source, tmp_path / "w", given, form="nanogpt")
    printed = capsys.readouterr().out
    assert "note: The optimizer state is not imported." in printed
    padding = f"note: Of the 320 vocabulary rows the last {320 - size} stand for no token and are cut."
    assert (padding in printed) == (vocabulary == "padded")
    if vocabulary == "none":
        return
    model = load_model(tmp_path / "w")
    assert model.config.vocab_size == model.tokenizer.vocab_size == size
    np.testing.assert_array_equal(model.params["wte"], params["wte"][:size])
    if vocabulary == "meta":
        assert model.tokenizer.encode(text) == [characters.index(c) for c in text]
        assert model.tokenizer.decode(range(size)) == "".join(characters)


@pytest.mark.parametrize(
    "meta, message",
    [
        ({"vocab_size": 3}, "does not give a character for each id"),
        ({"itos": {0: "a", 2: "b"}}, "does not give a character for each id"),
        ({"itos": ["a", "bc"]}, "does not give a character for each id"),
        ({"itos": ["a", "a"]}, "two ids for a character"),
        ({"itos": {0: "a", 1: "b"}, "stoi": {"a": 1, "b": 0}}, "two ids for a character"),
    ],
)
def test_a_meta_that_is_no_tokenizer(tmp_path, meta, message):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    with pytest.raises(InputError, match=message):
        nanogpt.read_characters(tmp_path / "meta.pkl")


def test_characters_in_order_are_our_character_tokenizer():
    text = "hello, world\n"
    assert nanogpt.character_tokenizer_of(sorted(set(text))).fingerprint == character_tokenizer([text]).fingerprint


# --- OpenAI's GPT-1 ---------------------------------------------------------------------------------------

TINY = GPTConfig(11, 2, 2, 128, 5, norm="post", dropout=0.1)
# The order of train.py's variables, written out again: a swap in the module's list would survive a round trip.
BLOCK = (("attn", "c_attn", "kernel"), ("attn", "c_attn", "bias"), ("attn", "c_proj", "kernel"),
         ("attn", "c_proj", "bias"), ("ln_1", "scale"), ("ln_1", "bias"), ("mlp", "c_fc", "kernel"),
         ("mlp", "c_fc", "bias"), ("mlp", "c_proj", "kernel"), ("mlp", "c_proj", "bias"), ("ln_2", "scale"),
         ("ln_2", "bias"))  # fmt: skip


def released(directory, params, files=10):
    """OpenAI's files of these parameters; the cuts between files fall inside tensors."""
    tensors = [params["wpe"], params["wte"]]
    for i in range(len(params["blocks"]["ln_1"]["bias"])):
        for path in BLOCK:
            array = params["blocks"]
            for key in path:
                array = array[key]
            array = array[i].reshape(array[i].shape[0], -1) if path[-1] == "kernel" else array[i].ravel()
            tensors.append(array[None] if path[-1] == "kernel" else array)
    directory.mkdir()
    (directory / "params_shapes.json").write_text(json.dumps([list(tensor.shape) for tensor in tensors]))
    vector = np.concatenate([tensor.ravel() for tensor in tensors])
    for i, part in enumerate(np.array_split(vector, files)):
        np.save(directory / f"params_{i}.npy", part)
    return directory


def test_the_release_of_gpt1_is_bitwise(tmp_path):
    params = random_params(TINY)
    config, found = gpt1.read(released(tmp_path / "model", params))
    assert config == TINY
    assert_same(found, params)


def test_the_shapes_that_openai_published():
    """params_shapes.json of the repository, whose 12 layers follow one pattern."""
    block = [[1, 768, 2304], [2304], [1, 768, 768], [768], [768], [768], [1, 768, 3072], [3072], [1, 3072, 768], [768],
             [768], [768]]  # fmt: skip
    rows = gpt1._rows(GPT1)
    found = [list(row.shape) for row in rows if not row.stacked] + 12 * [list(row.shape) for row in rows if row.stacked]
    assert found == [[512, 768], [40478, 768], *12 * block]


def test_the_release_becomes_a_workdir_and_is_exported(tmp_path):
    params = random_params(TINY)
    directory = released(tmp_path / "model", params)
    tokens = ["<unk>", *"abcd", *(f"{c}</w>" for c in "abcd"), "ab", "\n</w>"]
    (directory / "encoder_bpe_40000.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (directory / "vocab_40000.bpe").write_text("#version: 0.2\na b\n")
    convert.import_weights(directory, tmp_path / "w", form="gpt1")
    model = load_model(tmp_path / "w")
    assert model.tokenizer.fingerprint == load_gpt1(directory).fingerprint and model.config.dropout == 0.1
    convert.export_weights(tmp_path / "w", tmp_path / "hf", max_shard_size="100KB")
    assert_same(huggingface.read(tmp_path / "hf")[1], params)


def test_faults_of_the_release(tmp_path):
    directory = released(tmp_path / "model", random_params(TINY))
    shapes = json.loads((directory / "params_shapes.json").read_text())

    def refused(match, changed=None):
        (directory / "params_shapes.json").write_text(json.dumps(shapes if changed is None else changed))
        with pytest.raises(InputError, match=match) as error:
            gpt1.read(directory)
        return [line.strip() for line in str(error.value).splitlines()[1:-1]]

    changed = [*shapes, [7]]
    changed[3], changed[8] = [128, 3], [128, 512]
    assert refused("does not describe a GPT-1 of 2 layers and 128 features", changed) == [
        "mis-shaped h0/attn/c_attn/b: expected shape [384], found [128, 3]",
        "mis-shaped h0/mlp/c_fc/w: expected shape [1, 128, 512], found [128, 512]",
        "extra tensor 26: expected none, found shape [7]",
    ]
    assert refused("does not describe", shapes[:-2]) == [
        "missing h1/ln_2/g: expected shape [128]", "missing h1/ln_2/b: expected shape [128]",
    ]  # fmt: skip
    refused("Its width 96 is not a multiple of 64", [[5, 96], [11, 96], *shapes[2:]])
    refused("is not a list of shapes", [[5, "128"]])
    refused("does not describe a GPT-1", [])
    fifth = directory / "params_5.npy"
    whole = fifth.read_bytes()
    fifth.write_bytes(whole[:-4])
    refused("params_5.npy is damaged or cut off")
    np.save(fifth, np.load(io.BytesIO(whole))[:-1])
    refused("numbers and params_shapes.json describes 398,592")
    np.save(fifth, np.load(io.BytesIO(whole)).astype(np.float64))
    refused("has float64 of shape .* and not a vector of float32")
    np.save(fifth, np.array([Foreign(os.system, f"touch {tmp_path / 'trace'}")]), allow_pickle=True)
    refused("params_5.npy is damaged")
    assert not (tmp_path / "trace").exists()
    fifth.unlink()
    refused("has no params_5.npy: give the folder model/")
