"""The pre-training text of PPO-ptx: where it comes from, and how much of it a minibatch takes (InstructGPT C.4)."""

import dataclasses

import numpy as np

from gptjax.data import corpus, lm
from gptjax.errors import InputError
from gptjax.parallel import hosts
from gptjax.parallel.mesh import batch_ways
from gptjax.rlhf.config import PtxConfig
from gptjax.training.step import batch_sharding


@dataclasses.dataclass(frozen=True)
class Text:
    examples: lm.Examples
    text: corpus.Text
    context_length: int

    def batch(self, position: int, shape: tuple[int, int, int], mesh) -> dict:
        """{tokens: int [minibatches, micro-batches, rows, context + 1]} on the mesh: the sequences from `position` on;
        where the policy's base was pre-trained with isolated documents also segment_ids and positions, [..., context].
        """
        sharding = batch_sharding(mesh, 2)
        index = position + np.arange(np.prod(shape)).reshape(shape)[..., hosts.rows_here(sharding, shape[-1])]
        batch = {"tokens": self.examples.read(index.ravel())}
        if self.text.eot_id is not None:
            batch["segment_ids"], batch["positions"] = lm.with_segments(batch["tokens"][:, :-1], self.text.eot_id)
        return {k: hosts.global_array(v.reshape(*index.shape, -1), sharding) for k, v in batch.items()}


def load_text(
    c: PtxConfig, policy, workdir, context_length: int, seed: int, *, needed: bool, record: dict, known: bool
) -> Text | None:
    """A Text, or None where there is none and it is not needed. Its order is a draw of its own, by `seed`.

    policy: the workdir whose pre-training text it is when the config names no source. record, known:
    corpus.start_record, and whether the run is resumed.
    """
    length = c.context_length or context_length
    try:
        text = corpus.load_text(c.source, policy, workdir, c.cache, "ptx.cache", seed, record, known)
        examples = text.examples(length, seed, record["shuffle"])
    except InputError as error:
        if needed:
            raise InputError(
                f"ppo.ptx_coefficient > 0 needs pre-training text: {error} (--config.ptx.source)."
            ) from error
        if c.source:
            raise
        hosts.say(f"no loss on pre-training text will be measured: {error}")
        return None
    return Text(examples, text, length)


def batch_shape(c: PtxConfig, minibatches: int, episodes: int, microbatch_size: int | None, mesh):
    """(minibatches, micro-batches, rows): per_episode sequences for each of a minibatch's episodes, in whole
    micro-batches of at most microbatch_size rows, each a multiple of the devices that rows are cut up over."""
    ways = batch_ways(mesh.shape)
    micro = microbatch_size or episodes
    wanted = max(1, round(c.per_episode * episodes))
    micro = min(micro, -(-wanted // ways) * ways)
    return minibatches, -(-wanted // micro), micro
