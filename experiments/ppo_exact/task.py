"""A token MDP small enough to enumerate, where PPO's optimum is known in closed form.

Vocabulary of 5 with end-of-sequence among them, at most 4 tokens: 341 responses to each of 3 prompts. The optimum of
E[r] - beta KL(pi || ref) is pi*(y|x) = ref(y|x) exp(r(x, y)/beta) / Z(x), and its value is beta E_x[log Z(x)].
Everything PPO does here, it does through gptjax.rlhf; only the enumeration is this file's own.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model import gpt, heads
from gptjax.model.spec import GPTConfig
from gptjax.rlhf import networks, rollout
from gptjax.rlhf.config import RolloutConfig, UpdateConfig
from gptjax.rlhf.networks import RLSpec
from gptjax.rlhf.state import new_state, phase_keys
from gptjax.rlhf.update import make_update
from gptjax.training.optimizer import OptimizerConfig, make_optimizer

VOCAB, LENGTH = 5, 4  # ids 0..4 are sampled; EOS is the last, PAD lies beyond them
EOS, PAD = VOCAB - 1, VOCAB
PROMPTS = np.array([[0, 1, 2], [3, 2, 1], [2, 2, 0]], np.int32)
MODEL = GPTConfig(vocab_size=VOCAB + 1, n_layer=2, n_head=4, d_model=48, context_length=8, attention="reference")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    beta: float = 0.3
    iterations: int = 200
    batch: int = 512
    learning_rate: float = 1e-3
    temperature: float = 1.0
    gamma: float = 1.0
    lam: float = 0.95
    ppo: UpdateConfig = UpdateConfig(epochs=4, minibatches=4)


def responses() -> tuple[np.ndarray, np.ndarray]:
    """All of them: tokens int32 [341, 4], padded with PAD, and mask float32 [341, 4]."""
    words = [EOS_ended for n in range(LENGTH) for body in itertools.product(range(EOS), repeat=n)
             for EOS_ended in [(*body, EOS)]]  # fmt: skip
    words += list(itertools.product(range(EOS), repeat=LENGTH))
    tokens = np.array([[*w, *[PAD] * (LENGTH - len(w))] for w in words], np.int32)
    mask = np.array([[1.0] * len(w) + [0.0] * (LENGTH - len(w)) for w in words], np.float32)
    return tokens, mask


def reward_table(seed: int) -> np.ndarray:
    """r(x, y) float32 [3, 341]: a value for each token at each place, and a term that is no sum over tokens."""
    rng = np.random.default_rng(seed)
    place = rng.normal(0, 0.6, (len(PROMPTS), LENGTH, VOCAB))
    tokens, mask = responses()
    weights = rng.integers(1, 50, LENGTH)
    inside = np.where(mask > 0, tokens, 0)
    additive = np.stack([(p[np.arange(LENGTH), inside] * mask).sum(1) for p in place])
    return (additive + 0.5 * np.sin(inside @ weights)[None]).astype(np.float32)


class Task:
    """The MDP of one seed: reference policy, rewards, and the exact figures of any policy."""

    def __init__(self, seed: int, c: TaskConfig = TaskConfig()):
        self.c, self.seed = c, seed
        self.spec = RLSpec(
            policy=MODEL, value=MODEL, reward=None, response=LENGTH, eos_id=EOS, pad_id=PAD, vocab=VOCAB,
            temperature=c.temperature,
        )  # fmt: skip
        self.reference = jax.jit(lambda key: _sharpened(gpt.init(MODEL, key)))(jax.random.key(1000 + seed))
        self.rewards = jnp.asarray(reward_table(seed))
        tokens, mask = responses()
        self.n_responses = len(tokens)
        self.tokens = np.concatenate(
            [np.repeat(PROMPTS, self.n_responses, 0), np.tile(tokens, (len(PROMPTS), 1))], axis=1
        )
        self.mask = np.tile(mask, (len(PROMPTS), 1))
        # a response as a number, to look its reward up
        self._digits = (VOCAB + 1) ** np.arange(LENGTH)
        codes = tokens @ self._digits
        lookup = np.zeros(codes.max() + 1, np.int32)
        lookup[codes] = np.arange(self.n_responses)
        self._lookup = jnp.asarray(lookup)

        log_ref = self.log_probs(self.reference)
        log_optimum = log_ref + self.rewards / c.beta
        log_z = jax.nn.logsumexp(log_optimum, axis=1, keepdims=True)
        self.log_ref, self.log_optimum = log_ref, log_optimum - log_z
        self.j_ref = float(self.objective(log_ref))
        self.j_optimum = float(c.beta * log_z.mean())

    def log_probs(self, policy):
        """log pi(y|x) of every response: float32 [3, 341]."""
        lengths = np.full(len(self.tokens), PROMPTS.shape[1])
        return enumerated(policy, self.tokens, lengths, self.mask, self.spec).reshape(len(PROMPTS), -1)

    def objective(self, log_pi):
        """J = E[r] - beta KL(pi || ref), the mean over prompts."""
        p = jnp.exp(log_pi)
        return (p * (self.rewards - self.c.beta * (log_pi - self.log_ref))).sum(1).mean()

    def figures(self, policy) -> dict:
        """gap: share of J* - J_ref that the policy has closed. kl_to_optimum: KL(pi || pi*) in nats."""
        log_pi = self.log_probs(policy)
        p = jnp.exp(log_pi)
        return {
            "gap": float((self.objective(log_pi) - self.j_ref) / (self.j_optimum - self.j_ref)),
            "kl_to_optimum": float((p * (log_pi - self.log_optimum)).sum(1).mean()),
            "kl_to_reference": float((p * (log_pi - self.log_ref)).sum(1).mean()),
        }

    def score(self, tokens, prompt):
        """The true reward of sampled responses: float32 [B]. prompt: int [B], which of PROMPTS."""
        return self.rewards[prompt, self._lookup[tokens[:, -LENGTH:] @ self._digits]]

    def train(self, ptx=None, record=lambda *_: None):
        """PPO for c.iterations. ptx: (state) -> pre-training sequences for the update, or None. record is called
        with (iteration, metrics of finish and update). Returns the final PPOState."""
        c, spec = self.c, self.spec
        settings = RolloutConfig(missing_eos=None, gamma=c.gamma, lam=c.lam)
        tx = make_optimizer(OptimizerConfig(weight_decay=0.0, clip_norm=1.0, b2=0.95))
        value = heads.scalar_model(self.reference, MODEL, None)
        state = new_state(self.reference, value, tx, tx, c.beta, self.seed)
        update = jax.jit(make_update(c.ppo, spec, tx, tx, 1.0, 1.0), donate_argnums=0)
        lengths = np.full(c.batch, PROMPTS.shape[1], np.int32)
        for i in range(c.iterations):
            prompt = (int(state.prompt_position) + np.arange(c.batch)) % len(PROMPTS)
            models = rollout.Models(state.policy, state.value, lambda: (self.reference, None))
            experience, metrics, _ = rollout.collect(
                models, PROMPTS[prompt], lengths, phase_keys(state)[1], state.kl_coefficient, spec, settings,
                rule=lambda tokens, lengths, mask, prompt=prompt: self.score(tokens, prompt),
            )  # fmt: skip
            rate = np.float32(c.learning_rate * (1 - i / c.iterations))
            state, more = update(state, experience, ptx(state) if ptx else None, (rate, rate))
            record(i, metrics | more)
        return state


@functools.partial(jax.jit, static_argnames="spec")
def enumerated(policy, tokens, lengths, mask, spec):
    real = networks.real_tokens(lengths, mask, tokens.shape[1] - spec.response)
    states = networks.policy_states(policy, tokens, real, mask, spec)
    return (networks.log_probs(policy, states, tokens, spec) * mask).sum(1)


def _sharpened(params):
    """Random initial weights are nearly uniform over tokens; a reference worth departing from is not."""
    return {**params, "wte": params["wte"] * 1.5}
