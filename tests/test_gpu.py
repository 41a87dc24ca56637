"""The GPU path as far as a machine without a GPU can follow it: the programs lowered for CUDA, XLA's flags, and the
benchmark from top to bottom at toy size. Lowering says that cuDNN is called and with what; not that it runs."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax._src.cudnn import fused_attention_stablehlo
from jax._src.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec
from runs import one_device_environment

import experiments.benchmarks.gpu.__main__ as benchmark
from experiments.benchmarks.gpu import check, common
from gptjax.aot import programs
from gptjax.distributed import gpu_flags
from gptjax.errors import InputError
from gptjax.model.attention import attention, causal_mask
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import MeshConfig, make_mesh
from gptjax.ppo import PPOConfig
from gptjax.pretrain import PretrainConfig
from gptjax.rlhf import rollout
from gptjax.rlhf.config import RolloutConfig, UpdateConfig
from gptjax.training.precision import PrecisionConfig

MODEL = GPTConfig(256, n_layer=2, n_head=2, d_model=32, context_length=64, attention="cudnn", unroll=1)
BANDED = dataclasses.replace(MODEL, local_window=16)
CALLS = re.compile(r"custom_call @(__cudnn\$\w+)\(.*?sliding_window_length\\22: (\d+)")


@pytest.fixture
def cudnn(monkeypatch):
    """Without the CUDA plugin there is no cuDNN to ask for its version: JAX asks it before it lowers."""
    there = types.SimpleNamespace(cudnn_get_version=lambda: 90800)  # the oldest that jax[cuda12] 0.10 installs
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", there)


def calls(jitted, *arguments, **options):
    """{(cuDNN's function, band)} in the program lowered for CUDA; band 0 = none."""
    text = jitted.trace(*arguments, **options).lower(lowering_platforms=("cuda",)).as_text()
    return {(name, int(band)) for name, band in CALLS.findall(text)}


def forward_and_backward(name, *bands):
    return {(name + way, band) for way in ("", "Backward") for band in bands}


PLAIN, MASKED = "__cudnn$fmhaSoftmax", "__cudnn$fmhaScaleBiasSoftmax"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "window, packed, name, band",
    [(None, False, PLAIN, 0), (16, False, PLAIN, 16), (None, True, MASKED, 0), (16, True, MASKED, 0)],
)
def test_attention_for_cuda_is_cudnns(cudnn, dtype, window, packed, name, band):
    """A band and a mask at once are one mask: cuDNN before 9.10.2 takes no band beside one."""

    def gradients(q, segments):
        f = lambda q: attention(q, q, q, path="cudnn", window=window, segment_ids=segments).astype(jnp.float32).sum()
        return jax.grad(f)(q)

    q = jax.ShapeDtypeStruct((2, 64, 2, 16), dtype)
    segments = jax.ShapeDtypeStruct((2, 64), jnp.int32) if packed else None
    assert calls(jax.jit(gradients), q, segments) == forward_and_backward(name, band)


def test_a_mask_for_cudnn_holds_the_band(monkeypatch):
    """What is handed to cuDNN, worked out by XLA instead: the same as the reference."""
    given = {}

    def instead(q, k, v, *, mask, is_causal, local_window_size, implementation):
        given.update(implementation=implementation, local_window_size=local_window_size)
        return original(q, k, v, mask=mask, is_causal=is_causal, local_window_size=local_window_size)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    q, k, v = (jax.random.normal(key, (2, 32, 2, 8), jnp.bfloat16) for key in jax.random.split(jax.random.key(0), 3))
    segments = jnp.repeat(jnp.arange(4), 8)[None] // jnp.array([[1], [2]])
    on = lambda path: jax.jit(lambda *qkv: attention(*qkv, path=path, window=5, segment_ids=segments))
    found = on("cudnn")(q, k, v)
    assert given == {"implementation": "cudnn", "local_window_size": None}
    expected = on("reference")(*(a.astype(jnp.float32) for a in (q, k, v)))
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=2e-2)


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def lowered(program):
    with jax.set_mesh(program.mesh):
        return calls(program.jitted, *program.arguments)


@pytest.mark.parametrize(
    "compute, model, packed", [("bfloat16", BANDED, False), ("float16", MODEL, True)], ids=["banded", "packed"]
)
def test_the_train_step_for_cuda(cudnn, compute, model, packed):
    c = PretrainConfig(model=model, precision=PrecisionConfig(compute), batch_size=4, microbatch_size=2)
    c = dataclasses.replace(c, data=dataclasses.replace(c.data, isolate_documents=packed))
    bands = {0} if packed or model is MODEL else {0, 16}  # dense and banded layers, by a conditional
    expected = forward_and_backward(MASKED if packed else PLAIN, *bands)
    assert lowered(programs.train_program(c, one_device())) == expected


