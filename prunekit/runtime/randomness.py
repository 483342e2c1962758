"""Random numbers that depend only on their purpose, never on the process that draws them or the time (law 4).

A draw is keyed by (seed, purpose, step …) and made for the whole global batch; each process takes its samples' part.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def generator(seed: int, *keys: str | int) -> torch.Generator:
    """Return a CPU generator whose stream is a function of `seed` and `keys` alone.

    Args:
        seed: the recipe's seed.
        keys: what the numbers are drawn for, such as a purpose and a step.

    """
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def epoch_indices(size: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Return the dataset indices of global batch `step`, (batch_size,): one permutation after another.

    Each pass over the data is a permutation keyed by (seed, pass); a batch may end one pass and begin the next.

    Args:
        size: samples in the dataset.
        batch_size: samples in a global batch.
        seed: the recipe's seed.
        step: index of the global batch, from 0.

    """
    position, parts, missing = step * batch_size, [], batch_size
    while missing:
        epoch, offset = divmod(position, size)
        part = _permutation(size, seed, epoch)[offset : offset + missing]
        parts.append(part)
        position, missing = position + len(part), missing - len(part)
    return torch.cat(parts)


@lru_cache(maxsize=2)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator(seed, "epoch", epoch))
