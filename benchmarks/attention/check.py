"""Correctness before speed: a contender's results on the very inputs that are timed, against float64.

The rule is that of `hstu_kernels.testing`: at most twice as far from float64 as plain PyTorch in the same precision.
Public kernels need only compute the same function: each result within a few percent; their error stands in the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.attention.batches import Batch
from benchmarks.attention.contenders import Bound, Result
from benchmarks.attention.oracle import Sample, draw, expected
from hstu_kernels.testing import poisoned_empty


class Red(Exception):
    """A contender is wrong; its speed means nothing."""


def check(bound: Bound, batch: Batch, *, seed: int = 0) -> float:
    """Raise `Red` unless ``bound`` follows the formula; returns its largest relative error in the Frobenius norm.

    Results of another function (softmax) are only looked at for being finite; their error is NaN.

    Raises:
        Red: naming the result that is off, its error and the budget.
    """
    where = f"{bound.name}, {batch.case.name}"
    results = _results(bound)
    for name, result in results.items():
        if not bool(torch.isfinite(result).all()):
            raise Red(f"{where}: {name} is not finite everywhere")
    if bound.result is Result.OTHER:
        return float("nan")
    samples = draw(batch, targets_only=bound.result is Result.TARGETS, seed=seed)
    backward = bool(bound.grads)
    dtype = batch.copies[0].q.dtype
    truth = expected(batch, samples, torch.float64, backward=backward)
    rounded = expected(batch, samples, dtype, backward=backward)
    largest = 0.0
    for name, wanted in truth.items():
        got = results[name] if name in batch.tables else _rows(results[name], bound, batch, samples)
        difference = got.double() - wanted
        relative = float(difference.norm() / wanted.norm())
        largest = max(largest, relative)
        if bound.tolerance is not None:
            if not relative <= bound.tolerance:
                raise Red(f"{where}: {name} is off by {relative:.3g} of its norm, allowed {bound.tolerance:.3g}")
            continue
        top, off = float(wanted.abs().max()), float(difference.abs().max())
        budget = 2 * float((rounded[name] - wanted).abs().max()) + torch.finfo(dtype).eps * top
        # Written so that NaN fails.
        if not off <= budget:
            raise Red(f"{where}: {name} is off by {off:.3g}, allowed {budget:.3g} with a largest number of {top:.3g}")
    return largest


def _results(bound: Bound) -> dict[str, Tensor]:
    if not bound.ours:
        return _run(bound)
    with poisoned_empty():
        return _run(bound)


def _run(bound: Bound) -> dict[str, Tensor]:
    leaves = bound.inputs[0]
    out = bound.forward(*leaves)
    results = {"out": out.detach()}
    if bound.grads:
        results |= zip(bound.leaf_names, torch.autograd.grad(out, leaves, bound.grads[0]), strict=True)
    return results


def _rows(result: Tensor, bound: Bound, batch: Batch, samples: list[Sample]) -> Tensor:
    """The sampled rows of a result, wherever the contender keeps them."""
    layout, total = batch.layout, batch.case.total_rows
    rows = torch.cat([sample.start + sample.index for sample in samples])
    if bound.result is Result.PADDED:
        return result.transpose(1, 2)[layout.sequence_ids(total)[rows], layout.row_indices(total)[rows]]
    if bound.result is Result.TARGETS:
        target = layout.row_indices(total) >= layout.history_ends(total)
        rows = (target.cumsum(0) - 1)[rows]
    return result[rows]