def test_what_cudnn_does_not_take_is_left_to_xla(cudnn):
    """Odd lengths, with a mask or without: JAX refuses their gradient."""
    for shape, dtype in (((2, 63, 2, 16), jnp.bfloat16), ((2, 64, 2, 12), jnp.bfloat16), ((2, 64, 2, 16), jnp.float32)):
        f = lambda q: attention(q, q, q, path="cudnn").astype(jnp.float32).sum()
        assert calls(jax.jit(jax.grad(f)), jax.ShapeDtypeStruct(shape, dtype)) == set()


@pytest.fixture
def cudnn_on_cpu(cudnn):
    """cuDNN's two primitives with a lowering for the CPU: on a mesh JAX's own partitioner stands around them, and it
    and what it asks of our shardings are the same on eight CPUs as on eight GPUs."""

    def attend(query, key, value, bias, options):
        t = jnp.arange(query.shape[1])
        mask = causal_mask(t, t, options["sliding_window_length"])
        bias = jnp.where(mask, 0.0, -1e30) + (bias.astype(jnp.float32) if options["variadic_args"][0] else 0.0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32) * options["scale"]
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores + bias).astype(value.dtype), value)

    def forward(query, key, value, bias, *rest, **options):
        out = attend(query, key, value, bias, options)
        batch, time, heads, _ = query.shape
        return [out, jnp.zeros((batch, heads, time))][: 1 + options["is_training"]]

    def backward(query, key, value, bias, *rest, **options):
        d_out = rest[-1]
        pull = jax.vjp(lambda q, k, v: attend(q, k, v, bias, options), query, key, value)[1]
        return [*pull(d_out), jnp.zeros_like(bias)][: 3 + options["variadic_args"][1]]

    for primitive, function in (
        (fused_attention_stablehlo._dot_product_attention_fwd_p, forward),
        (fused_attention_stablehlo._dot_product_attention_bwd_p, backward),
    ):
        mlir.register_lowering(primitive, mlir.lower_fun(function, multiple_results=True), platform="cpu")


@pytest.mark.parametrize("window, packed", [(None, False), (16, True)])
def test_cudnns_partitioner_takes_our_shardings(cudnn_on_cpu, window, packed):
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (8, 64, 2, 16), jnp.bfloat16) for key in keys]
    segments = jnp.tile(jnp.repeat(jnp.arange(4), 16), (8, 1)) // jnp.arange(1, 9)[:, None] if packed else None

    def value_and_gradients(path):
        def run(q, k, v, d_out, segments):
            f = lambda *a: attention(*a, path=path, window=window, segment_ids=segments)
            out, pull = jax.vjp(f, q, k, v)
            return out, *pull(d_out)

        return jax.jit(run)

    expected = jax.block_until_ready(value_and_gradients("reference")(*arrays, segments))
    rows = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")))
    with jax.set_mesh(mesh):
        compiled = value_and_gradients("cudnn").lower(*rows, segments).compile()
        found = compiled(*rows, segments)
    assert "all-gather" not in compiled.as_text()  # each device its own rows and heads
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=4e-2)


def test_ppo_for_cuda(cudnn, model=BANDED):
    """Prompts padded on the left are masked: prefill, scoring by all four models, and the update."""
    c = PPOConfig(
        precision=PrecisionConfig("bfloat16"), batch_size=4, rollout=RolloutConfig(max_new_tokens=16),
        ppo=UpdateConfig(epochs=1, minibatches=2),
    )  # fmt: skip
    assert lowered(programs.collect_program(c, model, model, one_device())) == {(MASKED, 0)}
    assert lowered(programs.update_program(c, model, model, one_device())) == forward_and_backward(MASKED, 0)


# --- what is set before JAX starts -----------------------------------------------------------------------------


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(gpu_flags, "DEVICES", (tmp_path / "nvidia0",))


def test_flags_are_set_on_a_gpu_and_reported_once(a_gpu, capsys):
    environment = {}
    gpu_flags.prepare(environment=environment)
    assert environment == {
        "XLA_FLAGS": " ".join(f"--{name}={value}" for name, value in gpu_flags.FLAGS.items()),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9",
    }
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "latency_hiding" in printed and "0.9" in printed
    gpu_flags.prepare(environment=environment)
    assert capsys.readouterr().err == ""


