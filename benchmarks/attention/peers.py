"""Thin adapters to public HSTU kernels, for machines on which they are installed. None of them is a dependency.

Each divides by the bound on the lengths that it is given, which is our ``scale`` of ``1 / max_seq_len``. What an
adapter computes is compared with the formula before it is timed: a release with another meaning is refused.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.attention.batches import Batch
from benchmarks.attention.unavailable import Unavailable

Attend = Callable[..., Tensor]

# Where a configuration of the backward of ``triton_hstu_mha`` that its tuner tries loses the device: the one whose loop
# over rows is unrolled (docs/benchmarks.md).
_ROLLED_ALONE = frozenset({"16x4096x4x128-jagged"})


def triton_hstu(batch: Batch) -> Attend:
    """``triton_hstu_mha`` of Meta's generative-recommenders, tuned anew for each length and batch size."""
    tune_by_length = _imported("generative_recommenders.common", "set_use_runtime_max_seq_len")
    tune_by_length(True)
    run = _imported("generative_recommenders.ops.triton.triton_hstu_attention", "triton_hstu_mha")
    known = inspect.signature(run).parameters
    case, layout = batch.case, batch.layout
    if case.mask.global_prefix_len or case.mask.full_attn_tail_len or case.mask.window_targets:
        raise Unavailable("has no semi-local mask")
    options: dict[str, Any] = {"seq_offsets": layout.seq_offsets, "alpha": batch.alpha, "causal": True}
    options |= {"N": layout.max_seq_len, "max_seq_len": layout.max_seq_len, "num_targets": layout.num_targets}
    # It sorts in every call, which pays for jagged batches alone.
    options |= {"max_attn_len": case.mask.max_attn_len, "contextual_seq_len": 0}
    options["sort_by_length"] = len(set(case.lengths)) > 1
    if "attn_scale" in known:
        options["attn_scale"] = torch.tensor(batch.scale, device=batch.device)
    options = {name: value for name, value in options.items() if name in known}
    tuner = getattr(importlib.import_module(run.__module__), "_hstu_attn_bwd", None)
    if tuner is not None:
        tuner.configs = left(tuner, case.name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = run(q=q, k=k, v=v, **options)
        return out

    return attend


def left(tuner: Any, case: str) -> list[Any]:
    """The configurations that ``tuner`` of a backward may try for ``case``; all of its own are kept beside them."""
    if not hasattr(tuner, "all_configs"):
        tuner.all_configs = list(tuner.configs)
    if case not in _ROLLED_ALONE:
        return list(tuner.all_configs)
    return [config for config in tuner.all_configs if config.kwargs.get("UNROLL", 1) == 1]


def fa3_hstu(batch: Batch) -> Attend:
    """``cuda_hstu_mha`` of Meta's generative-recommenders, built on FlashAttention-3."""
    run = _imported("generative_recommenders.ops.cpp.cuda_hstu_attention", "cuda_hstu_mha")
    if not hasattr(torch.ops.hstu, "hstu_mha"):
        raise Unavailable("its CUDA library is not loaded")
    case, layout = batch.case, batch.layout
    if case.mask.global_prefix_len or case.mask.window_targets:
        raise Unavailable("has no global prefix")
    targets = None if layout.num_targets is None else layout.num_targets.int()
    offsets = layout.seq_offsets.int()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = run(
            max_seq_len=layout.max_seq_len,
            alpha=batch.alpha,
            q=q,
            k=k,
            v=v,
            seq_offsets=offsets,
            causal=True,
            num_targets=targets,
            max_attn_len=case.mask.max_attn_len,
            min_full_attn_seq_len=case.mask.full_attn_tail_len,
            sort_by_length=True,
        )
        return out

    return attend


def cutlass_hstu(batch: Batch) -> Attend:
    """``hstu_attn_varlen_func`` of FBGEMM (package ``hstu``) or of its older form (package ``hstu_attn``)."""
    try:
        run = _imported("hstu", "hstu_attn_varlen_func")
    except Unavailable:
        run = _imported("hstu_attn", "hstu_attn_varlen_func")
    known = inspect.signature(run).parameters
    case, layout = batch.case, batch.layout
    offsets, longest = layout.seq_offsets.int(), layout.max_seq_len
    options: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": longest, "scaling_seqlen": longest}
    options |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seq_offsets_q", "seq_offsets_k"), offsets)
    targets = None if layout.num_targets is None else layout.num_targets.int()
    options |= {"num_contexts": None, "num_targets": targets, "seqused_q": None, "seqused_k": None}
    options |= {"target_group_size": 1, "window_size": (-1, 0), "alpha": batch.alpha}
    if case.mask.max_attn_len:
        if case.num_targets is not None or case.mask.window_targets:
            raise Unavailable("has no window beside targets")
        options["window_size"] = (case.mask.max_attn_len, 0)
        if case.mask.global_prefix_len or case.mask.full_attn_tail_len:
            options["window_size"] = (-1, -1)
            options["func"] = _intervals(batch)
    options = {name: value for name, value in options.items() if name in known}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = run(q, k, v, **options)
        return out

    return attend


def _intervals(batch: Batch) -> Tensor:
    """``[1, 3, L + 256]`` int32: a row sees keys below the first number, and from the second up to the third."""
    case, layout = batch.case, batch.layout
    total, mask = case.total_rows, case.mask
    rows, ends = layout.row_indices(total), layout.history_ends(total)
    near = (rows - mask.max_attn_len).clamp(min=0)
    near = torch.where(rows >= ends - mask.full_attn_tail_len, 0, near)
    prefix = torch.minimum(near, torch.full_like(near, mask.global_prefix_len))
    numbers = torch.zeros(1, 3, total + 256, dtype=torch.int32, device=batch.device)
    numbers[0, :, :total] = torch.stack([prefix, near, rows + 1])
    return numbers


def _imported(module: str, name: str) -> Callable[..., Any]:
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # a public package may fail to import in any way it likes
        raise Unavailable(f"{module}.{name} cannot be imported ({type(error).__name__})") from error
    return found  # type: ignore[no-any-return]
