"""The optimizer's moments in host memory: those of each layer are moved to the device for its update and back.

If a step moved them all together, they would all be in device memory at once. In a loop over the stacked layers XLA
slices them out of host memory and writes them back, so that only one layer's are on the device at a time; those of the
embeddings, which belong to no layer, are moved together. The arithmetic is unchanged: the update of an element depends
only on that element and on scalars.
"""

import jax
import optax
from jax import lax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
MEMORY = "pinned_host"


class Offloaded(optax.GradientTransformation):
    """An optimizer with moments in host memory: state_shardings puts them there, the train step fetches them."""


def moments(tx, opt_state):
    """Tree of bool: which leaves of opt_state are moments, shaped like parameters."""
    return optax.tree.map_params(tx, lambda _: True, opt_state, transform_non_params=lambda _: False)


def _part(tree, like_params, layers: bool):
    """The leaves of the stacked layers (`layers`) or all others, and scalars in both cases; the rest is None."""

    def keep(path, x, of_params):
        stacked = any(getattr(key, "key", None) == "blocks" for key in path)
        return x if not of_params or stacked == layers else None

    return jax.tree_util.tree_map_with_path(keep, tree, like_params)


def update_per_layer(tx, optimize, params, opt_state, grads):
    """Applies optimize(params, opt_state, grads) -> (params, opt_state) layer by layer, and to the rest at once.

    opt_state: with its moments in host memory, as in the result.
    """
    opt_state, grads = lax.optimization_barrier((opt_state, grads))  # nothing is fetched while activations are live
    of_params, is_moment = jax.tree.map(lambda _: True, params), moments(tx, opt_state)
    part = lambda layers: (
        _part(params, of_params, layers), _part(opt_state, is_moment, layers), _part(grads, of_params, layers)
    )  # fmt: skip
    move = lambda tree, where: jax.tree.map(
        lambda x, m: jax.device_put(x, where) if m else x, tree, _like(tree, is_moment)
    )
    p, o, g = part(False)
    rest_params, rest_opt = optimize(p, move(o, DEVICE), g)
    rest_opt = move(rest_opt, HOST)

    p, o, g = part(True)
    if not jax.tree.leaves(p):  # an LSTM: no stacked layers
        return rest_params, rest_opt
    is_layers = _like(o, is_moment)

    def layer(i, carry):
        p, o = carry
        at = lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False)
        put = lambda x, new: lax.dynamic_update_index_in_dim(x, new, i, 0)
        mine = jax.tree.map(lambda x, m: jax.device_put(at(x), DEVICE) if m else x, o, is_layers)
        new_p, new_o = optimize(jax.tree.map(at, p), mine, jax.tree.map(at, g))
        o = jax.tree.map(lambda x, new, m: put(x, jax.device_put(new, HOST)) if m else x, o, new_o, is_layers)
        return jax.tree.map(put, p, new_p), o

    p, o = lax.fori_loop(0, jax.tree.leaves(p)[0].shape[0], layer, (p, o))
    join = lambda rest, layers: jax.tree.map(
        lambda a, b: b if a is None else a, rest, layers, is_leaf=lambda x: x is None
    )
    return join(rest_params, p), join(rest_opt, o)


def _like(part, tree):
    """The leaves of `tree` where `part` is not None."""
    return jax.tree.map(lambda x, y: None if x is None else y, part, tree, is_leaf=lambda x: x is None)
