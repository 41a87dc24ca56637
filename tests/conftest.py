"""Eight virtual CPU devices, a persistent compilation cache, and the tiny models tests share."""

import ctypes
import fcntl
import gc
import json
import os
import sys
from pathlib import Path

# Before JAX starts: with fewer pool threads than this, collectives of 8 devices deadlock on 2 cores.
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu is here to compile, not to look for a TPU
CACHE = Path(__file__).resolve().parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # most programs here are small

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

import pytest  # noqa: E402

from gptjax.parallel.sharding import forget  # noqa: E402

if mutation := os.environ.get("GPTJAX_MUTATION"):  # the tests are tested: tests/test_mutations.py
    from experiments.ppo_exact.mutations import plant

    plant(mutation)

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data beside the checkout; tests that want it skip without


def pytest_collection_finish():
    """What the imports made is never garbage: collections, a twentieth of the time, need not look at it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.exists():
        pytest.skip("needs ../shared/data, real data that is not part of this repository")
    return SHARED_DATA


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Compiled programs, a megabyte or two each and hundreds in a file, are kept by JAX for good and were most of a
    worker's memory (above 5 GB at the end). They go at the end of a file, as soon as the process is large; glibc gives
    back what was freed only when told to."""
    yield
    if resident_bytes() > 2e9:
        forget()
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(autouse=True)
def programs_of_what_is_patched(request):
    """Runs in one process share their programs (parallel/sharding.py). A test that patches what they are traced from
    shares with no other test; one that patches something else does so by pytest.MonkeyPatch.context()."""
    patches = "monkeypatch" in request.fixturenames
    if patches:
        forget()
    yield
    if patches:
        forget()


@pytest.fixture(autouse=True)
def no_drawing():
    """Runs inside a test write reports without pictures, most of a second each; runs of a module's fixtures draw."""
    import matplotlib.pyplot as plt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gptjax.report.image", lambda figure, alt: plt.close(figure) or f"<img alt='{alt}'>")
        yield


def resident_bytes() -> float:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else float("inf")


@pytest.fixture(scope="module")
def one_device():
    """All stages of a file on the first of the 8 devices: pytestmark = pytest.mark.usefixtures("one_device")."""
    from alignment_runs import on_one_device

    with on_one_device():
        yield


# --- one small run of each stage of alignment, made once (alignment_runs.py) --------------------------------


@pytest.fixture(scope="session")
def once(request, tmp_path_factory):
    """once(make): what make(folder) returned, called once in the session: by the first of pytest-xdist's workers
    that asks; the others wait for it. What it makes is to be read, not written to."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if hasattr(request.config, "workerinput") else root

    def made(make):
        folder = root / make.__name__
        with open(root / f"{make.__name__}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = folder / "made"
            if not done.exists():
                folder.mkdir(exist_ok=True)
                done.write_text(json.dumps(make(folder), default=str))
        return json.loads(done.read_text())

    return made


@pytest.fixture(scope="session")
def alignment(once):
    """Files of text, demonstrations, comparisons and prompts: {kind: path}."""
    import alignment_runs

    return {kind: Path(path) for kind, path in once(alignment_runs.files).items()}


@pytest.fixture(scope="session")
def pretrained(once, alignment):
    import alignment_runs

    def pretrained(root):
        return alignment_runs.make_pretrained(root, alignment["text"])

    return Path(once(pretrained))


@pytest.fixture(scope="session")
def tuned(once, alignment, pretrained):
    import alignment_runs

    def tuned(root):
        return alignment_runs.make_tuned(root, pretrained, alignment["demonstrations"])

    return Path(once(tuned))


@pytest.fixture(scope="session")
def reward_dir(once, alignment, tuned):
    import alignment_runs

    def reward_dir(root):
        return alignment_runs.make_reward_model(root, tuned, alignment["comparisons"])

    return Path(once(reward_dir))
