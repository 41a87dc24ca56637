"""DPO's reference log-probabilities of all completions, computed once, before training.

They are saved in reference.npz in the workdir, so that a resumed run does not need the reference model.
"""

import functools
import io

import jax
import numpy as np
from etils import epath

from gptjax.console import progress
from gptjax.data.comparisons import Comparison, Comparisons, validation_batches
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.objectives.dpo import response_log_probs
from gptjax.parallel.sharding import batch_sharding
from gptjax.trained import Model


class ReferenceLogProbs:
    """train, validation: indices of comparisons [B], -1 for padding -> {'starts': int32 [B, N], 'reference': float32
    [B, N]} for N completions of a prompt; the `more` of ComparisonBatches.

    c: DPOConfig. Raises InputError if neither the reference model nor its saved log-probabilities exist.
    """

    def __init__(self, base: Model, comparisons: Comparisons, length: int, c, mesh, workdir):
        self._path = epath.Path(workdir) / "reference.npz"
        self._k, self._fingerprint = comparisons.k, f"{comparisons.fingerprint} {length}"
        self._values = hosts.from_first(self._read)
        if self._values is None and base.params is None:
            raise InputError(f"{self._path} is gone, and so is the reference: put back {c.init_from}.")
        splits = {"train": comparisons.train, "validation": comparisons.validation}
        if self._values is None:
            with jax.set_mesh(mesh):
                self._values = {name: self._measure(base, rows, length, c, mesh) for name, rows in splits.items()}
        starts = {name: np.array([len(row.prompt) for row in rows], np.int32) for name, rows in splits.items()}
        values = {name: np.asarray(rows, np.float32) for name, rows in self._values.items()}
        self.train, self.validation = (functools.partial(self._arrays, starts[n], values[n]) for n in splits)

    def _arrays(self, starts, values, index) -> dict[str, np.ndarray]:
        starts = np.repeat(starts[index][:, None], self._k, 1)
        return {"starts": starts, "reference": values[index]}

    def _measure(self, base: Model, rows: list[Comparison], length: int, c, mesh) -> list[list[float]]:
        @functools.partial(jax.jit, out_shardings=hosts.replicated(mesh))
        def measure(params, b):
            flat = (b[name].reshape(-1, *b[name].shape[2:]) for name in ("tokens", "starts", "lengths"))  # [B x N, ...]
            log_prob = response_log_probs(
                params, base.config, *flat, dtype=c.precision.dtype, chunk=c.loss_chunk, mesh=mesh
            )
            return log_prob.reshape(b["lengths"].shape)

        starts = np.array([len(row.prompt) for row in rows], np.int32)
        sharding = batch_sharding(mesh, 0)
        batches = validation_batches(
            rows, c.microbatch_rows, self._k, length, pad_id=0, here=hosts.batch_rows(sharding, c.microbatch_rows),
            more=lambda index: {"starts": np.repeat(starts[index][:, None], self._k, 1)},
        )  # fmt: skip
        out = []
        for i in progress(range(len(batches)), desc="reference", unit="batch", leave=False, disable=not hosts.first()):
            batch = {k: hosts.global_array(batches[i][k], sharding) for k in ("tokens", "starts", "lengths")}
            out.append(jax.device_get(measure(base.params, batch)))
        return np.concatenate(out)[: len(rows)].tolist()

    def _read(self) -> dict | None:
        if not self._path.exists():
            return None
        with np.load(io.BytesIO(self._path.read_bytes())) as file:
            if str(file["fingerprint"]) != self._fingerprint:
                return None
            return {name: file[name].tolist() for name in ("train", "validation")}

    def save(self):
        """Writes reference.npz. To be called once the workdir belongs to this run."""

        def write():
            content = io.BytesIO()
            values = {name: np.asarray(rows, np.float32) for name, rows in self._values.items()}
            np.savez(content, fingerprint=self._fingerprint, **values)
            self._path.write_bytes(content.getvalue())

        hosts.only_first(write)
