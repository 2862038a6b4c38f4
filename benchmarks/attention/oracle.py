"""The formula in a chosen precision for some rows and keys of a batch: float64 for the truth, low for the budget.

Whole results of the long cases are too many numbers for float64, so rows and keys are drawn: the first and last ones,
those around the history end, and random ones, of the longest, the shortest and a random sequence. For a row the output
and the gradient of q are computed, for a key the gradients of k and v, each over everything it meets; the gradients of
the tables over all pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.attention.batches import Batch, Copy
from hstu_kernels import next_event_timestamps
from hstu_kernels.bias import bucket_boundaries, position_index, time_buckets

RANDOM_ROWS = 24
_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows ``index`` (and keys of the same places) of the sequence that begins at row ``start``."""

    start: int
    length: int
    history: int
    index: Tensor


@dataclass(frozen=True, slots=True)
class _Pairs:
    """``[H, rows, keys]`` weights and gradients of logits; ``[rows, keys]`` entries of the tables, by name."""

    weights: Tensor
    slope: Tensor
    entries: dict[str, Tensor]


def draw(batch: Batch, *, targets_only: bool, seed: int = 0) -> list[Sample]:
    """The same samples for the same batch and seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets, histories = batch.layout.seq_offsets.tolist(), batch.layout.history_lengths.tolist()
    lengths = batch.case.lengths
    order = sorted((b for b, n in enumerate(lengths) if n), key=lambda b: lengths[b])
    drawn = order[int(torch.randint(len(order), (1,), generator=generator))]
    samples = []
    for b in dict.fromkeys((order[-1], order[0], drawn)):
        n, history = lengths[b], histories[b]
        edges = [0, 1, history - 1, history, history + 1, n - 2, n - 1]
        random = torch.randint(n, (RANDOM_ROWS,), generator=generator).tolist()
        index = sorted({i for i in (*edges, *random) if (history if targets_only else 0) <= i < n})
        samples.append(Sample(offsets[b], n, history, torch.tensor(index, device=batch.device)))
    return samples


def expected(batch: Batch, samples: list[Sample], dtype: torch.dtype, *, backward: bool) -> dict[str, Tensor]:
    """``out``, ``dq``, ``dk``, ``dv`` of the samples and the tables' gradients, computed in ``dtype``, as float64."""
    copy = batch.copies[0]
    parts: dict[str, list[Tensor]] = {"out": []}
    if backward:
        parts |= {"dq": [], "dk": [], "dv": []}
    for sample in samples:
        q, k, v, grad = (_own(x, sample, dtype) for x in (copy.q, copy.k, copy.v, copy.grad_out))
        everything = torch.arange(sample.length, device=batch.device)
        met = _pairs(batch, copy, sample, dtype, sample.index, everything)
        parts["out"].append(torch.einsum("hij,jhd->ihd", met.weights, v))
        if backward:
            parts["dq"].append(batch.alpha * torch.einsum("hij,jhd->ihd", met.slope, k))
            met = _pairs(batch, copy, sample, dtype, everything, sample.index)
            parts["dk"].append(batch.alpha * torch.einsum("hij,ihd->jhd", met.slope, q))
            parts["dv"].append(torch.einsum("hij,ihd->jhd", met.weights, grad))
    results = {name: torch.cat(found).double() for name, found in parts.items()}
    if backward and batch.tables:
        results |= _table_gradients(batch, copy, dtype)
    return results


def _own(x: Tensor, sample: Sample, dtype: torch.dtype) -> Tensor:
    return x.detach()[sample.start : sample.start + sample.length].to(dtype)


def _pairs(batch: Batch, copy: Copy, sample: Sample, dtype: torch.dtype, rows: Tensor, cols: Tensor) -> _Pairs:
    q, k, v, grad = (_own(x, sample, dtype) for x in (copy.q, copy.k, copy.v, copy.grad_out))
    logits = batch.alpha * torch.einsum("ihd,jhd->hij", q[rows], k[cols])
    entries = _entries(batch, sample, rows, cols)
    for name, at in entries.items():
        logits = logits + batch.tables[name].detach().to(dtype)[at]
    context = batch.layout.contextual_seq_len
    seen = batch.case.mask.visible(rows[:, None], cols[None, :], sample.history, context)
    weights = torch.where(seen, F.silu(logits) * batch.scale, 0.0)
    slope = torch.einsum("ihd,jhd->hij", grad[rows], v[cols]) * batch.scale
    slope = torch.where(seen, torch.ops.aten.silu_backward(slope, logits), 0.0)
    return _Pairs(weights, slope, entries)


def _entries(batch: Batch, sample: Sample, rows: Tensor, cols: Tensor) -> dict[str, Tensor]:
    bias, entries = batch.bias, {}
    if bias is None:
        return {}
    if bias.pos_table is not None:
        at = rows.clamp(max=sample.history)[:, None], cols.clamp(max=sample.history)[None, :]
        entries["pos_table"] = position_index(*at, bias.pos_table)
    if bias.time_table is not None:
        assert bias.timestamps is not None
        asked = next_event_timestamps(bias.timestamps, batch.layout)[sample.start + rows]
        bounds = bucket_boundaries(bias.num_buckets, rows.device)
        known = bias.timestamps[sample.start + cols]
        entries["time_table"] = time_buckets(asked[:, None], known[None, :], bounds).long()
    return entries


def _table_gradients(batch: Batch, copy: Copy, dtype: torch.dtype) -> dict[str, Tensor]:
    sums = {name: torch.zeros_like(table, dtype=torch.float64) for name, table in batch.tables.items()}
    offsets, histories = batch.layout.seq_offsets.tolist(), batch.layout.history_lengths.tolist()
    for start, length, history in zip(offsets, batch.case.lengths, histories, strict=False):
        everything = torch.arange(length, device=batch.device)
        for first in range(0, length, _CHUNK):
            rows = everything[first : first + _CHUNK]
            met = _pairs(batch, copy, Sample(start, length, history, rows), dtype, rows, everything)
            shared = met.slope.sum(0).double().reshape(-1)
            for name, at in met.entries.items():
                sums[name].index_add_(0, at.reshape(-1), shared)
    return sums
