"""python tests/mutants.py FOLDER {name: test, ...} runs each test with that fault planted: FOLDER/name.txt has what
pytest said, and its last line the exit code.

Each in a fork of one process that has imported everything but compiled nothing: the imports are most of such a run.
"""

import json
import os
import sys
from pathlib import Path

import matplotlib.pyplot  # noqa: F401
import pytest

import experiments.ppo_exact.mutations  # noqa: F401 (and with it all that is mutated)
import gptjax.training.checkpoint  # noqa: F401


def run(name: str, test: str):
    """Does not return."""
    os.environ["GPTJAX_MUTATION"] = name  # for conftest.py
    code = pytest.main(["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", test])
    print(f"\n{int(code)}", flush=True)
    os._exit(0)


def main(folder: str, tests: str):
    for name, test in json.loads(tests).items():
        child = os.fork()
        if not child:
            with open(Path(folder) / f"{name}.txt", "w") as out:
                for stream in (1, 2):
                    os.dup2(out.fileno(), stream)
            run(name, test)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
