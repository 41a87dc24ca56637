"""Sources: what each kind yields, in what order, under what name, and every refusal."""

import gzip
import json
import os
import sys
import types
import warnings

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.data.sources import Document, Row, documents, fingerprint, rows
from gptjax.errors import InputError


def read(source, **options):
    return list(documents(str(source), **options))


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def array_record(path, records):
    module = pytest.importorskip("array_record.python.array_record_module", reason="needs array-record")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()


@pytest.fixture(scope="module")
def stdlib():
    return read("stdlib")


def test_stdlib(stdlib):
    names = [d.name for d in stdlib]
    assert names == sorted(names) and len(set(names)) == len(names)
    assert {"argparse.py", "json/decoder.py", "__future__.py"} <= set(names)
    folders = {part for name in names for part in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib-dynload"}
    assert {os.path.splitext(name)[1] for name in names} <= {".py", ".txt", ".rst"}
    assert 500 < len(names) < 1500
    assert 8e6 < sum(len(d.text.encode()) for d in stdlib) < 20e6


def test_text_file_is_kept_exactly(tmp_path):
    data = "one\r\ntwo é 🙂\n\n".encode()
    (tmp_path / "a.weird").write_bytes(data)
    assert read(tmp_path / "a.weird") == [Document("a.weird", data.decode())]


def test_json_lines_text_and_gzip(tmp_path):
    rows = '{"text": "a"}\n\n{"id": 3, "text": "b\\n"}\n'
    expected = ["a", "b\n"]
    for name in ("x.jsonl", "x.jsonl.gz", "x.json.gz"):
        data = rows.encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert read(tmp_path / name) == [Document(f"{name}:{n}", t) for n, t in zip((1, 3), expected, strict=True)]
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"zipped"))
    assert read(tmp_path / "x.txt.gz") == [Document("x.txt.gz", "zipped")]


def test_parquet(tmp_path):
    parquet(tmp_path / "x.parquet", id=list(range(3000)), body=[f"t{i}" for i in range(3000)])
    rows = read(tmp_path / "x.parquet", text_field="body")
    assert rows == [Document(f"x.parquet:{i + 1}", f"t{i}") for i in range(3000)]


def test_array_record_of_text_and_of_json(tmp_path):
    array_record(tmp_path / "x.arrayrecord", [f"é{i}".encode() for i in range(300)] + [b'{"no": 1}'])
    rows = read(tmp_path / "x.arrayrecord")
    assert rows[299:] == [Document("x.arrayrecord:300", "é299"), Document("x.arrayrecord:301", '{"no": 1}')]
    array_record(tmp_path / "y.array_record", [json.dumps({"text": t}).encode() for t in "ab"])
    assert [d.text for d in read(tmp_path / "y.array_record")] == ["a", "b"]
    array_record(tmp_path / "z.array_record", [b'{"text": "a"}', b'{"body": "b"}'])
    with pytest.raises(InputError, match="z.array_record: record 2: no field 'text'.*'body'"):
        read(tmp_path / "z.array_record")


def test_directory(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / ".git" / "config").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "sub" / "b.md").write_text("b")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.jsonl").write_text('{"text": "j1"}\n{"text": "j2"}\n')
    parquet(tmp_path / "c.parquet", text=["p"])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "late.bin").write_bytes(b"a" * 9000 + b"\xff")
    with pytest.warns(UserWarning, match="skipped 2 binary files.*late.bin") as caught:
        rows = read(tmp_path)
    assert len(caught) == 1
    assert [d.name for d in rows] == ["a.jsonl:1", "a.jsonl:2", "c.parquet:1", "sub/b.md"]


def test_directory_of_text_does_not_warn(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path) == [Document("a.txt", "a")]


