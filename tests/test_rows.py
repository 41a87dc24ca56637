"""Shared by all loaders of rows: nested fields, the errors of bad rows, and dropped rows."""

import json
import re
import warnings

import pytest
from rows_files import template, write

from gptjax.data import sources
from gptjax.data.comparisons import ComparisonConfig, load_comparisons
from gptjax.data.demonstrations import DemonstrationConfig, load_demonstrations
from gptjax.data.prompts import PromptConfig, load_prompts
from gptjax.data.rows import AllTied, LeftOut, Record, TooLong
from gptjax.errors import InputError

LENGTH = 24
GOOD = {"prompt": "a", "response": "b"}


def prompts(source, **options):
    return load_prompts(PromptConfig(source=source, **options), template(), LENGTH)


# --- fields -----------------------------------------------------------------------------------------------

ROW = {
    "text": "a",
    "data": {"text": "b", "deep.er": {"x": "c"}, "none": None},
    "list": [{"output": "d"}, ["e"]],
    "data.text": "literal",
    "a,b": "comma",
}


@pytest.mark.parametrize(
    "field, value",
    [
        ("text", "a"),
        ("data.text", "literal"),
        ("data.deep.er.x", "c"),
        ("list.0.output", "d"),
        ("list.1.0", "e"),
        ("a,b", "comma"),
        ("text,list.0.output", "a\n\nd"),
        ("text,nothing,data.none", "a"),
        ("data.none", None),
        ("list.2.output", None),
        ("list.-1.0", None),
        ("list.output", None),
        ("text.x", None),
        ("nothing,text", None),
    ],
)
def test_fields_reach_inside(field, value):
    record = Record(ROW, {"prompt": field})
    assert ("prompt" in record) is (value is not None)
    if value is not None:
        assert record["prompt"] == value
    else:
        with pytest.raises(InputError, match=f"There is no field '{field}', only 'text', 'data', .*fields.prompt=NAME"):
            record["prompt"]


def test_only_texts_are_joined():
    with pytest.raises(InputError, match="The field 'list' is list, but only texts can be joined: fix"):
        Record(ROW, {"prompt": "text,list"})["prompt"]


def test_self_instruct_seeds(tmp_path):
    rows = [{"instruction": c, "instances": [{"input": i, "output": "o"}]} for c, i in (("a", "x"), ("b", ""))]
    fields = {"prompt": "instruction,instances.0.input", "response": "instances.0.output"}
    with pytest.raises(InputError, match=r"The character '\\n'"):  # the separator is not in this vocabulary
        load_demonstrations(
            DemonstrationConfig(source=write(tmp_path / "x.jsonl", rows), fields=fields), template(), LENGTH, 0
        )
    fields["prompt"] = "instruction"
    source = write(tmp_path / "x.jsonl", rows)
    loaded = load_demonstrations(DemonstrationConfig(source=source, fields=fields), template(), LENGTH, 0)
    assert {template().decode(e.ids) for e in loaded.train + loaded.validation} == {"ao", "bo"}


# --- bad rows ---------------------------------------------------------------------------------------------


def bad_lines(path, bad=3, good=4):
    """Good prompts, then in turn an empty one, one without the field, one that is not JSON, and a list."""
    kinds = ['{"prompt": ""}', '{"text": "a"}', "{oops", "[1]"]
    lines = ['{"prompt": "a"}'] * good + [kinds[i % 4] for i in range(bad)]
    path.write_text("\n".join(lines))
    return str(path)


def test_all_bad_rows_are_named_at_once(tmp_path):
    with pytest.raises(InputError) as caught:
        prompts(bad_lines(tmp_path / "x.jsonl", bad=6))
    text = str(caught.value)
    head, *lines, last = text.splitlines()
    assert head == "There are 6 bad rows:" and last == "Or drop such rows with --config.data.bad_rows=drop."
    assert [re.search(r"/x.jsonl:([\d, ]+):", line)[1] for line in lines] == ["5, 9", "6, 10", "7", "8"]
    for line, reason in zip(lines, ("is empty", "no field 'prompt'", "not readable JSON", "JSON list"), strict=True):
        assert reason in line


def test_the_first_ten_are(tmp_path):
    with pytest.raises(InputError) as caught:
        prompts(bad_lines(tmp_path / "x.jsonl", bad=500, good=1))
    text = str(caught.value)
    assert text.startswith("The first 10 bad rows")
    assert sorted(re.findall(r"\d+", " ".join(re.findall(r"x.jsonl:([\d, ]+)", text))), key=int) == [
        str(n) for n in range(2, 12)
    ]
    (tmp_path / "y.jsonl").write_text("{oops\n" * 500)
    with pytest.raises(InputError, match="^The first 10 bad rows:\n") as caught:  # dropping them would leave nothing
        prompts(str(tmp_path / "y.jsonl"))
    assert str(caught.value).count("not readable JSON") == 1 and "drop" not in str(caught.value)
    assert "y.jsonl:1, 2, 3, 4, 5, 6, 7, 8, 9, 10:" in str(caught.value)


def test_bad_rows_are_dropped_and_written_down(tmp_path):
    with pytest.warns(UserWarning, match=r"More rows .* are dropped \(5 bad\) than used \(4\). .*x.jsonl:5: "):
        loaded = prompts(bad_lines(tmp_path / "x.jsonl", bad=5), bad_rows="drop")
    assert loaded.texts == ["a"] * 4 and len(loaded.left_out) == 5 and str(loaded.left_out) == "5 bad"
    loaded.left_out.write(tmp_path)
    written = [json.loads(line) for line in (tmp_path / "dropped_rows.jsonl").read_text().splitlines()]
    assert [row["row"].rpartition("/")[2] for row in written] == [f"x.jsonl:{n}" for n in range(5, 10)]
    assert {row["why"] for row in written} == {"bad"} and "is empty" in written[0]["reason"]
    LeftOut().write(tmp_path)
    assert not (tmp_path / "dropped_rows.jsonl").exists()


