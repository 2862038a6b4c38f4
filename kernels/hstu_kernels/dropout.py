"""Dropout that can be replayed: which elements are kept is a function of a seed and of their place, on every backend.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): the counter of four neighbouring columns
is ``(column // 4, row, row >> 32, part)``, its four words decide one column each. Nothing is stored for the backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def new_seed(device: torch.device) -> Tensor:
    """``[1]`` int64 from the default generator of ``device``, so that seeds follow ``torch.manual_seed`` and graphs."""
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)


def drop_threshold(p: float) -> int:
    """A 32-bit word below this drops its element."""
    return min(_WORD, round(p * 2**32))


def kept(seed: Tensor, rows: int, columns: int, p: float, part: int = 0) -> Tensor:
    """``[rows, columns]`` bool: the elements that stay, as the kernels decide."""
    device = seed.device
    row = torch.arange(rows, device=device)[:, None]
    group = torch.arange((columns + 3) // 4, device=device)[None, :]
    zero = torch.zeros(rows, group.shape[1], dtype=torch.int64, device=device)
    counter = [zero + group, zero + (row & _WORD), zero + (row >> 32), zero + part]
    keys = [seed & _WORD, (seed >> 32) & _WORD]
    for _ in range(_ROUNDS):
        c0, c1, c2, c3 = counter
        a, b = _MULTIPLIERS
        counter = [_high(b, c2) ^ c1 ^ keys[0], (b * c2) & _WORD, _high(a, c0) ^ c3 ^ keys[1], (a * c0) & _WORD]
        keys = [(key + step) & _WORD for key, step in zip(keys, _KEY_STEPS, strict=True)]
    words = torch.stack(counter, -1).flatten(1)[:, :columns]
    return words >= drop_threshold(p)


def _high(constant: int, word: Tensor) -> Tensor:
    """The upper half of a product of 32-bit words, in int64 that would overflow at once."""
    return ((constant * (word >> 16)) + ((constant * (word & 0xFFFF)) >> 16)) >> 16
