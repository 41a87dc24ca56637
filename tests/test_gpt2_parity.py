"""The table of GPT-2's published scores, and what is compared with it; the numbers themselves need the weights."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from experiments.gpt2_parity import __main__ as parity
from gptjax.data.bpe import train_bpe
from gptjax.errors import InputError
from gptjax.model import gpt
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.tasks.task import available, load_task
from gptjax.trained import Model


@pytest.fixture(scope="module")
def model():
    """Of GPT-2 124M's depth, and nothing else of it."""
    config = GPTConfig(280, 12, 1, 8, 64, attention="cpu")
    params = jax.jit(lambda key: gpt.init(config, key))(jax.random.key(0))
    tokenizer = train_bpe(["the cat sat on the mat"], 265)
    return Model(config, params, tokenizer, jnp.float32, 0, make_mesh(MeshConfig(), jax.devices()[:1]))


def test_the_published_scores_are_of_tasks_that_there_are():
    rows = parity.published()
    assert len(rows) == len({(r.model, r.task, r.shots, r.metric, r.value) for r in rows}) >= 20
    assert {r.task for r in rows} <= set(available()) and {r.model for r in rows} <= set(parity.SIZES.values())
    assert all(r.protocol and r.source and r.metric in load_task(r.task).measured for r in rows)
    assert [r.value for r in rows if (r.model, r.task, r.metric) == ("124M", "hellaswag", "acc")] == [0.2892]


def test_rows_with_data_are_computed_and_the_others_said(model, tmp_path, capsys):
    texts = ["the cat sat on the mat", "the mat sat on the cat the cat", "sat cat the on"]
    (tmp_path / "lambada.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = parity.compare(model, str(tmp_path))
    assert {c.row.model for c in found} == {"124M"}
    assert all((c.ours is not None) == (c.row.task == "lambada") for c in found)
    shown = parity.table(found)
    assert "no data" in shown and "40.0554" in shown and "hellaswag, 10 shots" in shown
    assert "hellaswag.jsonl" in capsys.readouterr().out  # which file is missing
    (perplexity,) = (c for c in found if c.row.value == 40.0554)
    assert perplexity.apart == pytest.approx((perplexity.ours - 40.0554) / max(perplexity.error, 1.4787))


def test_other_sizes_and_missing_weights_are_told(model, tmp_path):
    with pytest.raises(InputError, match="Nothing is published of a GPT-2 of 3 layers"):
        parity.compare(dataclasses.replace(model, config=GPTConfig(280, 3, 1, 8, 64)), str(tmp_path))
    with pytest.raises(InputError, match="neither a workdir .* nor a directory with model.safetensors"):
        parity.open_model(str(tmp_path), str(tmp_path / "scratch"))
