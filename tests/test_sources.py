"""Sources: what each kind yields, in which order and under which name, and every error."""

import bz2
import gzip
import io
import json
import lzma
import os
import sys
import types
import warnings
import zipfile

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from gptjax.data.sources import Document, Row, documents, fingerprint, rows
from gptjax.data.values import python_values
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
    with pytest.raises(InputError, match="z.array_record: record 2: There is no field 'text', only 'body'. Name one"):
        read(tmp_path / "z.array_record")


def test_directory(tmp_path):
    (tmp_path / "sub" / ".git").mkdir(parents=True)
    (tmp_path / "sub" / ".git" / "config").write_text("hidden")
    (tmp_path / ".hidden.txt").write_text("hidden")
    (tmp_path / "sub" / "b.md").write_text("b" * 20_000)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "a.jsonl").write_text('{"text": "j1"}\n{"text": "j2"}\n')
    parquet(tmp_path / "c.parquet", text=["p"])
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "late.bin").write_bytes(b"a" * 9000 + b"\xff")
    with pytest.warns(UserWarning, match="Skipped 2 files that are not .*: 'late.bin', 'picture.png'.$") as caught:
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
    with pytest.raises(InputError, match="No file matches the source .*: check the pattern"):
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
    with pytest.raises(InputError, match="row 1: There is no field 'body', only 'text'"):
        read("hf:org/name", text_field="body")
    for bad in ("hf:", "hf:a:b:c:d"):
        with pytest.raises(InputError, match=r"is malformed: write hf:NAME\[:CONFIG\]"):
            read(bad)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="needs a package: run `pip install datasets`"):
        read("hf:org/name")


def test_missing_names_the_nearest(tmp_path):
    (tmp_path / "shakespeare.txt").write_text("a")
    with pytest.raises(InputError, match=r"does not exist: did you mean .*/shakespeare\.txt\?"):
        read(tmp_path / "shakespere.txt")
    with pytest.raises(InputError, match=f"did you mean {tmp_path}"):
        read(str(tmp_path) + "x/y/z.txt")
    with pytest.raises(InputError, match="there is nothing like .*, so check the path"):
        read(tmp_path / "0987654321")
    with pytest.raises(InputError, match="does not exist: "):
        fingerprint(str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="The source is an empty string: give a file"):
        read("")
    with pytest.raises(InputError, match="cannot be opened .*: install its driver"):
        read("nosuchprotocol://bucket/x")


