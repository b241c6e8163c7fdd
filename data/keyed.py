"""Randomness keyed by (seed, purpose, index): the same key gives the same numbers on any rank, worker or restart.

Philox is a counter-based generator (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a 128-bit key
names a stream of numbers, a 256-bit counter a position in it.
"""

import hashlib

import numpy as np
from numpy.typing import NDArray


def philox_key(seed: int, purpose: str, *index: int) -> NDArray[np.uint64]:
    """The 128-bit Philox key, (2,) uint64, of one purpose of one run."""
    text = "/".join([str(seed), purpose, *map(str, index)])
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint64).copy()


def keyed_generator(seed: int, purpose: str, *index: int) -> np.random.Generator:
    """A fresh generator for one key."""
    return np.random.Generator(np.random.Philox(key=philox_key(seed, purpose, *index)))


def torch_seed(seed: int, purpose: str, *index: int) -> int:
    """A 63-bit seed for a torch.Generator."""
    return int(philox_key(seed, purpose, *index)[0] >> np.uint64(1))
