"""What is shown never ends a run: encodings, closed pipes, log files."""

import errno
import io
import subprocess
import sys
import time
import types
import warnings

import pytest
from conftest import ROOT
from runs import one_device_environment

from gptjax import console
from gptjax.console import lenient_output, plain_warnings, progress

TEXT = "naïve → 雪\ud800"  # the last is half of a surrogate pair, which UTF-8 has no bytes for


@pytest.mark.parametrize("encoding, expected", [
    ("ascii", rb"na\xefve \u2192 \u96ea\ud800"), ("latin-1", b"na\xefve \\u2192 \\u96ea\\ud800"),
    ("utf-8", "naïve → 雪".encode() + rb"\ud800"),
])  # fmt: skip
def test_characters_outside_the_encoding_are_escaped(monkeypatch, encoding, expected):
    for stream in ("stdout", "stderr"):
        written = io.BytesIO()
        monkeypatch.setattr(sys, stream, io.TextIOWrapper(written, encoding=encoding, newline="\n"))
        with lenient_output():
            print(TEXT, file=getattr(sys, stream))
        assert written.getvalue() == expected + b"\n"


class Gone(io.StringIO):
    """A stream to a terminal that is gone, a closed pipe or a full disk."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error


@pytest.mark.parametrize("error", [
    BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.EIO, "I/O error"), OSError(errno.ENOSPC, "disk full"),
    ValueError("I/O operation on closed file"),
])  # fmt: skip
def test_failing_output_does_not_raise(monkeypatch, error):
    monkeypatch.setattr(sys, "stdout", out := Gone(error))
    monkeypatch.setattr(sys, "stderr", err := Gone(error))
    with lenient_output():
        print("step 1", flush=True)
        for _ in progress(range(3), desc="evaluating"):
            print("warning", file=sys.stderr)
    assert sys.stdout is out and sys.stderr is err


STAGE = """
import sys
from pathlib import Path
from gptjax.command_line import run
from gptjax.config import with_sharding_rules

@with_sharding_rules
def stage(config, workdir):
    for step in range(20_000):
        print(f"step {step}: naïve", flush=step % 100 == 0)
    Path(workdir).write_text("finished")

run(lambda _: stage({}, sys.argv.pop()))
"""


def test_a_run_continues_after_its_pipe_is_closed(tmp_path):
    """As `python -m gptjax.pretrain ... | head -1`; nothing is raised at exit either."""
    command = [sys.executable, "-c", STAGE.replace("sys.argv.pop()", repr(str(tmp_path / "done")))]
    environment = one_device_environment(PYTHONIOENCODING="ascii")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"step 0: na\\xefve\n"
    process.stdout.close()
    printed = process.stderr.read().decode()
    assert (process.wait(timeout=60), printed) == (0, "") and (tmp_path / "done").read_text() == "finished"


def test_a_command_exits_quietly_after_its_pipe_is_closed():
    script = "from gptjax.command_line import run\nrun(lambda _: [print('text', i) for i in range(100_000)])"
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=one_device_environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == b"text 0\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 0)


# --- progress ---------------------------------------------------------------------------------------------


class Log(io.StringIO):
    encoding = "utf-8"

    def __init__(self, terminal=False):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def lines(self):
        assert "\r" not in self.getvalue()
        return self.getvalue().splitlines()


@pytest.fixture
def log(monkeypatch):
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    here = types.SimpleNamespace(stderr=Log())  # pytest sets sys.stderr itself between a fixture and its test
    monkeypatch.setattr(console, "sys", here)
    return here.stderr


def test_a_log_file_has_a_line_at_the_start_and_the_end(log):
    bar = progress(total=1000, initial=100, unit="step")
    for step in range(100, 1000):
        bar.update()
        bar.set_postfix_str(f"loss {step}")
        bar.clear()
    bar.close()
    bar.close()
    first, last = log.lines()
    assert "100/1000" in first and "1000/1000" in last and "loss 999" in last


def test_a_log_file_has_a_line_at_intervals(log, monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "0.2")
    began = time.monotonic()
    for _ in progress(range(60), desc="evaluating", leave=False):
        time.sleep(0.01)
    assert 1 <= len(log.lines()) <= (time.monotonic() - began) / 0.18 + 1


def test_a_short_inner_bar_writes_nothing_to_a_log_file(log):
    for options in ({"leave": False}, {"delay": 1}, {"disable": True}):
        for _ in progress(range(100), desc="evaluating", **options):
            pass
    assert log.lines() == []


def test_tqdm_disable_is_respected():
    """tqdm reads it when it is imported."""
    script = "from gptjax.console import progress\nassert list(progress(range(3))) == [0, 1, 2]"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=one_device_environment(TQDM_DISABLE="1"),
                          capture_output=True, timeout=60)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_terminal_has_a_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Log(terminal=True))
    for _ in progress(range(3), mininterval=0):
        pass
    assert "\r" in sys.stderr.getvalue() and "3/3" in sys.stderr.getvalue()


def test_without_stderr_nothing_is_shown(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress(range(3))) == [0, 1, 2]
    with lenient_output():
        assert sys.stderr is None


def test_the_package_uses_no_other_progress_bars():
    own = ROOT / "gptjax" / "console.py"
    assert [p.name for p in (ROOT / "gptjax").rglob("*.py") if p != own and " tqdm(" in p.read_text()] == []


def test_warnings_print_only_their_message(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    plain_warnings()
    assert warnings.formatwarning(UserWarning("few rows"), UserWarning, "gptjax/lock.py", 30) == "warning: few rows\n"
