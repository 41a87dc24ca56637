"""Token shards: contents and counts, the split, reuse, atomic replacement, and every error."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from gptjax.data import prepare as prepare_module
from gptjax.data import sources, tokens
from gptjax.data.bpe import character_tokenizer
from gptjax.data.lm import Windows
from gptjax.data.prepare import prepare
from gptjax.data.tokens import TokenShards, open_shards
from gptjax.data.validation import warn_if_few
from gptjax.errors import InputError

SHAKESPEARE = Path(__file__).parents[2] / "shared" / "data" / "lm" / "tinyshakespeare" / "input.txt"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path):
    """A source of 40 documents, each one line that names it."""
    folder = tmp_path / "source"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text(f"document {i:02d} says é{'!' * i}\n")
    return folder


def make(source, directory, tokenizer="bpe:300", **options):
    return prepare(str(source), tokenizer, directory, **{"progress": False, **options})


def everything(shards):
    return shards.read(np.array([0]), len(shards))[0]


def texts(tokenizer, shards):
    return tokenizer.decode(everything(shards)).split("<|endoftext|>")[:-1]


def state(directory):
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in directory.rglob("*") if p.is_file()}


def test_documents_end_with_end_of_text_and_are_counted(folder, tmp_path):
    tokenizer, splits = make(folder, tmp_path / "tokens")
    parts = {name: texts(tokenizer, shards) for name, shards in splits.items()}
    assert sorted(parts["train"] + parts["validation"]) == [d.text for d in sources.documents(str(folder))]
    for name, shards in splits.items():
        assert parts[name] == sorted(parts[name]) and parts[name]
        assert shards.documents == len(parts[name])
        assert shards.bytes == sum(len(t.encode()) for t in parts[name])
        assert tokenizer.byte_lengths[everything(shards)].sum() == shards.bytes + shards.documents
        assert (shards.dtype, shards.vocab_size, shards.eot_id) == (np.uint16, 300, 299)
    again, same = open_shards(tmp_path / "tokens")
    assert again.fingerprint == tokenizer.fingerprint
    np.testing.assert_array_equal(everything(same["train"]), everything(splits["train"]))


def test_split_depends_on_seed_and_name_alone(folder, tmp_path):
    tokenizer, splits = make(folder, tmp_path / "a", validation=0.3)
    held_out = set(texts(tokenizer, splits["validation"]))
    assert 4 <= len(held_out) <= 20
    _, other = make(folder, tmp_path / "b", validation=0.3, seed=1)
    assert set(texts(_, other["validation"])) != held_out
    for i in range(0, 40, 2):  # the rest stays on its side
        (folder / f"{i:02d}.txt").unlink()
    tokenizer, splits = make(folder, tmp_path / "c", validation=0.3)
    left = {d.text for d in sources.documents(str(folder))}
    assert set(texts(tokenizer, splits["validation"])) == held_out & left


@pytest.mark.parametrize("fraction, held_out", [(1e-9, 1), (1 - 1e-9, 39)])
def test_each_side_gets_a_document(folder, tmp_path, fraction, held_out):
    _, splits = make(folder, tmp_path / "tokens", validation=fraction)
    assert (splits["validation"].documents, splits["train"].documents) == (held_out, 40 - held_out)


def test_two_documents(tmp_path):
    for seed in range(6):
        (tmp_path / "x.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
        _, splits = make(tmp_path / "x.jsonl", tmp_path / str(seed), "char", seed=seed)
        assert {k: v.documents for k, v in splits.items()} == {"train": 1, "validation": 1}


def test_tokenizer_sees_the_train_split_only(folder, tmp_path):
    (tmp_path / "held_out.txt").write_text("zqzqzqzq" * 500)
    tokenizer, splits = make(folder, tmp_path / "tokens", validation=str(tmp_path / "held_out.txt"))
    assert (splits["train"].documents, splits["validation"].documents) == (40, 1)
    assert "zq" not in [tokenizer.decode([i]) for i in range(300)]


def test_single_document_is_cut(tmp_path):
    text = "".join(chr(97 + i % 20) for i in range(1000))
    (tmp_path / "one.txt").write_text(text)
    tokenizer, splits = make(tmp_path / "one.txt", tmp_path / "tokens", "char", validation=0.25)
    assert tokenizer.decode(everything(splits["train"])) == text[:750]
    assert tokenizer.decode(everything(splits["validation"])) == text[750:]
    assert splits["train"].eot_id is None


def test_characters_of_the_validation_split_are_known(tmp_path):
    (tmp_path / "one.txt").write_text("a" * 99 + "b")
    tokenizer, splits = make(tmp_path / "one.txt", tmp_path / "tokens", "char")
    assert tokenizer.decode(everything(splits["validation"])) == "a" * 9 + "b"


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="tinyshakespeare is not on this machine")
def test_nanogpt_counts(tmp_path):
    tokenizer, splits = make(SHAKESPEARE, tmp_path / "tokens", "char")
    assert tokenizer.vocab_size == 65
    assert (len(splits["train"]), len(splits["validation"])) == (1_003_854, 111_540)  # nanoGPT's prepare.py


@pytest.mark.parametrize("shard_tokens", [1, 7, 100, 2**27])
def test_reading_over_shards(folder, tmp_path, shard_tokens, monkeypatch):
    monkeypatch.setattr(tokens, "_OPEN_SHARDS", 2)
    if shard_tokens == 1:
        for i in range(15, 40):
            (folder / f"{i:02d}.txt").unlink()
    _, splits = make(folder, tmp_path / "tokens", shard_tokens=shard_tokens)
    train = splits["train"]
    files = sorted((tmp_path / "tokens").glob("train-*.bin"))
    assert len(files) == -(-len(train) // shard_tokens)
    whole = np.concatenate([np.fromfile(f, "<u2") for f in files])
    starts = np.random.default_rng(0).integers(0, len(train) - 30, 50)
    starts[:2] = 0, len(train) - 30
    out = train.read(starts, 30)
    assert out.dtype == np.int32 and out.shape == (50, 30)
    np.testing.assert_array_equal(out, [whole[s : s + 30] for s in starts])
    for bad in (-1, len(train) - 29):
        with pytest.raises(IndexError):
            train.read(np.array([0, bad]), 30)


def test_long_documents_stream(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "_BATCH", 1000)
    text = "a line of text\n" * 20_000
    (folder / "long.txt").write_text(text)
    tokenizer, splits = make(folder, tmp_path / "tokens")
    parts = texts(tokenizer, splits["train"]) + texts(tokenizer, splits["validation"])
    assert text in parts and len(parts) == 41


def test_unchanged_is_reused_without_reading_the_source(folder, tmp_path, monkeypatch):
    make(folder, tmp_path / "tokens")
    before = state(tmp_path / "tokens")
    monkeypatch.setattr(sources, "documents", None)
    (tmp_path / ".tokens.lock").unlink()
    make(folder, tmp_path / "tokens")
    make(folder, str(tmp_path / "tokens"))
    assert state(tmp_path / "tokens") == before
    assert not (tmp_path / ".tokens.lock").exists()  # reuse writes nothing, so a read-only disk will do


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 1},
        {"validation": 0.2},
        {"tokenizer": "bpe:301"},
        {"shard_tokens": 50},
        {"text_field": "body"},
        {"token_dtype": "uint32"},
    ],
    ids=str,
)
def test_another_request_has_its_own_folder(folder, tmp_path, options):
    """A run that has memory-mapped the first tokens keeps reading those."""
    _, running = make(folder, tmp_path / "tokens", shard_tokens=100, by_content=True)
    before, expected = state(tmp_path / "tokens"), TokenShards.read(running["train"], np.array([0]), 10)
    _, other = make(folder, tmp_path / "tokens", **{"shard_tokens": 100, "by_content": True, **options})
    assert other["train"].directory != running["train"].directory
    assert other["train"].directory.parent == running["train"].directory.parent == tmp_path / "tokens"
    now = state(running["train"].directory)
    assert now == {name: before[name] for name in now}
    np.testing.assert_array_equal(everything(running["train"])[:10], expected[0])
    with pytest.raises(InputError, match="contains tokens that differ in .*: give another directory"):
        make(folder, running["train"].directory, **{"shard_tokens": 100, **options})
    assert state(running["train"].directory) == now


def test_changed_source_is_prepared_again(folder, tmp_path):
    make(folder, tmp_path / "tokens", by_content=True)
    (folder / "00.txt").write_text("something new")
    tokenizer, splits = make(folder, tmp_path / "tokens", by_content=True)
    assert "something new" in texts(tokenizer, splits["train"]) + texts(tokenizer, splits["validation"])


def test_changed_validation_source_is_prepared_again(folder, tmp_path):
    held_out = tmp_path / "held_out.txt"
    for text in ("first text", "quite another"):
        held_out.write_text(text)
        tokenizer, splits = make(folder, tmp_path / "tokens", validation=str(held_out), by_content=True)
        assert texts(tokenizer, splits["validation"]) == [text]


def test_tokenizer_of_another_run(folder, tmp_path):
    first, _ = make(folder, tmp_path / "a")
    second, splits = make(folder, tmp_path / "b", str(tmp_path / "a" / "tokenizer"))
    assert second.fingerprint == first.fingerprint
    before = state(tmp_path / "b")
    (tmp_path / "a").rename(tmp_path / "moved")  # the same tokenizer from another place
    make(folder, tmp_path / "b", str(tmp_path / "moved" / "tokenizer"))
    assert state(tmp_path / "b") == before


def test_deterministic(folder, tmp_path):
    for name in "ab":
        make(folder, tmp_path / name)
    for file in ("train-00000.bin", "validation-00000.bin", "manifest.json", "tokenizer/tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_token_dtype(folder, tmp_path):
    assert prepare_module._token_dtype(None, 65536) == np.uint16 == prepare_module._token_dtype("uint16", 65536)
    assert prepare_module._token_dtype(None, 65537) == np.uint32
    with pytest.raises(InputError, match="70000 does not fit into token dtype uint16: use uint32"):
        make(folder, tmp_path / "tokens", "bpe:70000", token_dtype="uint16")
    with pytest.raises(InputError, match="The token dtype 'int8' is unknown: use 'uint16'"):
        make(folder, tmp_path / "tokens", token_dtype="int8")
    _, splits = make(folder, tmp_path / "tokens", token_dtype="uint32")
    assert splits["train"].dtype == np.uint32
    assert splits["train"].read(np.array([0]), 5).dtype == np.int32


@pytest.mark.parametrize("validation", [0, 1, -0.5, 2.0])
def test_bad_fraction(folder, tmp_path, validation):
    with pytest.raises(InputError, match="is not between 0 and 1: change it"):
        make(folder, tmp_path / "tokens", validation=validation)


def test_other_bad_input(folder, tmp_path):
    with pytest.raises(InputError, match="must be a local directory"):
        make(folder, "gs://bucket/tokens")
    with pytest.raises(InputError, match="A shard of 0 tokens is not possible: give a positive number"):
        make(folder, tmp_path / "tokens", shard_tokens=0)
    (tmp_path / "c.txt").write_text("x")
    with pytest.raises(InputError, match="1 characters, too few to hold out .*: give more text"):
        make(tmp_path / "c.txt", tmp_path / "tokens", "char")
    with pytest.raises(InputError, match="has no manifest.json: give a directory of token shards"):
        open_shards(tmp_path / "nowhere")
    assert not (tmp_path / "tokens").exists()


def test_a_directory_with_other_files_is_not_touched(folder, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="contains other files than token shards: give another"):
        make(folder, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    make(folder, tmp_path / "empty")


def test_flipped_bit_is_found(folder, tmp_path):
    make(folder, tmp_path / "tokens", shard_tokens=100)
    path = tmp_path / "tokens" / "train-00001.bin"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    for attempt in (
        lambda: open_shards(tmp_path / "tokens"),
        lambda: make(folder, tmp_path / "tokens", shard_tokens=100),
    ):
        with pytest.raises(InputError, match="train-00001.bin does not have its manifest's hash: delete .*tokens, and"):
            attempt()
    data[5] ^= 1
    path.write_bytes(data)
    open_shards(tmp_path / "tokens")


def test_shortened_missing_or_mixed_up_files(folder, tmp_path):
    make(folder, tmp_path / "tokens")
    make(folder, tmp_path / "other", "bpe:310")
    shard = tmp_path / "tokens" / "validation-00000.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-2])
    with pytest.raises(InputError, match=f"has {len(data) - 2} bytes, not the {len(data)}"):
        open_shards(tmp_path / "tokens")
    shard.unlink()
    with pytest.raises(InputError, match="validation-00000.bin is missing: delete"):
        open_shards(tmp_path / "tokens")
    shard.write_bytes(data)
    for name in ("tokenizer.json", "tokenizer_meta.json"):
        (tmp_path / "other" / "tokenizer" / name).replace(tmp_path / "tokens" / "tokenizer" / name)
    with pytest.raises(InputError, match="is not that of its tokens: delete"):
        open_shards(tmp_path / "tokens")
    manifest = tmp_path / "tokens" / "manifest.json"
    whole = manifest.read_text()
    for text in (whole[:100], whole.replace('"vocab_size": 300', '"vocab_size": 301'), "[]", "{}"):
        manifest.write_text(text)
        with pytest.raises(InputError, match="manifest.json is damaged .*: delete"):
            make(folder, tmp_path / "tokens")


def test_hashes_are_taken_once(folder, tmp_path, monkeypatch):
    make(folder, tmp_path / "tokens")
    hashed = []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: hashed.append(self.name) or original(self, *a, **k))
    open_shards(tmp_path / "tokens")
    assert not [name for name in hashed if name.endswith(".bin")]
    os.utime(tmp_path / "tokens" / "train-00000.bin", (1, 1))
    for _ in range(2):
        open_shards(tmp_path / "tokens")
    assert [name for name in hashed if name.endswith(".bin")] == ["train-00000.bin"]


def test_failure_half_way_leaves_the_old_one(folder, tmp_path, monkeypatch):
    _, splits = make(folder, tmp_path / "tokens", by_content=True)
    before = state(splits["train"].directory)
    (folder / "99.txt").write_bytes(b"a text")
    (folder / "zz.jsonl").write_text("{broken")
    with pytest.raises(InputError, match="zz.jsonl:1"):
        make(folder, tmp_path / "tokens", by_content=True)
    (folder / "zz.jsonl").unlink()

    def full(self, *_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module._Writer, "write", full)
        with pytest.raises(InputError, match="The disk is full .*: free some space"):
            make(folder, tmp_path / "tokens", by_content=True)
    assert state(splits["train"].directory) == before
    assert [p for p in (tmp_path / "tokens").iterdir() if p.is_dir()] == [splits["train"].directory]


KILLED = """
import os, signal, sys
from gptjax.data import prepare
writes = 0
original = prepare._Writer.write
def write(self, ids):
    global writes
    original(self, ids)
    writes += 1
    if writes == 30:
        self._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
