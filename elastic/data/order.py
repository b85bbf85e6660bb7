"""Which samples make up a step: a pure function of (seed, step), whatever the number of ranks.

The order of an epoch is a bijection of [0, num_samples), computed point by point, so the whole state of the sampler is
the step. Changing anything here reorders the data of every run in flight; a test holds golden values.

The bijection is a generalised Feistel cipher on a grid of `side * side >= num_samples` points, walked until it lands
inside (J. Black, P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Its round function is the finaliser
of SplitMix64 (variant 13 of D. Stafford, "Better Bit Mixing", 2011). All arithmetic is on unsigned 64-bit integers,
which wrap around alike on every platform and in every version of numpy.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt

_Words = npt.NDArray[np.uint64]

_NUM_ROUNDS = 6  # J. Patarin, "Security of Random Feistel Schemes with 5 or More Rounds", CRYPTO 2004
_GOLDEN = np.array([0x9E3779B97F4A7C15], np.uint64)  # odd, 2**64 over the golden ratio: SplitMix64's increment


def sample_ids(*, seed: int, step: int, global_batch: int, num_samples: int) -> npt.NDArray[np.int64]:
    """Return the ids of the samples of one step, over all ranks.

    Sample j of the step has the global index g = step * global_batch + j; it belongs to epoch g // num_samples, and its
    id is the image of g % num_samples under that epoch's permutation. A step may span several epochs.
    """
    return ids_between(step * global_batch, (step + 1) * global_batch, seed=seed, num_samples=num_samples)


def ids_between(start: int, end: int, *, seed: int, num_samples: int) -> npt.NDArray[np.int64]:
    """Return the ids of the samples with the global indices from `start` up to `end`."""
    if start == end:
        return np.empty(0, np.int64)
    index = np.arange(start, end, dtype=np.uint64)
    epoch, position = np.divmod(index, np.uint64(num_samples))
    return _permute(position, seed=seed, epoch=epoch, num_samples=num_samples).astype(np.int64)


def derive_seed(seed: int, name: str) -> int:
    """Return a seed of its own for what has this name: a source of a mixture, or how its samples mix within a step."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


def rank_slice(ids: npt.NDArray[np.int64], *, rank: int, world_size: int) -> npt.NDArray[np.int64]:
    """Return the ids of one rank: a contiguous part, and the parts of all ranks are the whole, for any world size.

    No part is longer than ceil(len(ids) / world_size).
    """
    return ids[rank * len(ids) // world_size : (rank + 1) * len(ids) // world_size]


def _permute(position: _Words, *, seed: int, epoch: _Words, num_samples: int) -> _Words:
    side = np.uint64(math.isqrt(num_samples - 1) + 1)
    if epoch[0] == epoch[-1]:
        epoch = epoch[:1]  # one key, broadcast: twice as fast
    key = _mix(_mix(np.array([seed % 2**64], np.uint64)) + epoch)
    ids = _feistel(position, key, side)
    outside = ids >= num_samples
    while outside.any():  # every walk ends: its cycle leads back to the position, which is inside
        ids[outside] = _feistel(ids[outside], np.broadcast_to(key, ids.shape)[outside], side)
        outside = ids >= num_samples
    return ids


def _feistel(x: _Words, key: _Words, side: np.uint64) -> _Words:
    left, right = np.divmod(x, side)
    for _ in range(_NUM_ROUNDS):
        key = key + _GOLDEN
        left, right = right, (left + _mix(right + _mix(key)) % side) % side
    return left * side + right


def _mix(x: _Words) -> _Words:
    x = (x ^ (x >> np.uint64(30))) * np.array([0xBF58476D1CE4E5B9], np.uint64)
    x = (x ^ (x >> np.uint64(27))) * np.array([0x94D049BB133111EB], np.uint64)
    return x ^ (x >> np.uint64(31))
