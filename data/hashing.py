"""Stateless random numbers: every draw is a hash of its purpose (seed, sample, epoch, number of the draw).

    uniform(hash_words(seed, key, epoch, 7))    # the 7th number of this sample in this epoch, in [0, 1)

Why not a Generator: a draw must not depend on the draws before it (resume, world size, batch composition),
nor on a library's version. splitmix64 (Steele, Lea, Flood 2014) passes the usual test batteries and is five lines.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import ArrayLike, NDArray

Words = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def hash_words(*words: ArrayLike) -> Words:
    """Return a 64-bit hash for each element of the broadcast words; the order of the words matters."""
    state = np.zeros((1,) * max(np.ndim(word) for word in words) or (1,), np.uint64)
    for word in words:
        state = _mix((state ^ np.asarray(word).astype(np.uint64)) + _GOLDEN)
    return state


def uniform(words: Words) -> NDArray[np.float64]:
    """Map hashes to numbers in [0, 1), by their upper 53 bits."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def hash_text(text: str) -> int:
    """Hash a text to 64 bits (BLAKE2b): the same on every machine, unlike `hash`."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def permutation(length: int, *words: ArrayLike) -> NDArray[np.int64]:
    """Return a permutation of range(length), a pure function of the words."""
    return np.argsort(hash_words(*words, np.arange(length)), kind="stable")


def _mix(state: Words) -> Words:
    """Apply splitmix64's finaliser."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