prepare._Writer.write = write
prepare.prepare(sys.argv[1], "bpe:300", sys.argv[2], progress=False)
"""


def test_killed_half_way_is_not_used(folder, tmp_path):
    command = [sys.executable, "-c", KILLED, str(folder), str(tmp_path / "tokens")]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert not (tmp_path / "tokens").exists()
    assert (tmp_path / ".tokens.partial").exists()
    tokenizer, splits = make(folder, tmp_path / "tokens")
    assert sum(s.documents for s in splits.values()) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tokens.lock", "source", "tokens"]


SLOW = """
import sys, time
from gptjax.data import prepare
original = prepare._write
def write(*args):
    print("writing", flush=True)
    time.sleep(1)
    original(*args)
prepare._write = write
prepare.prepare(sys.argv[1], "bpe:300", sys.argv[2], progress=False)
"""


@pytest.mark.skipif(prepare_module.fcntl is None, reason="no file locks on this system")
def test_two_processes_make_it_once(folder, tmp_path):
    command = [sys.executable, "-c", SLOW, str(folder), str(tmp_path / "tokens")]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    written = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sorted(written) == ["", "writing\n"]


def test_manifest_names_its_source(folder, tmp_path):
    make(folder, tmp_path / "tokens", seed=3)
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert manifest["source"] == str(folder) and manifest["tokenizer"] == "bpe:300"
    assert manifest["request"]["source_fingerprint"] == sources.fingerprint(str(folder))
    assert manifest["request"]["seed"] == 3
    shard = manifest["splits"]["train"]["shards"][0]
    assert shard["file"] == "train-00000.bin" and len(shard["sha256"]) == 64


def test_progress_goes_to_stderr(folder, tmp_path, capsys):
    started = time.time()
    shards = make(folder, tmp_path / "tokens", progress=True)[1]
    assert isinstance(shards["train"], TokenShards) and time.time() - started < 30
    assert capsys.readouterr().out == ""


# --- document separators ------------------------------------------------------------------------


def test_documents_without_end_of_text_are_separated(folder, tmp_path):
    """By a blank line, and only between documents: a single document has none."""
    tokenizer, splits = make(folder, tmp_path / "tokens", "char")
    parts = [tokenizer.decode(everything(shards)).split("\n\n\n") for shards in splits.values()]  # each ends with one
    texts = sorted(part.rstrip("\n") + "\n" for part in parts[0] + parts[1])
    assert texts == [d.text for d in sources.documents(str(folder))]
    for shards, documents in zip(splits.values(), parts, strict=True):
        assert shards.documents == len(documents) > 1
        assert shards.bytes == sum(len(d.rstrip("\n").encode()) + 1 for d in documents)


def test_characters_without_a_line_break_get_one_to_separate_documents(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "ab"}\n{"text": "ba"}\n{"text": "bb"}\n{"text": "aa"}\n')
    tokenizer, splits = make(tmp_path / "x.jsonl", tmp_path / "tokens", "char", validation=0.5)
    assert tokenizer.vocab_size == 3
    shown = [tokenizer.decode(everything(s)).split("\n\n") for s in splits.values()]
    assert sorted(shown[0] + shown[1]) == ["aa", "ab", "ba", "bb"]
    (tmp_path / "one").mkdir()
    character_tokenizer(["ab"]).save(tmp_path / "one")
    with pytest.raises(InputError, match="several documents, but the tokenizer has neither end-of-text nor a line"):
        make(tmp_path / "x.jsonl", tmp_path / "other", str(tmp_path / "one"))
    (tmp_path / "y.txt").write_text("ab" * 20)  # one document: nothing to separate
    assert make(tmp_path / "y.txt", tmp_path / "y", str(tmp_path / "one"))[1]["train"].documents == 1
    assert make(tmp_path / "y.txt", tmp_path / "z", "char")[0].vocab_size == 2


# --- which text is held out -------------------------------------------------------------------------------


def test_a_single_document_is_split_by_position_with_a_message(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("".join(f"name {i}\n" for i in range(50)))
    make(tmp_path / "x.txt", tmp_path / "a", "char")
    (line,) = capsys.readouterr().out.splitlines()
    assert "is a single document, so the last 0.1 of its characters are held out. (data.split=lines" in line
    make(tmp_path / "x.txt", tmp_path / "b", "char", split="position")
    assert capsys.readouterr().out == ""
    for name in ("train-00000.bin", "validation-00000.bin"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_split_by_lines(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("".join(f"name {i}\n" for i in range(50)))
    tokenizer, splits = make(tmp_path / "x.txt", tmp_path / "a", split="lines")
    assert capsys.readouterr().out == ""
    parts = [texts(tokenizer, shards) for shards in splits.values()]
    assert sorted(parts[0] + parts[1]) == sorted(f"name {i}" for i in range(50))
    assert 1 < len(parts[1]) < 15
    tokenizer, splits = make(tmp_path / "x.txt", tmp_path / "b", "char", split="lines")
    assert set(tokenizer.decode(everything(splits["validation"])).split("\n\n")) == set(parts[1])


def test_split_of_several_documents_by_position(folder, tmp_path):
    text = "".join(d.text for d in sources.documents(str(folder)))
    tokenizer, splits = make(folder, tmp_path / "a", split="position", validation=0.27)
    shown = {name: "".join(texts(tokenizer, shards)) for name, shards in splits.items()}
    end = int(len(text) * (1 - 0.27))
    assert shown == {"train": text[:end], "validation": text[end:]}
    assert splits["train"].documents + splits["validation"].documents == 41  # one of them in both


def test_document_separator_in_the_text(tmp_path):
    (tmp_path / "x.txt").write_text("<|endoftext|>\n".join(f"story {i}\n" for i in range(30)))
    tokenizer, splits = make(tmp_path / "x.txt", tmp_path / "a", document_separator="<|endoftext|>")
    parts = [texts(tokenizer, shards) for shards in splits.values()]
    assert sorted(parts[0] + parts[1]) == sorted(f"story {i}" for i in range(30))
    with pytest.warns(UserWarning, match="contains .* 29 times"):
        tokenizer, splits = make(tmp_path / "x.txt", tmp_path / "b")
    assert tokenizer.eot_id not in everything(splits["train"])[:-1]  # what is written in text never becomes the token


def test_invalid_split(folder, tmp_path):
    (tmp_path / "x.txt").write_text("one line")
    for split in ("documents", "lines"):
        with pytest.raises(InputError, match=f"has only one of the {split} that .*: use data.split=position"):
            make(tmp_path / "x.txt", tmp_path / "a", "char", split=split)
    with pytest.raises(InputError, match="data.split='rows' is unknown: use one of documents, lines, position"):
        make(folder, tmp_path / "a", split="rows")
    with pytest.raises(InputError, match="data.split=position holds out a fraction.*: set only one"):
        make(folder, tmp_path / "a", split="position", validation=str(tmp_path / "x.txt"))


def test_tokens_of_earlier_versions_still_match(folder, tmp_path):
    make(folder, tmp_path / "tokens")
    request = json.loads((tmp_path / "tokens" / "manifest.json").read_text())["request"]
    assert set(request) == {
        "source_fingerprint", "text_field", "tokenizer", "validation", "seed", "shard_tokens", "token_dtype",
    }  # fmt: skip
    for i, options in enumerate(({"split": "position"}, {"document_separator": "says"})):
        make(folder, tmp_path / str(i), **options)
        asked = json.loads((tmp_path / str(i) / "manifest.json").read_text())["request"]
        assert asked == request | options


def test_too_short_a_split_is_named(folder, tmp_path):
    _, splits = make(folder, tmp_path / "tokens")
    for name, shards in splits.items():
        with pytest.raises(InputError, match=f"The {name} split of {folder} has {len(shards)} tokens, fewer than one"):
            Windows(shards, 5000, seed=0)


def test_few_held_out_examples_are_a_warning(folder, tmp_path):
    _, splits = make(folder, tmp_path / "tokens")
    most = (len(splits["validation"]) - 1) // 20  # with which there are 20 examples
    with pytest.warns(UserWarning, match=f"The validation split of {folder} has only .* of {most + 1} tokens, fewer"):
        warn_if_few(splits["validation"], most + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_few(splits["validation"], most)
