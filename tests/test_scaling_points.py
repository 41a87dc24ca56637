"""Points from every form of file, and one clear sentence for each that cannot be used."""

import json

import numpy as np
import pytest
from scaling_points import isoflop, write

from gptjax.errors import InputError
from gptjax.scaling.laws import CHINCHILLA, GPT4
from gptjax.scaling.points import budgets, of_arrays, pairs, read


def save(tmp_path, text, name="points.csv"):
    path = tmp_path / name
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "N,D,loss\n1e8,2e9,3.5\n2e8,4e9,3.25\n"),
        ("a.tsv", "Params\tTokens\tFinal Loss\n1e8\t2e9\t3.5\n2e8\t4e9\t3.25"),
        ("a.csv", "\ufeffn; C ;LOSS\r\n1e8;1.2e18;3.5\r\n2e8;4.8e18;3.25\r\n"),
        ("a.jsonl", '{"N": 1e8, "D": 2e9, "loss": 3.5}\n\n{"N": 2e8, "D": 4e9, "loss": 3.25}\n'),
        ("a.json", '[{"parameters": 1e8, "compute_budget": 1.2e18, "final_loss": 3.5},'
                   ' {"parameters": 2e8, "compute_budget": 4.8e18, "final_loss": 3.25}]'),
    ],
)  # fmt: skip
def test_forms(tmp_path, name, text):
    points = read(save(tmp_path, text, name))
    assert points["N"].tolist() == [1e8, 2e8] and points["loss"].tolist() == [3.5, 3.25]
    assert points["D"] == pytest.approx([2e9, 4e9]) and points["C"] == pytest.approx([1.2e18, 4.8e18])
    assert np.exp(points.inputs(CHINCHILLA)) == pytest.approx(np.stack([points["N"], points["D"]]))


def test_results_of_a_sweep(tmp_path):
    points = read(str(write(isoflop(), tmp_path / "results.jsonl")))
    assert (points.metric, points.tokenizer, points.count) == ("nats/token", "abc", "with_embedding")
    assert points.names[:2] == ("run-0", "run-1") and len(points) == 28 and not points.left_out
    assert [len(which) for which in budgets(points["C"])] == [7, 7, 7, 7]
    assert points.take(points["N"] < 1e9).names == tuple(np.array(points.names)[points["N"] < 1e9])


def test_diverged_runs_are_left_out_and_said(tmp_path):
    path = write(isoflop(), tmp_path / "results.jsonl")
    with path.open("a") as file:
        file.write('{"name": "bad", "N": 1e8, "D": 1e9, "C": 6e17, "loss": null, "metric": "nats/token", '
                   '"tokenizer": "abc", "count": "with_embedding", "status": "diverged"}\n')  # fmt: skip
    points = read(str(path))
    assert len(points) == 28 and points.left_out == (f"{path}:29: bad is left out: its status is 'diverged'.",)


@pytest.mark.parametrize("name, end", [("a.jsonl", '{"N": 3e8, "D": 8e'), ("a.csv", "3e8,8")])
def test_a_last_line_that_is_cut(tmp_path, name, end):
    """Its rest is left out, the line named; cut before its end, the file is an error."""
    text = {"a.jsonl": '{"N": 1e8, "D": 2e9, "loss": 3.5}\n' * 2, "a.csv": "N,D,loss\n1e8,2e9,3.5\n1e8,2e9,3.5\n"}[name]
    points = read(save(tmp_path, text + end, name))
    assert len(points) == 2 and f"{name}:3" in points.left_out[0].replace(f"{name}:4", f"{name}:3")
    assert "cut" in points.left_out[0]
    with pytest.raises(InputError, match="Correct"):
        read(save(tmp_path, text + end + "\n" + text.splitlines()[-1] + "\n", name))


