"""What a config is before anything runs: parameters, FLOPs, tokens, PF-days, bytes per device.

    python -m gptjax.describe --config=configs/gpt3.py:175b [--json]

Nothing is allocated and no accelerator is needed; the mesh is the config's (mesh axes of -1 count as 1). The bytes of a
step on a TPU are our own estimate (cost/memory.py) for the default mesh.rules, within 10 % of the TPU compiler's figure
with Splash, which `aot` prints.
"""

import dataclasses
import math

import jax
from absl import flags
from jax.sharding import AbstractMesh, AxisType
from ml_collections import config_flags

from gptjax import command_line, json_files
from gptjax import config as configs
from gptjax.cost.memory import training_peak
from gptjax.errors import InputError
from gptjax.model import architecture
from gptjax.model.architecture import ModelConfig
from gptjax.model.attention import resolve
from gptjax.model.flops import pf_days
from gptjax.model.spec import GPTConfig
from gptjax.parallel.mesh import AXES, batch_shards
from gptjax.pretrain import PretrainConfig
from gptjax.training.offload import MEMORY
from gptjax.training.optimizer import make_optimizer
from gptjax.training.schedule import Schedule
from gptjax.training.state import state_shardings


@configs.with_sharding_rules
def describe(config: dict) -> dict:
    """The figures as JSON types, for a config as a nested dict."""
    c = configs.build(PretrainConfig, with_vocabulary(config))
    m = c.model
    flops = architecture.flops_per_token(m)
    schedule = None
    if c.steps is not None or c.tokens is not None:
        schedule = Schedule(
            c.schedule, batch_size=c.batch_size, context_length=m.context_length,
            learning_rate=c.optimizer.learning_rate, steps=c.steps, tokens=c.tokens,
        )  # fmt: skip
    tokens = schedule and (int(c.tokens) if c.steps is None else schedule.total_tokens)
    sizes = {axis: max(getattr(c.mesh, axis), 1) for axis in AXES}  # -1 counts as 1
    mesh = AbstractMesh(tuple(sizes[a] for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))
    boxed, tx = architecture.abstract_params(m), make_optimizer(c.optimizer, architecture.hidden_rate(m))
    abstract, shardings = state_shardings(boxed, tx, c.precision, mesh)
    params, optimizer = _bytes(abstract.params, shardings.params), _bytes(abstract.opt_state, shardings.opt_state)
    return {
        "params": architecture.parameter_count(m),
        "params_non_embedding": architecture.non_embedding_count(m),
        "flops_per_token": {
            "causal_halved": flops.causal, "palm": flops.palm, "6n": flops.six_n, "full_attention": flops.full,
            "kaplan": flops.kaplan, "chinchilla": flops.chinchilla,
        },
        "tokens": tokens,
        "steps": schedule and schedule.steps,
        "ramp_steps": schedule and math.ceil(schedule.ramp_steps - 1e-9),
        "batch_tokens": schedule and round(schedule.full),
        "pf_days": tokens and pf_days(flops.six_n * tokens),
        "mesh": sizes,
        "devices": math.prod(sizes.values()),
        "bytes_per_device": {"params": params, "optimizer": optimizer, "gradients": params},
        "host_bytes_per_device": _bytes(abstract.opt_state, shardings.opt_state, host=True),  # optimizer.offload
        "peak_per_tpu_chip": peak(c, sizes, params, optimizer),
        "model": dataclasses.asdict(m),
    }  # fmt: skip


def peak(c: PretrainConfig, sizes, params: int, optimizer: int) -> dict[str, int] | None:
    """{what: bytes} at the peak of a step on a TPU; None for an LSTM, which the estimate does not cover."""
    m = c.model
    if not isinstance(m, GPTConfig):
        return None
    path = resolve("auto" if m.attention in ("cpu", "cudnn") else m.attention, "tpu")
    found, *_ = training_peak(
        dataclasses.replace(m, attention=path), sizes, rows=c.microbatch_rows,
        micro_batches=c.batch_size // c.microbatch_rows, chunk=c.loss_chunk, dtype=c.precision.dtype,
        state={"params": params, "optimizer": optimizer,
               "batch": 8 * c.batch_size * m.context_length // batch_shards(sizes)},
    )  # fmt: skip
    return found


def with_vocabulary(config: dict) -> dict:
    """The config with a vocabulary size: where the tokenizer would set it, the size asked for in data.tokenizer."""
    if "vocab_size" not in (config.get("model") or {}):
        raise InputError(
            "This config has no model, because its stage starts from another run's workdir: give a pre-training "
            "config, as configs/gpt2.py:124m, or use gptjax.aot for the memory of later stages."
        )
    if config["model"]["vocab_size"] is not None:
        return config
    spec = config["data"]["tokenizer"]
    if not spec.startswith("bpe:"):
        raise InputError("The vocabulary is decided by the data: give --config.model.vocab_size=N.")
    return {**config, "model": {**config["model"], "vocab_size": int(spec.removeprefix("bpe:"))}}


def _bytes(tree, shardings, host=False) -> int:
    """Bytes of one device's shards in its own memory, or in its host's."""
    size = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize * ((s.memory_kind == MEMORY) == host)
    return sum(jax.tree.leaves(jax.tree.map(size, tree, shardings)))


def main(_):
    jax.config.update("jax_platforms", "cpu")  # tracing looks for devices
    d = describe(FLAGS.config.to_dict())
    if FLAGS.json:
        print(json_files.dumps(d))
        return
    gib = lambda n: f"{n / 2**30:,.2f} GiB"
    rows = [
        ("model", architecture.describe(configs.build(ModelConfig, d["model"]))),
        ("parameters", f"{d['params']:,}"),
        ("  without embeddings", f"{d['params_non_embedding']:,}"),
        ("training FLOPs/token", f"{d['flops_per_token']['6n']:,}  (6N)"),
        ("", f"{d['flops_per_token']['palm']:,}  (PaLM: 6N + 12LHQT)"),
        ("", f"{d['flops_per_token']['causal_halved']:,.0f}  (matmuls, causal attention halved)"),
    ][: None if d["peak_per_tpu_chip"] else -2]  # an LSTM has no attention
    if d["tokens"]:
        rows += [
            ("tokens", f"{d['tokens']:,}"),
            ("steps", f"{d['steps']:,} of {d['batch_tokens']:,} tokens"
                      + (f", {d['ramp_steps']:,} of them ramping up" if d["ramp_steps"] else "")),
            ("compute", f"{d['pf_days']:,.2f} PF-days (6N)"),
        ]  # fmt: skip
    axes = ", ".join(f"{k} {v}" for k, v in d["mesh"].items() if v > 1) or "one device"
    rows.append(("mesh", f"{axes} ({d['devices']:,} devices)"))
    rows += [(f"{k} per device", gib(v)) for k, v in d["bytes_per_device"].items()]
    if d["host_bytes_per_device"]:
        rows.append(("  in host memory", gib(d["host_bytes_per_device"])))
    if d["peak_per_tpu_chip"]:
        rows.append(("a step, per TPU chip", f"{gib(sum(d['peak_per_tpu_chip'].values()))} peak memory:"))
        rows += [(f"  {gib(v)}", k) for k, v in d["peak_per_tpu_chip"].items()]
    for name, value in rows:
        print(f"{name:<24}{value}")


if __name__ == "__main__":
    FLAGS = flags.FLAGS
    config_flags.DEFINE_config_file("config", None, "A config file, as configs/gpt3.py:175b.", lock_config=True)
    flags.DEFINE_bool("json", False, "Print the result as one JSON object.")
    flags.mark_flag_as_required("config")
    command_line.run(main)
