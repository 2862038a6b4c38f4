"""The list of target tiles for Hopper's kernel, written in the interpreter."""

from __future__ import annotations

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_kernels.attention.triton.target_sums import FIELDS, hstu_target_list_kernel


@pytest.mark.parametrize(
    ("histories", "targets"),
    [
        ((5, 900, 0, 900, 17), (130, 1, 256, 0, 129)),
        ((7,), (1,)),
        (tuple(i * 7 % 100 for i in range(130)), tuple(i % 5 * 60 for i in range(130))),
    ],
    ids=["few", "one", "many"],
)
def test_each_tile_has_one_line_the_longest_histories_first(
    histories: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    kept = JaggedLayout.from_lengths(torch.tensor(histories))
    layout = JaggedLayout.from_lengths(torch.tensor(targets))
    slots = sum(targets) // 128 + len(targets)
    work = torch.full((slots + 1, FIELDS), -1, dtype=torch.int64)
    hstu_target_list_kernel[(len(targets),)](
        work, layout.seq_offsets, kept.seq_offsets, len(targets), TILE=128, num_warps=1
    )
    order = sorted(range(len(targets)), key=lambda i: (-histories[i], i))
    expected = [
        [int(layout.seq_offsets[i]), targets[i], row, int(kept.seq_offsets[i]), histories[i]]
        for i in order
        for row in range(0, targets[i], 128)
    ]
    lines = int(work[0, 0])
    assert lines == len(expected)
    assert work[1 : 1 + lines].tolist() == expected
    assert bool((work[1 + lines :] == -1).all())
