"""The engine of curation: broken input, workers that are killed, one output however the work is divided."""

import bz2
import gzip
import json
import lzma
import random
import signal
import subprocess
import sys
import textwrap
import zlib

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from curation_runs import contents, curated, write_rows

from gptjax import curate as command
from gptjax.curation import plan
from gptjax.curation.config import CurateConfig
from gptjax.curation.documents import Document, Drop
from gptjax.curation.engine import work
from gptjax.curation.exact import Exact
from gptjax.curation.readers import Reading, read
from gptjax.data import sources
from gptjax.errors import InputError


def words(rng, count):
    return " ".join(rng.choices([f"w{i}" for i in range(500)], k=count))


def read_file(path, **how):
    """(documents, faults) of a file."""
    items = list(read({"path": str(path), "name": path.name, "size": path.stat().st_size}, Reading(**how)))
    return [d for d in items if isinstance(d, Document)], [d for d in items if not isinstance(d, Document)]


# --- reading --------------------------------------------------------------------------------------------------


def test_each_fault_costs_its_document_alone(tmp_path):
    lines = [
        b'{"text": "first", "id": 7}', b"no JSON", b'{"text": "caf\xe9"}', b'{"body": "x"}', b'{"text": " \\n"}', b"",
        b'{"text": "' + b"y" * 900 + b'"}', b'{"text": 3}', b'{"text": "\\ud800"}', b'[1]', b'"a text"',
        b'{"text": "last"}',
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    documents, faults = read_file(path, longest=500)
    assert [(d.id, d.text) for d in documents] == [
        ("rows.jsonl:1", "first"), ("rows.jsonl:11", "a text"), ("rows.jsonl:12", "last")
    ]  # fmt: skip
    assert documents[0].fields == {"id": 7}
    assert [(f.id.split(":")[1], f.reason) for f in faults] == [
        ("2", "not_json"), ("3", "invalid_utf8"), ("4", "no_text"), ("5", "empty"), ("7", "too_long"), ("8", "no_text"),
        ("9", "no_text"), ("10", "no_text"),
    ]  # fmt: skip
    assert next(f for f in faults if f.reason == "too_long").size == len(lines[6]) + 1
    replaced, _ = read_file(path, longest=500, invalid_utf8="replace")
    assert [d.text for d in replaced][1] == "caf�"


@pytest.mark.parametrize("suffix, pack", [
    ("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lambda data: lzma.compress(data, preset=0)),
    ("zst", lambda data: pa.compress(data, codec="zstd", asbytes=True)),
])  # fmt: skip
def test_what_comes_before_a_cut_is_read(tmp_path, suffix, pack):
    rng = random.Random(0)
    texts = [f"{i} {rng.getrandbits(4000):x}" for i in range(2000)]
    data = pack("".join(json.dumps({"text": text}) + "\n" for text in texts).encode())
    path = tmp_path / f"rows.jsonl.{suffix}"
    path.write_bytes(data[: len(data) * 6 // 10])
    documents, faults = read_file(path)
    assert [d.text for d in documents] == texts[: len(documents)]
    # the blocks of bzip2 are .9 MB: what is in one that is cut is lost
    assert len(documents) > {"bz2": 800}.get(suffix, 1000)
    assert [(f.id, f.reason) for f in faults] == [(f"{path.name}:rest", "cut")]
    if suffix == "gz":  # every whole line that the bytes before the cut hold
        assert len(documents) == zlib.decompressobj(wbits=31).decompress(path.read_bytes()).count(b"\n")


def test_other_formats(tmp_path):
    (tmp_path / "list.json").write_text(' [{"text": "one"}, {"text": ""}, {"text": "two"}]')
    (tmp_path / "lines.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfall of it\n")
    (tmp_path / "long.txt").write_bytes(b"x" * 5000)
    (tmp_path / "binary").write_bytes(b"\x00\x01")
    pq.write_table(pa.table({"text": ["one", None, "two"], "id": [1, 2, 3]}), tmp_path / "t.parquet")
    (tmp_path / "broken.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-4])
    (tmp_path / "not.gz").write_bytes(b"plain")
    texts = lambda name, **how: [d.text for d in read_file(tmp_path / name, **how)[0]]
    reasons = lambda name, **how: [f.reason for f in read_file(tmp_path / name, **how)[1]]
    assert texts("list.json") == texts("lines.json") == texts("t.parquet") == ["one", "two"]
    assert texts("a.txt") == ["all of it\n"]
    assert reasons("list.json") == ["empty"] and reasons("t.parquet") == ["no_text"]
    assert reasons("long.txt", longest=4999) == ["too_long"] and reasons("binary") == ["not_text"]
    assert reasons("broken.parquet") == reasons("not.gz") == ["damaged"]


# --- the engine -----------------------------------------------------------------------------------------------


def no_digits(document):
    return Drop("digit", score=1.0) if any(c.isdigit() for c in document.text) else document


def halves(document):
    """Splits what has a bar, without what is short."""
    pieces = document.text.split("|")
    if len(pieces) == 1:
        return document
    made = [Document(f"{document.id}#{i}", p, document.fields, place=document.place) for i, p in enumerate(pieces, 1)]
    return [piece if len(piece.text) > 2 else Drop("short", detail=piece.text) for piece in made]


def shout(document):
    document.text, document.edits = document.text.upper(), {"shout": 1}
    return document


def test_the_manifest_says_what_became_of_every_document(tmp_path):
    files = {"a": ["one", "two 2", "ONE", " "], "b": ["three|x|four", {"text": "One ", "id": 5}]}
    files["b"].append({"text": "six", "id": 5})
    summary, records, documents = curated(tmp_path, files, [no_digits, Exact(), halves, shout])
    about = {id: (r["status"], r["step"], r["reason"], r["twin"]) for id, r in records.items()}
    kept = ("kept", None, None, None)
    read = sorted(records, key=lambda id: id.partition("#")[0])  # a record's place is that of its document
    assert [id.partition("#")[0] for id in records] == [id.partition("#")[0] for id in read]
    assert about == {
        "a.jsonl:1": kept, "a.jsonl:2": ("removed", "no_digits", "digit", None),
        "a.jsonl:3": ("removed", "exact", "duplicate", "a.jsonl:1"), "a.jsonl:4": ("unreadable", "read", "empty", None),
        "b.jsonl:1#1": kept, "b.jsonl:1": ("removed", "halves", "short", None), "b.jsonl:1#3": kept,
        "b.jsonl:2": ("removed", "exact", "duplicate", "a.jsonl:1"), "b.jsonl:3": kept,
    }  # fmt: skip
    assert [(d["id"], d["text"]) for d in documents] == [
        ("a.jsonl:1", "ONE"), ("b.jsonl:1#1", "THREE"), ("b.jsonl:1#3", "FOUR"), ("b.jsonl:3", "SIX")
    ]  # fmt: skip
    assert summary["read"] == 6 and summary["kept"] == 4 and summary["unreadable"] == {"empty": 1}
    assert summary["steps"]["no_digits"] | {"chars_in": 0, "chars_out": 0} == {
        "in": 6, "out": 5, "chars_in": 0, "chars_out": 0, "reasons": {"digit": 1}
    }  # fmt: skip
    assert summary["steps"]["exact"]["reasons"] == {"duplicate": 2}
    assert summary["kept_characters"] == sum(len(d["text"]) for d in documents)
    removed = [json.loads(line) for line in (tmp_path / "out/removed/no_digits.digit.jsonl").read_text().splitlines()]
    assert removed == [{"id": "a.jsonl:2", "reason": "digit", "score": 1.0, "text": "two 2"}]
    changed = [json.loads(line) for line in (tmp_path / "out/changed/shout.jsonl").read_text().splitlines()]
    assert {"id": "b.jsonl:3", "before": "six", "after": "SIX"} in changed
    report = (tmp_path / "out/report.html").read_text()
    assert "no_digits" in report and "two 2" in report and "1 digit" in report


def test_pretraining_reads_the_workdir(tmp_path):
    curated(tmp_path, {"a": ["one", "two", "one"]}, [Exact()])
    assert [d.text for d in sources.documents(str(tmp_path / "out"))] == ["one", "two"]
    (tmp_path / "out/manifest.json").unlink()
    with pytest.raises(InputError, match="has not come to its end: run"):
        list(sources.documents(str(tmp_path / "out")))


def test_json_lines_keep_the_fields_of_rows(tmp_path):
    row = {"text": "a", "id": "x7", "url": "http://x", "n": [1, None]}
    curated(tmp_path, {"a": [row]}, [shout], format="jsonl")
    (path,) = (tmp_path / "out/documents").glob("*")
    assert path.read_bytes()[4:8] == bytes(4)  # no time, which would differ from run to run
    assert json.loads(gzip.decompress(path.read_bytes())) == {
        "text": "A", "id": "a.jsonl:1", "source_id": "x7", "url": "http://x", "n": [1, None]
    }  # fmt: skip


def test_repeated_ids(tmp_path):
    files = {"a": [{"text": f"t{i}", "key": key} for i, key in enumerate(["k", "l", "k", None, None])]}
    _, records, _ = curated(tmp_path, files, [Exact()], id_field="key")
    assert [(r["reason"], r["twin"]) for r in records.values()] == [
        (None, None), (None, None), ("repeated_id", "a.jsonl:1"), (None, None), (None, None)
    ]  # fmt: skip


def test_exact_keeps_the_first_and_is_idempotent(tmp_path):
    rng = random.Random(0)
    distinct = [words(rng, 9) for _ in range(60)]
    drawn = [rng.choice(distinct) for _ in range(200)]
    spaced = ["  ".join(t.split()).title() if rng.random() < 0.5 else t for t in drawn]
    files = {name: spaced[i : i + 50] for i, name in zip(range(0, 200, 50), "abcd", strict=True)}
    _, records, documents = curated(tmp_path, files, [Exact()])
    first = {}
    for i, text in enumerate(drawn):
        first.setdefault(text, f"{'abcd'[i // 50]}.jsonl:{i % 50 + 1}")
    assert [d["id"] for d in documents] == list(first.values())
    for i, text in enumerate(drawn):
        record = records[f"{'abcd'[i // 50]}.jsonl:{i % 50 + 1}"]
        assert record["status"] == "kept" or record["twin"] == first[text]
    again, _, _ = curated(tmp_path / "again", {"a": [d["text"] for d in documents]}, [Exact()])
    assert again["kept"] == again["read"] == len(first)


STEPS = """
    import os, signal, time
    from pathlib import Path
    from gptjax.curation.documents import Drop
    from gptjax.curation.exact import Exact

    def fatal(document):
        marker = Path(os.environ.get("FATAL", ""))
        if document.id == "c.jsonl:20" and marker.is_file():
            marker.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return Drop("short") if len(document.text) < 30 else document

    def get_steps(config):
        return [fatal, Exact()]
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """(config, its file, the output of a run in this process)."""
    folder = tmp_path_factory.mktemp("recipe")
    (folder / "steps.py").write_text(textwrap.dedent(STEPS))
    rng = random.Random(1)
    texts = [words(rng, rng.randrange(3, 30)) for _ in range(200)]
    source = write_rows(folder / "in", {name: rng.choices(texts, k=50) for name in "abcdef"})
    config = CurateConfig(input=str(source), shard_bytes=1)
    path = str(folder / "steps.py")
    assert work(plan.begin(config, plan.load_steps(path, config), folder / "one", path))
    return config, path, contents(folder / "one")


@pytest.fixture
def quiet_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_two_workers_of_which_one_is_killed_write_the_same(recipe, tmp_path, monkeypatch, quiet_signals):
    config, path, expected = recipe
    (tmp_path / "kill").touch()
    monkeypatch.setenv("FATAL", str(tmp_path / "kill"))
    summary = command.curate(config, path, tmp_path / "two", workers=2)
    assert not (tmp_path / "kill").exists() and summary["read"] == 300
    assert contents(tmp_path / "two") == expected and len(expected) > 12


def test_four_workers_and_a_command_that_was_killed(recipe, tmp_path, monkeypatch, quiet_signals):
    config, path, expected = recipe
    run = plan.begin(config, plan.load_steps(path, config), tmp_path / "four", path)
    stages = {name: (tasks, do) for name, tasks, do in run.stages()}
    queue = run.queue("phase-0")
    for index in (0, 3):  # two are done, one was begun by a process that is no more, and has left half a file
        task = stages["phase-0"][0][index]
        queue.keep(queue.acquire([task]), json.loads(json.dumps(stages["phase-0"][1](index))))
    queue.me = queue.me | {"pid": 2**22 + 1}
    queue.acquire(["00004"])
    (run.workdir / "work" / "phase-0" / ".00004.documents.parquet.x.1.tmp").write_bytes(b"half")
    command.curate(config, path, tmp_path / "four", workers=4)
    assert contents(tmp_path / "four") == expected
    assert command.curate(config, path, tmp_path / "four") is not None  # finished: nothing to do


def test_a_step_that_fails_ends_the_run_with_its_document(tmp_path):
    def divide(document):
        return document if len(document.text) / (len(document.text) - 3) else document

    source = write_rows(tmp_path / "in", {"a": ["four", "two"]})
    run = plan.begin(CurateConfig(input=str(source)), [divide], tmp_path / "out", "-")
    assert not work(run)
    (sentence,) = command.failures(run)
    assert "phase-0/00000: The step divide failed on a.jsonl:2 (ZeroDivisionError" in sentence
    command.retry(run)
    (tmp_path / "in/a.jsonl").write_text('{"text": "four"}\n')
    assert work(run)


def test_refused(tmp_path):
    source = write_rows(tmp_path / "in", {"a": ["one"]})
    begin = lambda steps=(no_digits,), **config: plan.begin(
        CurateConfig(**{"input": str(source)} | config), list(steps), tmp_path / "out", "-"
    )
    with pytest.raises(InputError, match="No file matches"):
        begin(input=str(tmp_path / "*.none"))
    with pytest.raises(InputError, match="config.input is not set: give the text with --config.input=PATH"):
        begin(input=None)
    with pytest.raises(InputError, match="is not a local folder"):
        plan.begin(CurateConfig(input=str(source)), [no_digits], "gs://bucket/x", "-")
    with pytest.raises(InputError, match="Two steps have the name 'no_digits'"):
        begin([no_digits, no_digits])
    with pytest.raises(InputError, match="config.good and config.bad"):
        begin(good="x")
    with pytest.raises(InputError, match="config.format='csv' is unknown"):
        begin(format="csv")
    begin()
    with pytest.raises(InputError, match=r"holds another curation: config.seed was 0, not 1. Give another --workdir"):
        begin(seed=1)
    with pytest.raises(InputError, match="its steps were test_curation_engine.no_digits"):
        begin([shout])
    write_rows(tmp_path / "in", {"b": ["two"]})
    with pytest.raises(InputError, match="files of its input have changed"):
        begin()


def test_small_files_are_read_together():
    files = [{"path": f, "name": f, "size": size} for f, size in zip("abcde", (30, 30, 50, 200, 1), strict=True)]
    made = plan.shards(files, CurateConfig(input="x", shard_bytes=100))
    assert [[f["name"] for f in shard] for shard in made] == [["a", "b"], ["c"], ["d"], ["e"]]


def test_a_worker_needs_no_jax():
    code = """if True:
        import gptjax.curation.worker, sys
        from gptjax.curation.config import CurateConfig
        from gptjax.curation.plan import load_steps
        for name in ("gpt3", "fineweb"):
            assert load_steps(f"configs/curate/{name}.py", CurateConfig("in", good="a", bad="b", evaluation="c"))
        sys.exit("jax" in sys.modules)
    """
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
