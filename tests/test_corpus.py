"""From a data config to tokens: caches that runs share, what a run records and readers check, mixtures, isolation."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from etils import epath

from gptjax.data import corpus, prepare, records
from gptjax.data.corpus import DataConfig, load_corpus, load_text, pretraining_text
from gptjax.data.records import start_record, write_record
from gptjax.errors import InputError
from gptjax.evaluate import source_text
from gptjax.json_files import write_json
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.rlhf import ptx
from gptjax.training.metrics import dumps


@pytest.fixture
def source(tmp_path):
    for part in ("zoo", "attic"):
        (tmp_path / "source" / part).mkdir(parents=True)
        for i in range(20):
            (tmp_path / "source" / part / f"{i:02d}.txt").write_text(f"{part} document {i:02d} {'ab ' * i}\n")
    return tmp_path / "source"


def begin(c: DataConfig, workdir, seed=0):
    """What pre-training leaves of its text in a new workdir."""
    record = start_record(workdir, False)
    text = load_corpus(c, workdir, seed, record, False)
    write_record(workdir, record, text)
    text.tokenizer.save(epath.Path(workdir) / "tokenizer")
    write_json(workdir / "config.json", {"stage": "pretrain", "seed": seed, "data": dataclasses.asdict(c)})
    return text


def config(source, tmp_path, mixture=False, **more):
    weights = {"zoo": 3.0, "attic": 1.0} if mixture is True else mixture or {}
    c = {"source": str(source), "tokenizer": "bpe:270", "mixture": weights, "cache": str(tmp_path / "cache")}
    return DataConfig(**{**c, **more})


def ids(shards):
    return shards.read(np.array([0]), len(shards))[0].tolist()


@pytest.mark.parametrize("mixture", [False, True])
def test_runs_share_a_cache_and_keep_their_tokens(source, tmp_path, mixture):
    c = config(source, tmp_path, mixture)
    first = begin(c, tmp_path / "one")
    before = [ids(part.train) for part in first.parts]
    for i, (seed, spec) in enumerate(((3, "bpe:270"), (0, "char"))):
        other = begin(dataclasses.replace(c, tokenizer=spec), tmp_path / f"other{i}", seed)
        assert other.fingerprint != first.fingerprint
    again = pretraining_text(tmp_path / "one")
    assert again.fingerprint == first.fingerprint and again.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert [ids(part.train) for part in again.parts] == [ids(part.train) for part in first.parts] == before
    (source / "zoo" / "00.txt").write_text("another text than before")  # a resumed run keeps its tokens
    record = start_record(tmp_path / "one", True)
    assert load_corpus(c, tmp_path / "one", 0, record, True).fingerprint == first.fingerprint


def test_a_reader_refuses_tokens_that_are_not_the_runs(source, tmp_path):
    c = config(source, tmp_path)
    begin(c, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "data.json").read_text())
    record["text"]["parts"][""]["validation"] = "0" * 64
    write_json(tmp_path / "run" / "data.json", record)
    with pytest.raises(InputError, match="are not those that .*run was trained on: restore them"):
        pretraining_text(tmp_path / "run")


def test_a_run_of_an_earlier_version(source, tmp_path):
    """Its tokens are in the cache itself, and its checkpoint has the fingerprint; it keeps its order."""
    c, run = config(source, tmp_path), tmp_path / "run"
    tokenizer, splits = prepare.prepare(c.source, c.tokenizer, c.cache, progress=False)
    tokenizer.save(run / "tokenizer")
    write_json(run / "config.json", {"stage": "pretrain", "seed": 0, "data": dataclasses.asdict(c)})
    (run / "checkpoints" / "2" / "meta").mkdir(parents=True)
    meta = run / "checkpoints" / "2" / "meta" / "metadata"
    meta.write_text(json.dumps({"data": splits["train"].fingerprint}))
    assert pretraining_text(run).fingerprint == splits["train"].fingerprint
    record = start_record(run, True)
    assert record == {"shuffle": 1}
    assert load_corpus(c, run, 0, record, True).parts[0].train.directory == splits["train"].directory
    meta.write_text(json.dumps({"data": "those of another seed"}))
    with pytest.raises(InputError, match="are not those that .*run was trained on: restore them"):
        pretraining_text(run)


def test_every_part_of_a_mixture_is_validated_whatever_the_order_of_its_keys(source, tmp_path):
    texts = [
        load_corpus(config(source, tmp_path, mixture=weights), tmp_path, 0, {}, False)
        for weights in ({"zoo": 3.0, "attic": 1.0}, {"attic": 1.0, "zoo": 3.0})
    ]
    assert texts[0].record == texts[1].record
    assert {part.name: part.weight for part in texts[0].parts} == {"attic": 0.25, "zoo": 0.75}
    batches = texts[0].validation_batches(16, 4)
    assert batches.keys() == {"attic", "zoo"}
    sums = {"attic": (8.0, 4, {"target_bytes": 8}), "zoo": (30.0, 10, {"target_bytes": 40})}
    figures = texts[0].figures(sums)
    assert figures["loss"] == pytest.approx(0.25 * 2 + 0.75 * 3) and figures["tokens"] == 14
    assert (figures["loss/attic"], figures["loss/zoo"]) == (2.0, 3.0)
    assert figures["bits_per_byte"] == pytest.approx(2.75 / np.log(2) / (0.25 * 2 + 0.75 * 4))


def test_a_bad_part_is_named(source, tmp_path):
    for name in ("nowhere", "zzz"):  # the first of the parts, and the last
        c = config(source, tmp_path, mixture={name: 1.0, "zoo": 1.0})
        with pytest.raises(InputError, match=f"^mixture source '{name}': The source .* does not exist"):
            load_corpus(c, tmp_path, 0, {}, False)


@pytest.mark.parametrize("isolate", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_isolation_follows_the_base_through_the_stages(source, tmp_path, isolate, own):
    base = begin(config(source, tmp_path, isolate_documents=isolate), tmp_path / "base")
    base.tokenizer.save(tmp_path / "ppo" / "tokenizer")
    (tmp_path / "sft").mkdir()
    write_json(tmp_path / "sft" / "config.json", {"stage": "sft", "init_from": str(tmp_path / "base"), "data": {}})
    other = str(source / "zoo") if own else None
    text = load_text(other, tmp_path / "sft", tmp_path / "ppo", None, "ptx.cache", 0, start_record("", False), False)
    assert (text.eot_id is not None) == isolate
    batch = text.validation_batches(16, 4)[""][0]
    assert ("segment_ids" in batch) == isolate
    mesh = make_mesh(MeshConfig(data=8))
    on_mesh = ptx.Text(text.examples(16, 0, 2), text, 16).batch(0, (1, 1, 8), 8, mesh)
    assert ("segment_ids" in on_mesh) == isolate == ("positions" in on_mesh)
    if isolate:
        assert on_mesh["segment_ids"].shape == (1, 1, 8, 16) and int(on_mesh["segment_ids"].max()) > 1


def test_isolation_outlives_the_folder_of_the_base(source, tmp_path, capsys):
    """A stage after pre-training records it in its own data.json; otherwise it warns about what it assumes."""
    separation = {"isolate_documents": True, "document_separator": "--", "split": "lines"}
    begin(config(source, tmp_path, **separation), tmp_path / "base")
    for name in ("sft", "old"):
        (tmp_path / name).mkdir()
        base = str(tmp_path / "base")
        write_json(tmp_path / name / "config.json", {"stage": "sft", "init_from": base, "data": {}})
    record = start_record(tmp_path / "sft", False, tmp_path / "base")
    write_record(tmp_path / "sft", record)
    assert records.isolates_documents(tmp_path / "sft") and records.isolates_documents(tmp_path / "old")
    shutil.rmtree(tmp_path / "base")
    assert records.isolates_documents(tmp_path / "sft") is True and capsys.readouterr().err == ""
    assert start_record(tmp_path / "sft", True, tmp_path / "base") == record  # resumed without its base
    assert start_record(tmp_path / "ppo", False, tmp_path / "sft")["documents"] == record["documents"]
    assert records.documents_within(tmp_path / "sft") == {"document_separator": "--", "split": "lines"}
    assert records.isolates_documents(tmp_path / "old") is False
    assert (
        "How documents were separated in pre-training is unknown: the defaults are assumed." in capsys.readouterr().err
    )


def test_a_text_that_is_refused_is_refused_on_every_host(tmp_path, monkeypatch):
    """PPO continues without a text that it does not need, so all hosts must raise the error of the first."""
    (tmp_path / "imported").mkdir()
    write_json(tmp_path / "imported" / "config.json", {"stage": "convert", "data": {}})
    load = lambda: load_text(None, tmp_path / "imported", tmp_path, None, "ptx.cache", 0, {}, False)
    sent = []

    def on_first(make):
        sent.append(json.loads(json.dumps(make())))
        return sent[-1]

    monkeypatch.setattr(corpus.hosts, "from_first", on_first)
    with pytest.raises(InputError, match="The pre-training text of these weights is unknown: give a source"):
        load()
    assert len(sent) == 1
    monkeypatch.setattr(corpus.hosts, "from_first", lambda make: sent[0])
    with pytest.raises(InputError, match="The pre-training text of these weights is unknown: give a source"):
        load()


@pytest.mark.parametrize("how", [{"document_separator": "##"}, {"split": "lines"}, {}])
def test_documents_end_where_they_did_in_pretraining(tmp_path, how):
    (tmp_path / "x.txt").write_text("".join(f"one {i}\n##two {i}\n##\n" for i in range(10)))
    base = begin(config(tmp_path / "x.txt", tmp_path, **how), tmp_path / "base")
    options = records.documents_within(tmp_path / "base")
    assert {k: v for k, v in options.items() if v} == how
    own = sum(part.documents for part in (base.parts[0].train, base.parts[0].validation))
    shards = source_text(str(tmp_path / "x.txt"), base.tokenizer, "text", **options).parts[0].validation
    assert len(shards.spans) == (own if how else 1)
    base.tokenizer.save(tmp_path / "ppo" / "tokenizer")
    text = load_text(str(tmp_path / "x.txt"), tmp_path / "base", tmp_path / "ppo", None, "ptx.cache", 0,
                     start_record("", False), False)  # fmt: skip
    assert sum(part.documents for part in (text.parts[0].train, text.parts[0].validation)) == own


def test_a_remote_workdir_names_the_cache_to_give():
    with pytest.raises(InputError, match="memory://run: give a local folder with --config.mix.cache=DIR"):
        corpus.shards_directory(None, "memory://run", "mix.cache")
    assert corpus.shards_directory("/tmp/x", "memory://run") == "/tmp/x"


def test_a_cache_for_the_text_of_pre_training(source, tmp_path):
    """Its tokens are made again where a later stage cannot have the folder they were in."""
    base = begin(config(source, tmp_path), tmp_path / "base")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no folder can be made here")
    there = lambda cache, record, known: load_text(
        None, tmp_path / "base", tmp_path / "ppo", cache, "ptx.cache", 0, record, known
    )
    with pytest.raises(InputError):
        there(None, start_record("", False), False)
    record = start_record("", False)
    text = there(str(tmp_path / "here"), record, False)
    assert text.fingerprint == base.fingerprint and (tmp_path / "here").is_dir()
    again = there(str(tmp_path / "here"), record | {"text": text.record}, True)
    assert ids(again.parts[0].train) == ids(text.parts[0].train)


def test_bytes_are_the_texts_own_where_the_tokenizer_normalizes(source, tmp_path, monkeypatch):
    """As GPT-1's vocabulary does: over a split, exactly; a lossless tokenizer's tokens stand for the text's bytes."""
    _, splits = prepare.prepare(str(source), "bpe:270", tmp_path / "tokens", progress=False)
    shards = splits["validation"]
    assert shards.byte_ratio == 1.0
    lengths = shards._tokenizer.byte_lengths
    assert lengths[ids(shards)].sum() == shards.bytes + shards.documents  # an end-of-text counts as one
    shards._tokenizer.byte_lengths, shards._tokenizer.lossless = lengths * 2, False
    for recorded in (int(lengths[ids(shards)].sum()) * 2, None):  # of an earlier version: counted
        shards.__dict__.pop("byte_ratio", None)
        shards._token_bytes = recorded
        own = shards.bytes + 2 * shards.documents
        assert shards.byte_ratio * 2 * lengths[ids(shards)].sum() == pytest.approx(own, rel=1e-12)


def test_json_of_a_result_has_no_nan_and_no_infinity():
    value = {"loss": float("nan"), "parts": [float("inf"), {"x": float("-inf"), "y": 1.5}], "n": 3}
    assert json.loads(dumps(value)) == {"loss": None, "parts": [None, {"x": None, "y": 1.5}], "n": 3}
    assert "NaN" not in dumps(value) and "Infinity" not in dumps(value)
