"""The pre-training text of PPO-ptx: where it comes from, and how much of it a minibatch takes (InstructGPT C.4)."""

import dataclasses

import numpy as np

from gptjax.data.corpus import text_windows
from gptjax.errors import InputError
from gptjax.parallel import hosts
from gptjax.parallel.mesh import batch_ways
from gptjax.rlhf.config import PtxConfig
from gptjax.training.step import batch_sharding

PADDING = -1  # a token of a row that is there to fill a micro-batch


@dataclasses.dataclass(frozen=True)
class Text:
    examples: object  # lm.Windows or lm.Mixture
    validation: object  # tokens.TokenShards
    context_length: int

    def batch(self, position: int, shape: tuple[int, int, int], sequences: int, mesh):
        """Tokens int [minibatches, micro-batches, rows, context + 1] on the mesh: the sequences from `position` on, so
        many in each minibatch. Rows beyond those are PADDING and count for nothing."""
        sharding = batch_sharding(mesh, 2)
        minibatches, micro, rows = shape
        place = np.broadcast_to(np.arange(micro * rows).reshape(1, micro, rows), shape)
        index = position + np.minimum(place, sequences - 1) + sequences * np.arange(minibatches)[:, None, None]
        here = np.asarray(hosts.rows_here(sharding, rows))
        index, place = index[..., here], place[..., here]
        tokens = self.examples.read(index.ravel()).reshape(*index.shape, -1).astype(np.int32)
        return hosts.global_array(np.where(place[..., None] < sequences, tokens, PADDING), sharding)


def load_text(c: PtxConfig, policy, workdir, context_length: int, seed: int, *, needed: bool, resumed: bool):
    """A Text, or None where there is none and it is not needed. Its order is a draw of its own, by `seed`.

    policy: the workdir whose pre-training text it is when the config names no source.
    """
    length = c.context_length or context_length
    try:
        examples, validation = text_windows(
            c.source, policy, workdir / "tokenizer", workdir / "data", length, seed, resumed=resumed
        )
    except InputError as error:
        if needed:
            raise InputError(
                f"ppo.ptx_coefficient > 0 needs pre-training text: {error} (--config.ptx.source)."
            ) from error
        if c.source:
            raise
        hosts.say(f"no loss on pre-training text will be measured: {error}")
        return None
    return Text(examples, validation, length)


def sequences(c: PtxConfig, episodes: int) -> int:
    """Of pre-training text in a minibatch of so many episodes."""
    return max(1, round(c.per_episode * episodes))


def batch_shape(c: PtxConfig, minibatches: int, episodes: int, microbatch_size: int | None, mesh):
    """(minibatches, micro-batches, rows): room for a minibatch's `sequences` in whole micro-batches of at most
    microbatch_size rows, each a multiple of the devices that rows are cut up over."""
    ways = batch_ways(mesh.shape)
    micro = microbatch_size or episodes
    wanted = sequences(c, episodes)
    micro = min(micro, -(-wanted // ways) * ways)
    return minibatches, -(-wanted // micro), micro
