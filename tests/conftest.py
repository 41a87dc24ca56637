"""Eight virtual CPU devices, a persistent compilation cache, and the tiny models tests share."""

import os
from pathlib import Path

# Before JAX starts: with fewer pool threads than this, collectives of 8 devices deadlock on 2 cores.
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # libtpu is here to compile, not to look for a TPU
CACHE = Path(__file__).resolve().parent.parent / ".jax_cache"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")

import jax  # noqa: E402

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_default_matmul_precision", "highest")

import pytest  # noqa: E402

if mutation := os.environ.get("GPTJAX_MUTATION"):  # the tests are tested: tests/test_mutations.py
    from experiments.ppo_exact.mutations import plant

    plant(mutation)

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data beside the checkout; tests that want it skip without


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED_DATA.exists():
        pytest.skip("needs ../shared/data, real data that is not part of this repository")
    return SHARED_DATA


# --- one small run of each stage of alignment, made once (alignment_runs.py) --------------------------------


@pytest.fixture(scope="session")
def alignment(tmp_path_factory):
    """Files of text, demonstrations, comparisons and prompts: {kind: path}."""
    import alignment_runs

    return alignment_runs.files(tmp_path_factory.mktemp("alignment"))


@pytest.fixture(scope="session")
def pretrained(alignment):
    import alignment_runs

    return alignment_runs.make_pretrained(alignment["text"].parent, alignment["text"])


@pytest.fixture(scope="session")
def tuned(alignment, pretrained):
    import alignment_runs

    return alignment_runs.make_tuned(pretrained.parent, pretrained, alignment["demonstrations"])


@pytest.fixture(scope="session")
def judge(alignment, tuned):
    import alignment_runs

    return alignment_runs.make_judge(tuned.parent, tuned, alignment["comparisons"])