@pytest.mark.parametrize(
    "text, said",
    [
        ("N,D,loss\n1e8,2e9,3.5\n1e8,2e9,nan\n", "points.csv:3: loss .* 'nan'"),
        ("N,D,loss\n1e8,2e9,3.5\n1e8,2e9,-1\n", "points.csv:3: loss"),
        ("N,D,loss\n1e8,2e9,3.5\n1e8,0,3\n", "points.csv:3: D"),
        ("N,D,loss\n1e8,2e9,3.5\n1e8,,3\n", "points.csv:3: D .* column 'D' is ''"),
        ("N,D,loss\n1e8,2e9,3.5\n1e8,many,3\n", "points.csv:3: D .* 'many'"),
        ("size,length,loss\n1,2,3\n", "no column for N, D, C or steps, only 'size', 'length', 'loss'"),
        ("N,D,perplexity\n1,2,3\n", "no column for the loss, only 'N', 'D', 'perplexity'"),
        ("N,D,loss_a,loss_b\n1,2,3,4\n", "name one of 'loss_a', 'loss_b' by --columns=loss=COLUMN|'loss_b', 'loss_a'"),
        ("N,D,loss,metric\n1,2,3,nats/token\n1,2,1,bits/byte\n", "differ in metric: nats/token .*:2.*, bits/byte .*:3"),
        ("N,D,loss,count\n1,2,3,with_embedding\n1,2,1,without_embedding\n", "differ in count"),
        ("N,D,loss,rule\n1,2,3,6nd\n1,2,1,exact\n", "differ in rule"),
        ("N,D,loss,tokenizer\n1,2,3,a\n1,2,1,b\n", "differ in tokenizer"),
        ("N,D,C,loss\n1e8,2e9,1.2e18,3.5\n1e2,2e3,1.2e18,3\n", "points.csv:3: C is 1e\\+12 times 6 N D"),
        ("N,D,loss\n1,2,3,4\n1,2,3\n", "points.csv:2: The row has 4 cells"),
        ("N,D,loss\n", "no rows"),
        ("", "no rows"),
        ("N,D,loss,status\n1e8,2e9,3.5,failed\n", "no finished run: .*:2.*'failed'"),
    ],
)
def test_what_is_refused(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        read(save(tmp_path, text))


def test_a_value_that_is_null_or_missing_names_row_and_column(tmp_path):
    full, empty = '{"N": 1e8, "D": 2e9, "loss": 3.5}\n', '{"N": null, "D": 2e9, "loss": 3.5}\n'
    with pytest.raises(InputError, match="a.jsonl:2: N must be a positive number, and column 'N' is null. Correct"):
        read(save(tmp_path, full + empty, "a.jsonl"))
    with pytest.raises(InputError, match="a.jsonl:3: D must be a positive number, and column 'D' is missing"):
        read(save(tmp_path, full + full + '{"N": 1e8, "loss": 3.5}\n', "a.jsonl"))


def test_a_column_of_nothing_is_none(tmp_path):
    """As N and D of runs that a sweep does not count: a law of C needs neither, and the others say what they lack."""
    row = '{"N": null, "D": null, "C": 1e18, "loss": 3.5}\n'
    points = read(save(tmp_path, row * 2, "a.jsonl"))
    assert points.columns.keys() == {"C", "loss"} and points.inputs(GPT4).shape == (1, 2)
    with pytest.raises(InputError, match="no column for N, parameters .*; it has 'N', 'D', 'C', 'loss'"):
        points.inputs(CHINCHILLA)


def test_a_missing_file_says_what_writes_it(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        read(str(tmp_path / "none.csv"))


def test_bits_per_byte_compare_across_tokenizers(tmp_path):
    text = "N,D,loss,metric,tokenizer\n1,2,3,bits/byte,a\n1,2,1,bits/byte,b\n"
    assert read(save(tmp_path, text)).tokenizer is None


def test_columns_and_rows_by_name(tmp_path):
    path = save(tmp_path, "params,tokens,c4,set\n1e8,2e9,3.5,x\n1e8,2e9,9,y\n")
    assert read(path, {"loss": "c4"}, {"set": "x"})["loss"].tolist() == [3.5]
    with pytest.raises(InputError, match="'c44': did you mean 'c4'"):
        read(path, {"loss": "c44"})
    with pytest.raises(InputError, match="'sett': did you mean 'set'"):
        read(path, {"loss": "c4"}, {"sett": "x"})
    with pytest.raises(InputError, match="no rows with set=z"):
        read(path, {"loss": "c4"}, {"set": "z"})
    with pytest.raises(InputError, match="--columns=M=… is unknown"):
        read(path, {"loss": "c4", "M": "set"})
    with pytest.raises(InputError, match="'c4' is not KEY=VALUE"):
        pairs("loss=a,c4", "columns")


def test_a_law_says_which_column_it_lacks(tmp_path):
    with pytest.raises(InputError, match="no column for C, FLOPs .*; it has 'N', 'loss'"):
        read(save(tmp_path, "N,loss\n1e8,3\n")).inputs(GPT4)


def test_budgets_that_differ_by_a_step_of_rounding_are_one():
    groups = list(budgets(np.array([1e18, 2.4e19, 1.01e18, 1.5e19])))
    assert [group.tolist() for group in groups] == [[0, 2], [3], [1]]


def test_rows_are_the_values_that_were_written(tmp_path):
    points = isoflop(noise=0.01)
    again = read(str(write(points, tmp_path / "r.jsonl")))
    assert all(np.array_equal(again[name], points[name]) for name in ("N", "D", "loss"))
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["loss"] == points["loss"][0]
    assert len(of_arrays(N=[1.0], D=[2.0], loss=[3.0])) == 1