def test_rows_that_are_too_long_have_their_own_option(tmp_path):
    """drop_long is about these rows, bad_rows about all others."""
    rows = [GOOD, GOOD | {"prompt": "c"}, GOOD | {"prompt": "b" * 30}, {"prompt": "a"}]
    source = write(tmp_path / "x.jsonl", rows)
    load = lambda **options: load_demonstrations(DemonstrationConfig(source, **options), template(), LENGTH, 0)
    with pytest.raises(InputError, match=r"^\S*x.jsonl:3: The prompt has 32 .*drop_long=True\.$"):
        load(bad_rows="drop")
    with pytest.raises(InputError, match=r"^\S*x.jsonl:4: There is no field 'response'.*bad_rows=drop\.$"):
        load(drop_long=True)
    with pytest.raises(InputError, match="(?s)^There are 2 bad rows:.*x.jsonl:3.*x.jsonl:4.*bad_rows=drop"):
        load()
    assert str(load(bad_rows="drop", drop_long=True).left_out) == "1 too long, 1 bad"
    with pytest.raises(InputError, match="data.bad_rows='skip' is unknown: use 'stop' or 'drop'"):
        load(bad_rows="skip")


def test_counts_by_kind(tmp_path):
    """Too long, all ties and bad rows are counted separately."""
    ranked = lambda prompt, ranks: {"prompt": prompt, "completions": ["x", "y"], "ranks": ranks}
    rows = [ranked("a", [1, 1]), ranked("b" * 30, [0, 1]), ranked("c", [2, 2]), ranked("d", [0, 1]), {"prompt": "e"}]

    def load(rows):
        c = ComparisonConfig(source=write(tmp_path / "x.jsonl", rows), drop_long=True, bad_rows="drop")
        return load_comparisons(c, template(), LENGTH, 0)

    loaded = load([*rows, ranked("f", [0, 1])])
    assert str(loaded.left_out) == "2 all ties, 1 too long, 1 bad"
    assert loaded.left_out.describe() == f", dropped: {loaded.left_out} (dropped_rows.jsonl)"
    with pytest.raises(InputError, match=r"All 2 rows .* were dropped \(2 all ties\). .*All ranks are equal") as caught:
        load([rows[0], rows[2]])
    assert "max_length" not in str(caught.value)
    with pytest.raises(InputError, match=r"All 2 rows .* were dropped \(1 all ties, 1 too long\). .*Raise max_length"):
        load(rows[:2])


def test_flags_are_the_tools_own(tmp_path):
    """best_of_n's are --drop_long, --bad_rows and --fields.prompt."""
    source = write(tmp_path / "x.jsonl", [{"prompt": "a"}, {"prompt": "b" * 30}, {"text": "c"}])
    with pytest.raises(InputError) as caught:
        load_prompts(PromptConfig(source=source), template(), LENGTH, flags="--")
    text = str(caught.value)
    assert " --drop_long=True" in text and " --bad_rows=drop" in text and " --fields.prompt=NAME" in text
    assert "config" not in text
    with pytest.raises(InputError, match="no field 'response'.*Rename the one to use to 'response'") as caught:
        load_demonstrations(DemonstrationConfig(source=source, drop_long=True), template(), LENGTH, 0, flags=None)
    assert "--" not in str(caught.value)


def test_without_a_callback_a_bad_row_is_raised(tmp_path):
    source = bad_lines(tmp_path / "x.jsonl", bad=3)
    bad = []
    assert len(list(sources.rows(source, lambda where, error: bad.append(where)))) == 6  # one is an object
    assert [where.rpartition("/")[2] for where in bad] == ["x.jsonl:7"]
    with pytest.raises(InputError, match="x.jsonl:7: The line is not readable JSON"):
        list(sources.rows(source))


def test_kinds_of_errors():
    left_out = LeftOut()
    for error in (TooLong("a"), AllTied("b"), InputError("c"), TooLong("d")):
        left_out.add("x:1", error, str(error))
    assert str(left_out + left_out) == "4 too long, 2 all ties, 2 bad" and left_out
    assert not LeftOut() and LeftOut().describe() == ""


def test_an_unreadable_value_is_an_error_where_it_is_used(tmp_path):
    path = tmp_path / "rows.jsonl"
    long = "9" * 5000  # more digits than Python converts
    path.write_text(f'{{"prompt": "a", "id": {long}}}\n')
    assert len(prompts(str(path)).ids) == 1
    path.write_text(f'{{"prompt": {long}}}\n')
    with pytest.raises(InputError, match="The field 'prompt' is an integer of 5000 digits: fix or remove the row"):
        prompts(str(path))


@pytest.mark.parametrize("count", [19, 20])
def test_few_rows_held_out_are_warned_of(tmp_path, count):
    held_out = write(tmp_path / "held_out.jsonl", [{"prompt": f"p{i}", "response": "b"} for i in range(count)])
    c = DemonstrationConfig(source=str(write(tmp_path / "x.jsonl", [GOOD])), validation=str(held_out))
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        load_demonstrations(c, template(), LENGTH, seed=0)
    held_out = [str(w.message).split(" of the ")[0] for w in shown if "held out" in str(w.message)]
    assert held_out == ["Only 19"] * (count < 20)