def test_empty(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "empty.jsonl").write_text('\n{"text": ""}\n')
    for name in ("folder", "empty.txt", "empty.jsonl"):
        with pytest.raises(InputError, match=f"{name}' contains no text: give one"):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "data, offset",
    [(b"abc\xff", 3), (b"ab\0c", 2), (b"a" * 10000 + b"\0", 10000), ("é".encode("latin-1"), 0)],
)
def test_not_text(tmp_path, data, offset):
    (tmp_path / "x.dat").write_bytes(data)
    with pytest.raises(InputError, match=f"x.dat is not text, .* byte at offset {offset} .*: convert it"):
        read(tmp_path / "x.dat")
    with pytest.raises(InputError, match="x.dat is not text"):  # named by a pattern: not skipped
        read(tmp_path / "*.dat")


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{oops", "The line is not readable JSON .*: fix or remove it"),
        (b'{"text": "\xff"}', "The line is not readable JSON"),
        (b'["text"]', "The row is a JSON list: give an object with a field 'text'"),
        (b'{"body": 1, "title": 2}', "There is no field 'text', only 'body', 'title'. Name one of them"),
        (b"{}", "There is no field 'text', only an empty object"),
        (b'{"text": null}', "The field 'text' is NoneType, not text: fix or remove"),
        (b'{"text": "\\ud800"}', "has a lone surrogate: fix or remove"),
    ],
)
def test_bad_json_line_is_named(tmp_path, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(InputError, match=f"x.jsonl:3: .*{message}"):
        read(tmp_path / "x.jsonl")


def test_bad_tables(tmp_path):
    parquet(tmp_path / "x.parquet", body=["a"], title=["b"])
    with pytest.raises(InputError, match="x.parquet: There is no column 'text', only 'body', 'title'. Name"):
        read(tmp_path / "x.parquet")
    parquet(tmp_path / "n.parquet", text=["a", None])
    with pytest.raises(InputError, match="n.parquet: row 2: The field 'text' is NoneType"):
        read(tmp_path / "n.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(InputError, match="bad.parquet is not a complete Parquet file .*: download it again"):
        read(tmp_path / "bad.parquet")
    array_record(tmp_path / "b.arrayrecord", [b"\xff\xfe"])
    with pytest.raises(InputError, match="b.arrayrecord: record 1: The record is not UTF-8 at byte offset 0"):
        read(tmp_path / "b.arrayrecord")
    (tmp_path / "c.arrayrecord").write_bytes(b"nothing like it" * 10)
    with pytest.raises(InputError, match="c.arrayrecord is not a complete ArrayRecord file"):
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
    (tmp_path / "x.json").write_bytes(lines)  # an object a line, named .json
    assert [row.value for row in rows(str(tmp_path / "x.json"))] == values
    (tmp_path / "x.json").write_text(json.dumps(values, indent=1))
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
    with pytest.warns(UserWarning, match="Skipped 1 files without rows: 'README.md'.$"):
        assert [row.value["n"] for row in rows(str(tmp_path))] == [0, 1, 2]
    with pytest.raises(InputError, match=r"README.md contains no .* \.jsonl, .*, \.csv, \.tsv or \.parquet"):
        list(rows(str(tmp_path / "*.*")))
    (tmp_path / "b" / "1.jsonl").rename(tmp_path / "b" / "1.txt")
    for source in (str(tmp_path / "b"), "stdlib"):  # nothing but files of other kinds
        with pytest.raises(InputError, match="contains no readable rows: convert it"):
            list(rows(source))


def test_rows_of_hugging_face(monkeypatch):
    load = lambda name, config, *, split, streaming: iter([{"name": name, "config": config, "split": split}])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    source = "hf:org/name:en:test"
    assert list(rows(source)) == [Row(f"{source}: row 1", {"name": "org/name", "config": "en", "split": "test"})]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("x.jsonl", b'{"a": 1}\n[1]\n', "x.jsonl:2: The row is a JSON list, not an object: fix"),
        ("x.jsonl", b'{"a": 1}\n{oops\n', "x.jsonl:2: The line is not readable JSON"),
        ("x.jsonl", b"\n", "contains no rows: give one that does"),
        ("x.json", b"[]", "contains no rows: give one that does"),
        ("x.json", b'[{"a": 1}, 7]', "x.json: row 2: The row is a JSON int"),
        ("x.json", b'{"a": 1}', "x.json contains a single JSON dict, not a list of objects"),
        ("x.json", b'{"data": [{"a": 1}]}', "x.json contains a single JSON dict.*its field 'data' is a list: write"),
        ("x.json", b'{"a": 1,\n', "x.json is not readable JSON"),
        ("x.json", b'{"a": 1}\n{oops\n', "x.json:2: The line is not readable JSON"),
        ("x.parquet", b"PAR1 but not really", "x.parquet is not a complete Parquet file"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 999, mtime=0)[:-20], "x.jsonl.gz is a damaged gzip"),
        ("x.txt", b"text", "x.txt contains no readable rows: convert it to .jsonl"),
    ],
)
def test_bad_rows_are_named(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        list(rows(str(tmp_path / name)))


def test_rows_of_what_is_missing(tmp_path):
    with pytest.raises(InputError, match="does not exist: "):
        list(rows(str(tmp_path / "x.jsonl")))


def test_a_bad_row_can_be_reported_and_skipped(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n{oops\n[2]\n{"a": 3}\n')
    bad = []
    assert [row.value for row in rows(str(path), lambda *arguments: bad.append(arguments))] == [{"a": 1}, {"a": 3}]
    assert [where for where, _ in bad] == [f"{path}:2", f"{path}:3"]
    assert "is not readable JSON" in str(bad[0][1]) and str(bad[1][1]).startswith("The row is a JSON list")


# --- links ------------------------------------------------------------------------------------------------


def test_links_are_followed(tmp_path):
    """Like the cache of the Hub: files named by hashes in one folder, links with names in another."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i in range(6):
        (blobs / f"hash{i}").write_text(f"document {i}")
        (snapshot / f"{i}.txt").symlink_to(f"../../blobs/hash{i}")
    (tmp_path / "folder").symlink_to("snapshots")
    expected = [f"document {i}" for i in range(6)]
    for source in (snapshot, tmp_path / "folder", tmp_path / "folder" / "*" / "*.txt", snapshot / "**"):
        assert [d.text for d in read(source)] == expected
    (tmp_path / "one.txt").symlink_to("blobs/hash3")
    assert read(tmp_path / "one.txt") == [Document("one.txt", "document 3")]
    before = fingerprint(str(snapshot))
    (blobs / "hash3").write_text("something else")
    assert fingerprint(str(snapshot)) != before


def test_a_file_seen_twice_through_links_is_read_once(tmp_path):
    """Otherwise a document could be in both splits."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "z").write_text("b")  # its link has a suffix
    (tmp_path / "latest.txt").symlink_to("a.txt")
    (tmp_path / "b.txt").symlink_to("z")
    with pytest.warns(UserWarning, match="Read only once 2 files with further names through links: 'latest.txt', 'z'"):
        assert read(tmp_path) == [Document("a.txt", "a"), Document("b.txt", "b")]


def test_link_loops_and_broken_links_are_named(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "up").symlink_to("..")
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    (tmp_path / "itself").symlink_to("itself")
    with pytest.warns(UserWarning, match="2 links to missing files: 'gone.txt', 'itself'.*Did not follow .*: 'sub/up'"):
        assert [d.name for d in read(tmp_path)] == ["a.txt", "sub/b.txt"]
    with pytest.raises(InputError, match=r"1 links to missing files, 'gone.txt': remove them"):
        read(tmp_path / "*.txt")
    assert [d.name for d in read(tmp_path / "sub" / "**" / "*.txt")] == ["b.txt"]
    with pytest.raises(InputError, match="is a link to nowhere.txt, which does not exist: restore it"):
        read(tmp_path / "gone.txt")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scan = os.scandir

    def refused(path):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)  # a superuser, as in a container, may list everything
    with pytest.raises(InputError, match=f"{tmp_path}/sub in the source .* cannot be listed .*: check its permissions"):
        read(tmp_path)


# --- compressed -------------------------------------------------------------------------------------------


def zipped(data, name="inside.jsonl"):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
        archive.writestr("__MACOSX/._x", b"\0")
    return stream.getvalue()


def arrow_compressed(kind):
    def compress(data):
        stream = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(stream, kind) as compressing:
            compressing.write(data)
        return stream.getvalue().to_pybytes()

    return compress


COMPRESSORS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": arrow_compressed("zstd"),
    "lz4": arrow_compressed("lz4"),
}


@pytest.mark.parametrize("suffix", [*COMPRESSORS, "zip"])
def test_compressed(tmp_path, suffix):
    compress = COMPRESSORS.get(suffix, zipped)
    values = [{"text": f"text {i}", "n": i} for i in range(2000)]
    lines = [(json.dumps(value) + "\n").encode() for value in values]
    data = compress(b"".join(lines))
    if suffix != "zip":  # several streams one after another, as parallel compressors write
        data = compress(b"".join(lines[:999])) + compress(b"") + compress(b"".join(lines[999:]))
    for name in ("x.jsonl", f"x.json.{suffix}", "x.JSONL." + suffix.upper()):  # by its bytes too
        if not (suffix == "zip" and name == "x.jsonl"):
            (tmp_path / name).write_bytes(data)
            assert [d.text for d in read(tmp_path / name)] == [v["text"] for v in values]
            assert [row.value for row in rows(str(tmp_path / name))] == values
    (tmp_path / f"y.txt.{suffix}").write_bytes(compress("\ufeffdonné".encode(), *["y.txt"][: suffix == "zip"]))
    assert [d.text for d in read(tmp_path / f"y.txt.{suffix}")] == ["donné"]

    for end in (len(data) // 2, len(data) - 1, 2, 0):
        (tmp_path / f"cut.jsonl.{suffix}").write_bytes(data[:end])
        for reader in (read, lambda path: list(rows(str(path)))):
            with pytest.raises(InputError, match=rf"cut.jsonl.{suffix} (is a damaged|is not a) (\w+) file"):
                reader(tmp_path / f"cut.jsonl.{suffix}")
    (tmp_path / f"cut.jsonl.{suffix}").write_text("<html>404</html>")
    with pytest.raises(InputError, match=f"cut.jsonl.{suffix} is not a .* file, unlike its name: download"):
        read(tmp_path / f"cut.jsonl.{suffix}")


def test_zip_of_several_files(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("b/2.jsonl.gz", gzip.compress(b'{"text": "two"}'))
        archive.writestr("a.txt", b"one")
    assert read(tmp_path / "x.zip") == [("x.zip/a.txt", "one"), ("x.zip/b/2.jsonl.gz:1", "two")]
    with pytest.raises(InputError, match="x.zip/a.txt contains no readable rows"):
        list(rows(str(tmp_path / "x.zip")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.zip").rename(tmp_path / "folder" / "x.zip")
    (tmp_path / "folder" / "more.jsonl").write_text('{"text": "three"}\n' * 9)
    with pytest.warns(UserWarning, match="Skipped 1 files without rows: 'x.zip/a.txt'"):
        assert [row.value["text"] for row in rows(str(tmp_path / "folder"))] == ["three"] * 9 + ["two"]


def test_a_folder_stops_where_most_of_it_cannot_be_read(tmp_path):
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "corpus.tar").write_bytes(b"text\0" * 1000)
    with pytest.raises(InputError, match=r"Most of .* 1 of 2 files \(5,000 of 5,005 bytes\).*'corpus.tar'.*\*"):
        read(tmp_path)
    (tmp_path / "corpus.tar").unlink()
    (tmp_path / "train.xls").write_text("a,b\n" * 1000)
    (tmp_path / "x.jsonl").write_text('{"a": 1}')
    with pytest.raises(InputError, match=r"Most of .* 2 of 3 .* without rows: 'README.md', 'train.xls'. Convert"):
        list(rows(str(tmp_path)))


# --- JSON and text as people have them --------------------------------------------------------------------


def test_json_is_read_as_rows(tmp_path):
    values = [{"text": f"t{i}"} for i in range(3)]
    path = tmp_path / "x.json"
    for data in (json.dumps(values), json.dumps(values, indent=2), json.dumps([v["text"] for v in values])):
        path.write_text(data)
        assert read(path) == [Document(f"x.json:{i + 1}", f"t{i}") for i in range(3)]
    path.write_text("\n".join(map(json.dumps, values)))
    assert [d.text for d in read(path)] == ["t0", "t1", "t2"]
    path.write_text(json.dumps(values[0], indent=1))
    assert read(path) == [Document("x.json", "t0")]
    path.write_text(json.dumps([{"body": "b"}]))
    with pytest.raises(InputError, match="x.json: row 1: There is no field 'text', only 'body'"):
        read(path)
    for data in ('{"body": 1}', "[1, 2]", "{oops"):
        path.write_text(data)
        with pytest.raises(InputError, match="To train on the JSON itself, rename the file to .txt"):
            read(path)
        (tmp_path / "code.py").write_text("code")
        with pytest.warns(UserWarning, match="Read 1 .json files without rows as text: 'x.json'"):
            assert [d.text for d in read(tmp_path)] == ["code", data]  # like any file in a folder of code


def test_byte_order_marks(tmp_path):
    bom = b"\xef\xbb\xbf"
    (tmp_path / "x.txt").write_bytes(bom + "a\ufeffb".encode())
    assert [d.text for d in read(tmp_path / "x.txt")] == ["a\ufeffb"]
    for data in (b'{"text": "a"}\n{"text": "b"}\n', b'\n{"text": "a"}\n{"text": "b"}\n'):
        for name in ("x.jsonl", "x.json"):
            (tmp_path / name).write_bytes(bom + data)
            assert [d.text for d in read(tmp_path / name)] == ["a", "b"]
            assert [row.value["text"] for row in rows(str(tmp_path / name))] == ["a", "b"]
    (tmp_path / "x.json").write_bytes(bom + b'[{"text": "a"}]')
    assert [d.text for d in read(tmp_path / "x.json")] == ["a"]
    for name in ("x.txt", "x.jsonl"):
        (tmp_path / name).write_text('{"text": "a"}', encoding="utf-16")
        with pytest.raises(InputError, match="UTF-16 byte order mark.*: convert it to UTF-8"):
            read(tmp_path / name)


def test_written_end_of_text(tmp_path):
    (tmp_path / "x.txt").write_text("<|endoftext|>\n".join(f"story {i}\nends\n" for i in range(20)))
    with pytest.warns(UserWarning, match=r" 19 times in 1 documents.*document_separator='<\|endoftext\|>'"):
        assert len(read(tmp_path / "x.txt")) == 1
    with warnings.catch_warnings(record=True) as shown:  # once, from wherever it is read
        warnings.resetwarnings()
        read(tmp_path / "x.txt")
        list(documents(str(tmp_path / "x.txt")))
    assert len(shown) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split = read(tmp_path / "x.txt", separator="<|endoftext|>")
        assert split == [Document(f"x.txt#{i + 1}", f"story {i}\nends") for i in range(20)]
        (tmp_path / "x.txt").write_text("a\n\nb\r\nc")
        assert read(tmp_path / "x.txt", separator="<|endoftext|>") == [Document("x.txt", "a\n\nb\r\nc")]
    assert read(tmp_path / "x.txt", lines=True) == [("x.txt:1", "a"), ("x.txt:3", "b"), ("x.txt:4", "c")]
    (tmp_path / "x.jsonl").write_text('{"text": "a---b"}\n{"text": "c\\nd"}\n')
    assert [d.text for d in read(tmp_path / "x.jsonl", separator="---")] == ["a", "b", "c\nd"]
    assert len(read(tmp_path / "x.jsonl", lines=True)) == 2  # rows are documents already
    with pytest.raises(InputError, match="The document separator is empty: give the text"):
        read(tmp_path / "x.txt", separator="")


@pytest.mark.parametrize("name, frame", [("x.jsonl", "%s\n"), ("x.json", "[%s]")])
def test_json_that_python_cannot_represent(tmp_path, name, frame):
    path = tmp_path / name
    path.write_text(frame % '{"text": "a", "id": %s}' % ("9" * 20_000))
    assert [d.text for d in read(path)] == ["a"]
    (row,) = rows(str(path))
    assert row.value["text"] == "a" and "20000 digits" in row.value["id"].reason
    with pytest.raises(InputError, match=f"{name}.*1: The field 'id' is an integer of 20000 digits: fix or remove"):
        read(path, text_field="id")
    path.write_text(frame % '{"text": "a", "deep": %s1%s}' % ("[" * 100_000, "]" * 100_000))
    with pytest.raises(InputError, match=f"{name}.*nested too deep"):
        read(path)
    with pytest.raises(InputError, match=f"{name}.*nested too deep"):
        list(rows(str(path)))


# --- Parquet ----------------------------------------------------------------------------------------------


def test_parquet_values_that_python_cannot_represent(tmp_path):
    count = 5
    unreadable = {
        "nanoseconds": pyarrow.array([1] * count, pyarrow.timestamp("ns")),
        "time": pyarrow.array([1] * count, pyarrow.time64("ns")),
        "duration": pyarrow.array([1] * count, pyarrow.duration("ns")),
        "date": pyarrow.array([10**9] * count, pyarrow.int32()).cast(pyarrow.date32()),
        "zone": pyarrow.array([1] * count, pyarrow.timestamp("us", "Mars/Olympus")),
        "bytes": pyarrow.array([b"\xff"] * count).view(pyarrow.string()),
    }
    good = {"prompt": ["p"] * count, "n": [1, None, 3, 4, 5]}
    parquet(tmp_path / "x.parquet", **good, **unreadable)
    read_rows = list(rows(str(tmp_path / "x.parquet")))
    assert [row.value["prompt"] for row in read_rows] == good["prompt"]
    assert [row.value["n"] for row in read_rows] == good["n"]
    assert {name: type(read_rows[0].value[name]).__name__ for name in unreadable} == dict.fromkeys(
        unreadable, "Unreadable"
    )
    assert [d.text for d in read(tmp_path / "x.parquet", text_field="prompt")] == good["prompt"]


def test_parquet_strings_that_are_not_utf8(tmp_path):
    parquet(tmp_path / "x.parquet", text=pyarrow.array([b"a", None, b"bad\xff"]).view(pyarrow.string()).fill_null("b"))
    with pytest.raises(InputError, match=r"x.parquet: row 3: The field 'text' is not UTF-8 \(.* byte offset 3\): fix"):
        read(tmp_path / "x.parquet")


def test_one_unreadable_value_deep_in_a_column(tmp_path):
    stamp, text = pyarrow.timestamp("ns"), pyarrow.string()
    kind = pyarrow.list_(pyarrow.struct([("role", text), ("at", stamp)]))
    turn = lambda at: {"role": "user", "at": at}
    values = [[turn(1000), turn(1)], None, [], [None, turn(None)]]
    parquet(tmp_path / "x.parquet", messages=pyarrow.array(values, kind), one=pyarrow.array([7, 1000, None, 1], stamp))
    found = [row.value for row in rows(str(tmp_path / "x.parquet"))]
    assert [f["messages"] and [t and t["role"] for t in f["messages"]] for f in found] == [
        ["user", "user"], None, [], [None, "user"],
    ]  # fmt: skip
    unreadable = lambda value: type(value).__name__ == "Unreadable"
    assert [unreadable(t["at"]) for t in found[0]["messages"]] == [False, True]
    assert found[3]["messages"][1]["at"] is None
    assert [unreadable(f["one"]) for f in found] == [True, False, False, True]


@pytest.mark.parametrize("kind", [pyarrow.list_, pyarrow.large_list, lambda t: pyarrow.list_(t, 2)])
def test_values_of_a_slice(kind):
    array = pyarrow.array([[1, 1000], None, [2000, 3], [1000, 1000]], kind(pyarrow.timestamp("ns")))
    shown = lambda rows: [row and [v if v is None else type(v).__name__ for v in row] for row in rows]
    whole = shown(python_values(array))
    assert whole == [["Unreadable", "datetime"], None, ["datetime", "Unreadable"], ["datetime", "datetime"]]
    assert shown(python_values(array[1:3])) == whole[1:3]
    inside = pyarrow.StructArray.from_arrays([array], ["x"])
    assert shown(r["x"] for r in python_values(inside[1:3])) == whole[1:3]


# --- the Hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(
    "error", [FileNotFoundError("Dataset 'x' doesn't exist\non the Hub"), ConnectionError(), ValueError("Bad split")]
)
def test_the_hub_is_unavailable(monkeypatch, error, late):
    def load_dataset(*_, **__):
        def rows():
            yield {"text": "a"}
            raise error

        if not late:
            raise error
        return rows()

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    for reader in (documents, rows):
        with pytest.raises(InputError, match="hf:x' cannot be read from the Hugging Face Hub .*: check") as caught:
            list(reader("hf:x"))
        assert "\n" not in str(caught.value) and type(error).__name__ in str(caught.value)
