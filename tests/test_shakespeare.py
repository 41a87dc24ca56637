"""nanoGPT's pin: its CPU setting on tinyshakespeare ends at a validation loss of 1.88 nats per character."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.optimized


@pytest.mark.long
def test_shakespeare_reaches_nanogpts_validation_loss(shared_data, tmp_path):
    source = shared_data / "lm" / "tinyshakespeare" / "input.txt"
    if not source.exists():
        pytest.skip("needs tinyshakespeare's input.txt")
    environment = {k: v for k, v in os.environ.items() if k != "NPROC"}  # one device: NPROC would only slow it
    command = [
        sys.executable, "-m", "gptjax.pretrain", "--config=configs/shakespeare_char.py",
        f"--workdir={tmp_path / 'run'}", f"--config.data.source={source}",
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=900)
    last = json.loads((tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2000
    assert last["loss"] == pytest.approx(1.88, abs=0.03)
