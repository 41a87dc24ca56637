"""The pre-training text of PPO-ptx: its source, and how many sequences go into a minibatch (InstructGPT C.4)."""

import dataclasses

import numpy as np

from gptjax.data import corpus, lm
from gptjax.distributed import hosts
from gptjax.errors import InputError
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.sharding import batch_sharding
from gptjax.rlhf.config import PtxConfig

PADDING = -1  # every token of a row that only fills up a micro-batch


@dataclasses.dataclass(frozen=True)
class Text:
    examples: lm.Examples
    text: corpus.Text
    context_length: int

    def batch(self, position: int, shape: tuple[int, int, int], sequences: int, mesh) -> dict:
        """{tokens: int [minibatches, M, B, T + 1]} on the mesh: consecutive sequences, the first of them number
        `position`.

        shape: (minibatches, M, B) of batch_shape. sequences: of each minibatch; rows beyond those are PADDING and
        ignored. If the policy was pre-trained with isolated documents, also segment_ids and positions, [..., T].
        """
        sharding = batch_sharding(mesh, 2)
        minibatches, micro, rows = shape
        place = np.broadcast_to(np.arange(micro * rows).reshape(1, micro, rows), shape)
        index = position + np.minimum(place, sequences - 1) + sequences * np.arange(minibatches)[:, None, None]
        here = np.asarray(hosts.rows_here(sharding, rows))
        index, place = index[..., here], place[..., here]
        tokens = self.examples.read(index.ravel()).astype(np.int32)
        batch = {"tokens": np.where(place.reshape(-1, 1) < sequences, tokens, PADDING)}
        if self.text.eot_id is not None:
            batch["segment_ids"], batch["positions"] = lm.with_segments(tokens[:, :-1], self.text.eot_id)
        return {k: hosts.global_array(v.reshape(*index.shape, -1), sharding) for k, v in batch.items()}


def load_text(
    c: PtxConfig, policy, workdir, context_length: int, seed: int, *, needed: bool, record: dict, known: bool
) -> Text | None:
    """A Text, shuffled by `seed`; None if there is none and it is not needed.

    policy: the workdir whose pre-training text is used when the config names no source. needed: raise InputError if
    there is no text. record, known: records.start_record, and whether the run is resumed.
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


def sequences(c: PtxConfig, episodes: int) -> int:
    """How many pre-training sequences belong to a minibatch of `episodes` episodes."""
    return max(1, round(c.per_episode * episodes))


def batch_shape(c: PtxConfig, minibatches: int, episodes: int, microbatch_size: int | None, mesh):
    """(minibatches, M, B) with room for a minibatch's `sequences`: B is at most microbatch_size rows, and a multiple of
    the number of devices that rows are sharded over."""
    shards = batch_shards(mesh.shape)
    micro = microbatch_size or episodes
    wanted = sequences(c, episodes)
    micro = min(micro, -(-wanted // shards) * shards)
    return minibatches, -(-wanted // micro), micro