def test_glob(tmp_path):
    for name in ("x/1.txt", "x/2.txt", "y/1.txt", "y/3.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [d.name for d in read(tmp_path / "*" / "*.txt")] == ["x/1.txt", "x/2.txt", "y/1.txt"]
    assert [d.name for d in read(tmp_path / "x" / "[2-9].txt")] == ["2.txt"]
    with pytest.raises(InputError, match="no file matches"):
        read(tmp_path / "*.rst")
    (tmp_path / "[odd].txt").write_text("a name with brackets")
    assert [d.text for d in read(tmp_path / "[odd].txt")] == ["a name with brackets"]


def test_remote_paths(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe("/bucket/a.txt", b"remote")
    fs.pipe("/bucket/b.jsonl", b'{"text": "row"}')
    array_record(tmp_path / "c", [b"record"])
    fs.pipe("/bucket/c.arrayrecord", (tmp_path / "c").read_bytes())
    try:
        rows = read("memory://bucket")
        assert rows == [("a.txt", "remote"), ("b.jsonl:1", "row"), ("c.arrayrecord:1", "record")]
        before = fingerprint("memory://bucket")
        fs.pipe("/bucket/a.txt", b"remote, changed")
        assert fingerprint("memory://bucket") != before
    finally:
        fs.rm("/bucket", recursive=True)


def test_hugging_face(monkeypatch):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert read("hf:org/name") == [("hf:org/name:1", "a"), ("hf:org/name:2", "b")]
    read("hf:org/name:en")
    read("hf:org/name:en:test")
    read("hf:org/name::test")
    assert calls == [
        ("org/name", None, "train", True),
        ("org/name", "en", "train", True),
        ("org/name", "en", "test", True),
        ("org/name", None, "test", True),
    ]
    with pytest.raises(InputError, match="row 1: no field 'body'.*'text'"):
        read("hf:org/name", text_field="body")
    for bad in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(InputError, match=r"hf:NAME\[:CONFIG\]"):
            read(bad)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        read("hf:org/name")


def test_missing_names_the_nearest(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("a")
    with pytest.raises(InputError, match=r"doesn't exist; did you mean .*/shakespeare\.txt\?"):
        read(tmp_path / "shakespere.txt")
    with pytest.raises(InputError, match=f"did you mean {tmp_path}"):
        read(str(tmp_path) + "x/y/z.txt")
    with pytest.raises(InputError, match="nothing like"):
        read(tmp_path / "0987654321")
    with pytest.raises(InputError, match="doesn't exist"):
        fingerprint(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="empty string"):
        read("")
    with pytest.raises(InputError, match="can't be opened"):
        read("nosuchprotocol://bucket/x")


def test_empty(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    for name in ("folder", "empty.txt", "empty.jsonl"):
        with pytest.raises(InputError, match=f"{name}' is empty"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "data, offset",
    [(b"abc\xff", 3), (b"ab\0c", 2), (b"a" * 10000 + b"\0", 10000), ("é".encode("latin-1"), 0)],
)
def test_not_text(tmp_path, data, offset):
    (tmp_path / "x.dat").write_bytes(data)
    with pytest.raises(InputError, match=f"x.dat is not text: byte offset {offset} "):
        read(tmp_path / "x.dat")
    with pytest.raises(InputError, match="x.dat is not text"):  # named by a pattern: not skipped
        read(tmp_path / "*.dat")


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{oops", "isn't JSON"),
        (b'{"text": "\xff"}', "isn't JSON"),
        (b'["text"]', "a JSON list"),
        (b'{"body": 1, "title": 2}', "no field 'text'; the row has 'body', 'title'"),
        (b"{}", "no field 'text'; the row has none"),
        (b'{"text": null}', "is NoneType, not text"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
    ],
)
def test_bad_json_line_is_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=f"x.jsonl:3: .*{message}"):
        read(tmp_path / "x.jsonl")


def test_bad_tables(tmp_path):
    parquet(tmp_path / "x.parquet", body=["a"], title=["b"])
    with pytest.raises(InputError, match="x.parquet: no column 'text'; the file has 'body', 'title'"):
        read(tmp_path / "x.parquet")
    parquet(tmp_path / "n.parquet", text=["a", None])
    with pytest.raises(InputError, match="n.parquet: row 2: field 'text' is NoneType"):
        read(tmp_path / "n.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="bad.parquet"):
        read(tmp_path / "bad.parquet")
    array_record(tmp_path / "b.arrayrecord", [b"\xff\xfe"])
    with pytest.raises(InputError, match="b.arrayrecord: record 1 isn't UTF-8 at byte offset 0"):
        read(tmp_path / "b.arrayrecord")
    (tmp_path / "c.arrayrecord").write_bytes(b"nothing like it" * 10)
    with pytest.raises(InputError, match="c.arrayrecord"):
        read(tmp_path / "c.arrayrecord")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9999)[:-20])
    with pytest.raises(InputError, match="d.jsonl.gz is a damaged gzip"):
        read(tmp_path / "d.jsonl.gz")


def test_fingerprint(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    first = fingerprint(str(tmp_path))
    assert fingerprint(str(tmp_path)) == first
    os.utime(path, (1, 1))
    touched = fingerprint(str(tmp_path))
    path.write_text("one!")
    os.utime(path, (1, 1))
    grown = fingerprint(str(tmp_path))
    path.rename(tmp_path / "b.txt")
    renamed = fingerprint(str(tmp_path))
    (tmp_path / ".hidden").write_text("")
    assert fingerprint(str(tmp_path)) == renamed
    assert len({first, touched, grown, renamed}) == 4
    assert fingerprint("stdlib") == fingerprint("stdlib") != fingerprint("hf:a") != fingerprint("hf:b")


def test_rows_of_each_kind(tmp_path):
    values = [{"a": 1, "b": ["x", None]}, {"a": 2, "b": ["é"]}]
    lines = "\n\n".join(json.dumps(v) for v in values).encode()  # a blank line is no row, but counts as a line
    for name in ("x.jsonl", "x.ndjson", "x.jsonl.gz", "x.NDJSON.GZ", "x.json.gz"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(lines) if name.lower().endswith("gz") else lines)
        assert list(rows(str(path))) == [Row(f"{path}:1", values[0]), Row(f"{path}:3", values[1])]
    (tmp_path / "x.json").write_text(json.dumps(values))
    parquet(tmp_path / "x.parquet", a=[1, 2], b=[["x", None], ["é"]])
    for name in ("x.json", "x.parquet"):
        path = tmp_path / name
        assert list(rows(str(path))) == [Row(f"{path}: row {n}", v) for n, v in enumerate(values, 1)]


def test_rows_of_parquet_count_over_batches(tmp_path):
    parquet(tmp_path / "x.parquet", id=list(range(2500)), body=[f"t{i}" for i in range(2500)])
    assert list(rows(str(tmp_path / "x.parquet")))[2499] == (
        f"{tmp_path}/x.parquet: row 2500",
        {"id": 2499, "body": "t2499"},
    )


def test_rows_of_a_directory_and_a_glob(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.jsonl").write_text('{"n": 2}')
    (tmp_path / "a.json").write_text('[{"n": 0}, {"n": 1}]')
    assert [row.value["n"] for row in rows(str(tmp_path))] == [0, 1, 2]
    assert [row.value["n"] for row in rows(str(tmp_path / "b" / "*.jsonl"))] == [2]
    (tmp_path / "README.md").write_text("about")
    with pytest.warns(UserWarning, match="skipped 1 files that hold no rows, first 'README.md'"):
        assert [row.value["n"] for row in rows(str(tmp_path))] == [0, 1, 2]
    with pytest.raises(InputError, match=r"README.md holds no rows.*\.jsonl, \.ndjson.*\.json, \.parquet or hf:NAME"):
        list(rows(str(tmp_path / "*.*")))
    (tmp_path / "b" / "1.jsonl").rename(tmp_path / "b" / "1.txt")
    for source in (str(tmp_path / "b"), "stdlib"):  # nothing but files of other kinds
        with pytest.raises(InputError, match="holds no rows that can be read"):
            list(rows(source))


def test_rows_of_hugging_face(monkeypatch):
    load = lambda name, config, *, split, streaming: iter([{"name": name, "config": config, "split": split}])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    source = "hf:org/name:en:test"
    assert list(rows(source)) == [Row(f"{source}: row 1", {"name": "org/name", "config": "en", "split": "test"})]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.jsonl", b'{"a": 1}\n[1]\n', "x.jsonl:2: the row is a JSON list, not an object"),
        ("x.jsonl", b'{"a": 1}\n{oops\n', "x.jsonl:2: the line isn't JSON"),
        ("x.jsonl", b"\n", "is empty: it holds no rows"),
        ("x.json", b"[]", "is empty: it holds no rows"),
        ("x.json", b'[{"a": 1}, 7]', "x.json: row 2: the row is a JSON int"),
        ("x.json", b'{"a": 1}', "x.json is a JSON dict, not a list of objects"),
        ("x.json", b'{"a": 1}\n{"a": 2}', "x.json isn't one JSON value.*name it .jsonl"),
        ("x.parquet", b"PAR1 but not really", "x.parquet isn't a whole Parquet file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-20], "x.jsonl.gz is a damaged gzip"),
        ("x.txt", b"text", "x.txt holds no rows that can be read: rows come from .jsonl"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(rows(str(tmp_path / name)))


def test_rows_of_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="doesn't exist"):
        list(rows(str(tmp_path / "x.jsonl")))
