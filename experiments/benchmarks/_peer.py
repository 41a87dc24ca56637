"""The sides of a benchmark: each a process of its own that works only when asked, so that rounds go A B A B."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np


class Peer:
    """Starts a command and waits until it is ready; it sleeps until iterate() asks for one round.

    The process prints one JSON line when it is ready (`about` here), then one for every line that it reads, and ends
    with its stdin: see `serve`. Its stderr goes to this process's, or to `stderr` (a file, or subprocess.DEVNULL).
    """

    def __init__(self, *command, stderr=None):
        self._process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
        self.about = self._read()

    def _read(self):
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer died with status {self._process.wait()}: see its messages")
        return json.loads(line)

    def iterate(self, message: str = "go"):
        self._process.stdin.write(f"{message}\n")
        self._process.stdin.flush()
        return self._read()

    def close(self):
        self._process.stdin.close()
        status = self._process.wait()
        self._process.stdout.close()
        if status:
            raise RuntimeError(f"the peer ended with status {status}: see its messages")


def serve(about: dict, work: Callable[[str], dict]):
    """The peer's side: one answer for each line of stdin, with the seconds it took."""
    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        answer = work(line.strip())
        print(json.dumps({"seconds": time.perf_counter() - began, **answer}), flush=True)


def interleaved(sides: dict[str, Peer], rounds: int, message: str = "go") -> dict[str, list[dict]]:
    """{side: its answer in each round}; the sides work in turns."""
    answers = {side: [] for side in sides}
    for i in range(rounds):
        for side, peer in sides.items():
            answers[side].append(peer.iterate(message))
        seconds = ", ".join(f"{side} {a[-1]['seconds']:.3f} s" for side, a in answers.items())
        print(f"round {i + 1}/{rounds}: {seconds}", file=sys.stderr)
    return answers


def finish(result: dict, sides: dict[str, Peer], as_json: bool, summary: Callable[[dict], list[str]]):
    """Ends the sides and prints the result, with their versions and the machine: as JSON, or a summary in lines."""
    result |= {"versions": {side: peer.about["about"] for side, peer in sides.items()}, "machine": machine()}
    for peer in sides.values():
        peer.close()
    print(json.dumps(result) if as_json else "\n".join(summary(result)))


def quartiles(values) -> list[float]:
    return np.quantile(list(values), [0.25, 0.5, 0.75]).tolist()


def matmul_speed() -> float:
    """FLOP/s of one 2,048-cubed float32 matmul: what this machine can do at best."""
    return 2 * 2048**3 / _seconds_of_product((2048, 2048), (2048, 2048))


def read_speed() -> float:
    """Bytes/s of reading a 512 MiB matrix once, in a matrix-vector product: the bound of decoding."""
    return 4 * 32768 * 4096 / _seconds_of_product((32768, 4096), (4096,))


def _seconds_of_product(left: tuple[int, ...], right: tuple[int, ...]) -> float:
    """Seconds of the quickest of eight float32 products of arrays of these shapes, in a process that then ends."""
    code = (
        f"import jax, jax.numpy as jnp, time; a, b = jnp.ones({left}), jnp.ones({right}); f = jax.jit(jnp.dot)\n"
        "f(a, b).block_until_ready(); best = 9e9\n"
        "for _ in range(8):\n"
        "    t = time.perf_counter(); f(a, b).block_until_ready(); best = min(best, time.perf_counter() - t)\n"
        "print(best)"
    )
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def machine() -> str:
    return f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}"
