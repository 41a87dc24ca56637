"""Our LSTM's states and gradients are torch.nn.LSTM's on the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numerics import assert_close

from gptjax.model import lstm
from gptjax.model.lstm import LSTMConfig

torch = pytest.importorskip("torch", reason="needs torch: pip install -r requirements-peers.txt")

C = LSTMConfig(vocab_size=50, units=24, d_embed=24, context_length=20)
TERMS = 20 * (24 + 24 + 20)  # of 20 steps: the sums over inputs and state, the gates
OURS_IN_TORCHS = (0, 1, 3, 2)  # torch: input, forget, cell, output; ours: input, forget, output, cell


def of_torch(p):
    """torch.nn.LSTM with our weights: [4 U, in], the gates in its order; its second bias is 0."""
    net = torch.nn.LSTM(C.d_embed, C.units, batch_first=True)
    matrix = lambda a: torch.tensor(np.asarray(a)[:, OURS_IN_TORCHS, :].reshape(len(a), -1).T.copy())
    with torch.no_grad():
        net.weight_ih_l0.copy_(matrix(p["x"]["kernel"]))
        net.weight_hh_l0.copy_(matrix(p["h"]["kernel"]))
        net.bias_ih_l0.copy_(torch.tensor(np.asarray(p["x"]["bias"])[list(OURS_IN_TORCHS)].reshape(-1)))
        net.bias_hh_l0.zero_()
    return net


def test_states_and_gradients():
    params = lstm.init(C, jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    tokens = np.random.default_rng(0).integers(0, 50, (3, 20)).astype(np.int32)

    def loss(p):
        h_BTU, c_BTU = lstm.states(p, C, tokens)
        return (h_BTU**2).sum() + (c_BTU[:, -1] ** 2).sum(), (h_BTU, c_BTU)

    (value, (h, c)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    net, x = of_torch(params["cell"]), torch.tensor(np.asarray(params["wte"])[tokens], requires_grad=True)
    out, (_, cell) = net(x)
    total = (out**2).sum() + (cell**2).sum()
    total.backward()
    back = lambda a: np.asarray(a.T.reshape(-1, 4, C.units))[:, OURS_IN_TORCHS, :]
    assert_close((h, c[:, -1]), (out.detach().numpy(), cell[0].detach().numpy()), terms=TERMS)
    assert_close(value, np.float32(total.item()), terms=TERMS + 3 * 20 * 24)
    wte = np.zeros_like(params["wte"])
    np.add.at(wte, tokens, x.grad.numpy())
    expected = {
        "wte": wte,
        "cell": {
            "x": {"kernel": back(net.weight_ih_l0.grad),
                  "bias": net.bias_ih_l0.grad.numpy().reshape(4, -1)[list(OURS_IN_TORCHS)]},
            "h": {"kernel": back(net.weight_hh_l0.grad)},
        },
    }  # fmt: skip
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    assert_close(grads, expected, terms=2 * TERMS + 3 * 20, scale=largest)
