"""Hashes that stand for random draws: pure functions of a seed, so that nothing has to be stored to draw again."""

import hashlib

import numpy as np


def mix64(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014): uint64 -> uint64, a bijection in which every bit of the
    result depends on every bit of x."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw(seed: int, text: str) -> int:
    """A number in [0, 2^64) that depends only on seed and text."""
    digest = hashlib.sha256(f"{seed}:{text}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big")
