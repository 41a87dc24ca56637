"""Runs programs that a model wrote, for pass@k (evals/best_of_k.py).

THIS IS NOT A SECURITY BOUNDARY. A program runs as the user who started it: it can read that user's files, use the
network, and delete things. The limits here (time, memory, size of files, no input, a temporary folder, no environment,
all processes of its group ended) contain accidents, not malice. Run it in a container or virtual machine that holds
nothing of value and has no network. That is why the caller has to allow it each time, as HumanEval's users have to
uncomment a line.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gptjax.errors import InputError

# Runs in the new process, which limits itself (a hook between fork and exec may hang in a process with threads, as
# JAX's are). The verdict goes through a copy of stdout that the program does not know of.
_RUNNER = """
import os, sys
path, word, seconds, memory = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
try:
    import resource
    limits = {"AS": memory, "DATA": memory, "CPU": seconds + 1, "FSIZE": 1 << 24, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
except ImportError:
    pass
verdict, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
os.dup2(nothing, 1)
os.dup2(nothing, 2)
sys.argv = [path]
try:
    exec(compile(open(path, encoding="utf-8").read(), path, "exec"), {"__name__": "__main__"})
    outcome = word
except BaseException as error:
    outcome = f"failed: {type(error).__name__}: {error}"[:200]
os.write(verdict, outcome.encode("utf-8", "replace"))
os._exit(0)
"""


def run_program(program: str, *, allow_code_execution: bool, seconds: float = 3.0, memory_bytes: int = 2**30) -> str:
    """Runs a Python program in a process of its own: 'passed' where it reaches its end, 'failed: ...' with the
    exception, 'timed out', or 'ended early' (it left the interpreter or was killed, as by the memory limit).

    Args:
        allow_code_execution: the caller has read this module's docstring. seconds: of wall time.
        memory_bytes: of address space; on Windows there is no limit.
    Raises:
        InputError: the caller does not allow it.
    """
    if not allow_code_execution:
        raise InputError(
            "This task runs code that a model wrote, with your rights: allow it with allow_code_execution=True, in a "
            "container that holds nothing of value."
        )
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path, passed = Path(folder) / "program.py", secrets.token_hex(16)
        path.write_text(program, encoding="utf-8", errors="replace")
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", _RUNNER, str(path), passed, str(int(seconds)), str(memory_bytes)],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder, env={},
            start_new_session=True,
        )  # fmt: skip
        try:
            out, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return "timed out"
        finally:
            _end(process)
    outcome = out.decode("utf-8", "replace")
    return "passed" if outcome == passed else outcome if outcome.startswith("failed: ") else "ended early"


def _end(process):
    """Ends a process and all that it started in its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL) if hasattr(os, "killpg") else process.kill()
    process.stdout.close()
    process.wait()


def run_programs(programs: Sequence[str], *, workers: int | None = None, **options) -> list[str]:
    """`run_program` of each, `workers` at a time (None = as many as there are processors)."""
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        return list(pool.map(lambda program: run_program(program, **options), programs))


def humaneval_program(prompt: str, completion: str, test: str, entry_point: str) -> str:
    """The program that is run for a row of HumanEval (Chen et al. 2021): the function, its tests, and their call."""
    return f"{prompt}{completion}\n{test}\ncheck({entry_point})"