def test_flags_of_the_user_are_kept(a_gpu, capsys):
    first, second, third = gpu_flags.FLAGS
    environment = {"XLA_FLAGS": f"--{first}=false --xla_dump_to=x", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    gpu_flags.prepare(verbose=False, environment=environment)
    assert environment == {
        "XLA_FLAGS": f"--{first}=false --xla_dump_to=x --{second}=true --{third}=true",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("platforms, expected", [("", True), ("cuda,cpu", True), ("gpu", True), ("cpu", False)])
def test_other_platforms_are_not_gpus(a_gpu, platforms, expected):
    assert gpu_flags.has_nvidia_gpu({"JAX_PLATFORMS": platforms} if platforms else {}) == expected


def test_without_a_gpu_nothing_is_set(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_flags, "DEVICES", (tmp_path / "nvidia0",))
    environment = {}
    gpu_flags.prepare(environment=environment)
    assert environment == {}


def test_a_main_sets_them_before_xla_reads_them_and_jaxlib_knows_each():
    """XLA aborts on an unknown flag; the device count shows that it read these."""
    code = (
        "import pathlib, jax, gptjax.pretrain\n"
        "from gptjax.distributed import gpu_flags, hosts\n"
        "gpu_flags.DEVICES = (pathlib.Path('/'),)\n"
        "gpu_flags.FLAGS = {**gpu_flags.FLAGS, 'xla_force_host_platform_device_count': '3'}\n"
        "with hosts.join({}, 'x'):\n"
        "    jax.config.update('jax_platforms', 'cpu')\n"
        "    print(jax.device_count(), jax.jit(lambda: 1 + 1)())\n"
    )
    environment = one_device_environment(JAX_NUM_CPU_DEVICES="")
    environment = {k: v for k, v in environment.items() if v and k != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["3", "2"] and "NVIDIA GPU: set XLA_FLAGS=" in done.stderr


# --- the benchmark ---------------------------------------------------------------------------------------------


def test_without_a_gpu_the_benchmark_is_one_clear_error(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_flags, "DEVICES", (tmp_path / "nvidia0",))
    with pytest.raises(InputError, match="No NVIDIA GPU.*--tiny"):
        benchmark.main(["--only=train", f"--output={tmp_path}"])
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--only=decoding", "--tiny"])
    assert "there is no part 'decoding': choose of check, train, decode, ppo, attention" in capsys.readouterr().err


def test_a_part_that_does_not_end_costs_no_other(monkeypatch, tmp_path, capsys):
    """The time is up in the second of two; the first is in the file, and the status tells."""
    started = time.perf_counter()
    clock = iter([started, started, started, started + 600] + [started + 600] * 9)
    figures = {"about": {"device": "NVIDIA H100 80GB HBM3"}, "own": "cudnn"}

    def run(command, timeout, **_):
        if timeout < 60:
            raise subprocess.TimeoutExpired(command, timeout)
        return types.SimpleNamespace(returncode=0, stdout=f"noise\n{json.dumps(figures)}\n")

    monkeypatch.setattr(benchmark.subprocess, "run", run)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock))
    args = types.SimpleNamespace(minutes=5, output=str(tmp_path), tiny=False, torch_python="x")
    with pytest.raises(SystemExit, match="1"):
        benchmark.measure(args, ["attention", "check"])
    written = json.loads((tmp_path / "gpu-h100-80gb-hbm3.json").read_text())
    assert written["attention"]["own"] == "cudnn" and "--minutes" in written["check"]["left out"]
    assert "check: left out" in capsys.readouterr().out


@pytest.mark.slow
def test_the_benchmark_from_top_to_bottom(tmp_path):
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--tiny", f"--output={tmp_path}"]
    done = subprocess.run(command, env=one_device_environment(), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert ("no peer: " in done.stderr) == (importlib.util.find_spec("torch") is None)
    result = json.loads((tmp_path / "gpu-tiny-cpu.json").read_text())
    assert (tmp_path / "gpu-tiny-cpu.png").stat().st_size > 5_000
    check, train, decode, ppo, paths = (result[k] for k in benchmark.names(benchmark.KINDS, tiny=True))
    assert len(check["checks"]) == 16 and check["wrong"] == [] and check["path"] == "cpu"
    assert train["tokens_per_second"] > 0 and train["mfu_palm"] is None and train["about"]["device"] == "cpu"
    assert decode["batch 2"]["tokens_per_second"] > 0 and decode["batch 2"]["bound_tokens_per_second"] is None
    assert ppo["seconds"][1] == pytest.approx(ppo["rollout"][1] + ppo["score"][1] + ppo["update"][1], rel=0.5)
    assert paths["dense"]["own"]["ms_quartiles"][1] > 0


@pytest.mark.slow
def test_a_wrong_result_is_named(monkeypatch):
    """A sampler whose log-probabilities are another distribution's, on this machine's CPU."""
    real = rollout.sampler_difference
    monkeypatch.setattr(rollout, "sampler_difference", lambda sampled, scored, mask: real(1.01 * sampled, scored, mask))
    found = check.sampler_and_ppo(common.TINY, "float32")
    assert [what for what, (value, bound) in found.items() if not value <= bound] == [
        "float32 sampler's log-probabilities beside teacher forcing"
    ]
