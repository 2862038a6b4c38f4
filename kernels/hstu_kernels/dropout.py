"""Dropout that can be replayed: which elements are kept is a function of a seed and of their place, on every backend.

`kept` replays; `dropout` is for paths that let autograd keep its mask.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3"): the counter of four neighbouring columns
is ``(column // 4, row, row >> 32, part)``, its four words decide one column each. Nothing is stored for the backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LANE_VALUES = 1 << 16


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """`torch.nn.functional.dropout`, several times faster on a CPU; ``x`` of any shape and floating dtype.

    PyTorch draws one random number per element on a CPU, in one thread. Here one draw of 64 bits decides four elements,
    so ``p`` is rounded to a multiple of 2**-16; what stays is scaled by the rounded probability.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"p: expected a probability in [0, 1], got {p}")
    if not training or p in (0, 1) or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    dropped = min(round(p * _LANE_VALUES), _LANE_VALUES - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
    lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
    scale = (lanes >= dropped - _LANE_VALUES // 2).to(x.dtype).mul_(_LANE_VALUES / (_LANE_VALUES - dropped))
    return x * scale


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
