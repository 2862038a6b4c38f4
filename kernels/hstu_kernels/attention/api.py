"""Validate, resolve, call."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from hstu_kernels.attention.eager import EagerPlan, eager_attention, eager_target_attention, plan_eager
from hstu_kernels.attention.ops import operator_attention
from hstu_kernels.attention.reference import reference_attention, reference_target_attention
from hstu_kernels.attention.triton import TritonPlan, plan_triton
from hstu_kernels.backend import Backend, UnsupportedBackend
from hstu_kernels.bias import RelativeBias
from hstu_kernels.dispatch import choose_backend
from hstu_kernels.gradients import needs_gradient
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What a backend prepares once for a batch and reuses in every layer. Opaque; made by `plan_attention`."""

    backend: Backend
    layout: JaggedLayout
    mask: AttentionMask
    total_rows: int
    bias_shape: tuple[Tensor | None, Tensor | None, int, int]
    state: EagerPlan | TritonPlan | None


def plan_attention(
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    bias: RelativeBias | None = None,
    total_rows: int,
    dtype: torch.dtype | None = None,
    widths: tuple[int | None, int | None] = (None, None),
    backend: Backend | str = Backend.AUTO,
) -> AttentionPlan:
    """Validate the batch and prepare it for any number of `hstu_attention` calls.

    Args:
        layout, mask: geometry and structure shared by the calls.
        bias: any bias with the timestamps and the table sizes that the calls will use; its weights are not read.
        total_rows: ``L`` of the tensors to come.
        dtype, widths: of q and of the heads, ``Dqk`` and ``Dv``; ``backend="auto"`` takes no kernels where it does not
            know the dtype.
        backend: as in `hstu_attention`.

    Under ``torch.compile`` and ``torch.export`` nothing is validated or prepared; see `hstu_attention`.

    Raises:
        ValueError: the layout is inconsistent or does not cover ``total_rows`` rows.
        UnsupportedBackend: the backend cannot serve the call.
    """
    resolved = choose_backend(backend, layout.device, dtype, widths)
    if torch.compiler.is_compiling():
        return AttentionPlan(resolved, layout, mask, total_rows, _bias_shape(bias), None)
    return _plan("total_rows", layout, mask, bias, total_rows, resolved)


def _plan(
    name: str,
    layout: JaggedLayout,
    mask: AttentionMask,
    bias: RelativeBias | None,
    total_rows: int,
    resolved: Backend,
) -> AttentionPlan:
    layout.check_rows(name, total_rows)
    if bias is not None:
        for name, times in (("timestamps", bias.timestamps), ("row_timestamps", bias.row_timestamps)):
            if times is not None and times.numel() != total_rows:
                raise ValueError(f"bias.{name}: expected one entry for each of {total_rows} rows, got {times.numel()}")
    state: EagerPlan | TritonPlan | None = None
    if resolved is Backend.EAGER:
        state = plan_eager(layout, mask, bias)
    elif resolved is Backend.TRITON:
        state = plan_triton(layout, mask, bias, total_rows)
    return AttentionPlan(resolved, layout, mask, total_rows, _bias_shape(bias), state)


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None = None,
    backend: Backend | str = Backend.AUTO,
    plan: AttentionPlan | None = None,
) -> Tensor:
    """Jagged HSTU attention, ``out_i = sum_j SiLU(alpha * (q_i . k_j) + rab_ij) * scale * v_j`` over visible ``j``.

    Args:
        q, k: ``[L, H, Dqk]`` float. v: ``[L, H, Dv]``, same dtype and device.
        layout: where the sequences lie in ``L``; ``max_seq_len`` bounds the launch and never enters a number.
        mask: which keys each row sees.
        alpha: multiplies the dot product only. scale: multiplies after SiLU.
        bias: relative attention bias, shared by the heads; differentiable in both tables.
        backend: an explicit one, which is never replaced silently, or ``auto``: that of the plan, or without one what
            `resolve_backend` says.
        plan: from `plan_attention` for the same layout, mask and timestamps; saves repeating the preparation.

    Returns:
        ``[L, H, Dv]`` in the dtype of ``v``; under autocast in autocast's, as other attention of PyTorch.

    Under ``torch.compile`` and ``torch.export`` the call becomes an operator (`hstu_kernels.attention.ops`): numbers
    inside the layout are then not checked, and a ``plan`` is not used, since the operator prepares what it needs.
    Under `torch.use_deterministic_algorithms` the gradient of the position table repeats its bits on every run with
    Triton, too; everything else does always.

    Raises:
        TypeError, ValueError: inputs do not fit together; the message names the argument.
        UnsupportedBackend: an explicit backend cannot serve the call.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v)
    resolved = _planned(backend, plan, q, q.dtype, (q.shape[2], v.shape[2]))
    if torch.compiler.is_compiling():
        if bias is not None:
            _check_bias(bias, q)
        return operator_attention(q, k, v, layout, mask, alpha=alpha, scale=scale, bias=bias, backend=resolved)
    plan = _fitting(plan, layout, mask, bias, q, resolved)
    if isinstance(plan.state, TritonPlan):
        return _triton().triton_attention(q, k, v, plan.state, alpha=alpha, scale=scale, bias=bias)  # type: ignore[no-any-return]
    if plan.state is not None:
        return eager_attention(q, k, v, plan.state, alpha=alpha, scale=scale, bias=bias)
    return reference_attention(q, k, v, layout, mask, alpha=alpha, scale=scale, bias=bias)


def prepare(
    layout: JaggedLayout,
    mask: AttentionMask,
    bias: RelativeBias | None,
    plan: AttentionPlan | None,
    *,
    backend: Backend | str,
    like: Tensor,
    dtype: torch.dtype,
    widths: tuple[int, int],
) -> AttentionPlan:
    """The checks of `hstu_attention` ahead of its q, k and v, and its plan.

    Args:
        like: ``[L, ...]`` on the device of q. dtype: of q, k and v. widths: ``Dqk`` and ``Dv``.
    """
    return _fitting(plan, layout, mask, bias, like, _planned(backend, plan, like, dtype, widths))


def _planned(
    backend: Backend | str, plan: AttentionPlan | None, like: Tensor, dtype: torch.dtype, widths: tuple[int, int]
) -> Backend:
    if plan is not None and backend == Backend.AUTO:
        backend = plan.backend
    return choose_backend(backend, like.device, dtype, widths)


def _fitting(
    plan: AttentionPlan | None,
    layout: JaggedLayout,
    mask: AttentionMask,
    bias: RelativeBias | None,
    q: Tensor,
    resolved: Backend,
) -> AttentionPlan:
    if plan is None:
        plan = _plan("q", layout, mask, bias, q.shape[0], resolved)
    else:
        _check_plan(plan, layout, mask, bias, q.shape[0], resolved)
    if bias is not None:
        _check_bias(bias, q)
    if isinstance(plan.state, TritonPlan) and layout.device != q.device:
        raise TypeError(f"layout: expected tensors on {q.device} as q, got {layout.device}")
    return plan


def hstu_target_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cache: LayerKV,
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None = None,
    backend: Backend | str = Backend.AUTO,
) -> Tensor:
    """Attention of targets to cached histories and to themselves (M-FALCON, HSTU section 3.4).

    Equals the target rows of `hstu_attention` over ``[contextual | history | targets]``.

    Args:
        q, k: ``[T, H, Dqk]``. v: ``[T, H, Dv]``: rows of the targets only.
        cache: keys and values of the histories, one sequence for each of ``layout``.
        layout: where each user's targets lie in ``T``; without ``num_targets``.
        bias: ``timestamps [cache rows]`` and ``row_timestamps [T]`` (request times) when it has a time table.
        mask, alpha, scale, backend: as in `hstu_attention`.

    Returns:
        ``[T, H, Dv]``.

    Raises:
        TypeError, ValueError, UnsupportedBackend: as `hstu_attention`.
    """
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v)
    resolved = choose_backend(backend, q.device, q.dtype, (q.shape[2], v.shape[2]))
    if resolved is Backend.TRITON and backend == Backend.AUTO and needs_gradient(q, k, v, cache.k, cache.v):
        resolved = Backend.EAGER
    layout.check_rows("q", q.shape[0])
    cache.layout.check_rows("cache.k", cache.k.shape[0])
    if cache.v.shape[0] != cache.k.shape[0]:
        raise ValueError(f"cache.v: expected {cache.k.shape[0]} rows as cache.k, got {cache.v.shape[0]}")
    for name, cached in (("cache.k", cache.k), ("cache.v", cache.v)):
        if cached.dtype != q.dtype or cached.device != q.device:
            raise TypeError(f"{name}: expected {q.dtype} on {q.device} as q, got {cached.dtype} on {cached.device}")
    if cache.layout.batch_size != layout.batch_size:
        raise ValueError(f"cache: expected {layout.batch_size} sequences as layout, got {cache.layout.batch_size}")
    if layout.num_targets is not None or cache.layout.num_targets is not None:
        raise ValueError("layout: expected target rows only, so num_targets must be None in layout and cache.layout")
    if cache.k.shape[1:] != k.shape[1:] or cache.v.shape[1:] != v.shape[1:]:
        raise ValueError(
            f"cache: expected heads and widths {tuple(k.shape[1:])} and {tuple(v.shape[1:])}, "
            f"got {tuple(cache.k.shape[1:])} and {tuple(cache.v.shape[1:])}"
        )
    if bias is not None:
        _check_bias(bias, q)
    if bias is not None and bias.time_table is not None:
        if bias.row_timestamps is None or bias.row_timestamps.numel() != q.shape[0]:
            raise ValueError(f"bias.row_timestamps: expected the request time of each of {q.shape[0]} targets")
        if bias.timestamps is None or bias.timestamps.numel() != cache.k.shape[0]:
            raise ValueError(f"bias.timestamps: expected one entry for each of {cache.k.shape[0]} cached rows")
    if resolved is Backend.TRITON:
        if needs_gradient(q, k, v, cache.k, cache.v):
            raise UnsupportedBackend(
                "backend: triton's cached target attention has no gradient; score under torch.no_grad() or "
                "torch.inference_mode(), or use backend='eager'"
            )
        from hstu_kernels.attention.triton.target_launch import triton_target_attention

        return triton_target_attention(q, k, v, cache, layout, mask, alpha=alpha, scale=scale, bias=bias)
    call = eager_target_attention if resolved is Backend.EAGER else reference_target_attention
    return call(q, k, v, cache, layout, mask, alpha=alpha, scale=scale, bias=bias)


@functools.cache
def _triton() -> ModuleType:
    """The module of the launches, not imported before so that everything else runs where Triton is not installed."""
    return importlib.import_module("hstu_kernels.attention.triton.launch")


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's precision where it is on; float64 stays, as it does in PyTorch's own operators."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)


def _bias_shape(bias: RelativeBias | None) -> tuple[Tensor | None, Tensor | None, int, int]:
    """What a plan depends on: key times, row times, and entries of the two tables."""
    if bias is None:
        return None, None, 0, 0
    timed = bias.time_table is not None
    return (
        bias.timestamps if timed else None,
        bias.row_timestamps if timed else None,
        0 if bias.time_table is None else bias.time_table.numel(),
        0 if bias.pos_table is None else bias.pos_table.numel(),
    )


def _check_plan(
    plan: AttentionPlan,
    layout: JaggedLayout,
    mask: AttentionMask,
    bias: RelativeBias | None,
    total_rows: int,
    resolved: Backend,
) -> None:
    if plan.backend is not resolved:
        raise ValueError(f"plan: expected one made for backend {resolved}, got {plan.backend}")
    if plan.layout is not layout or (plan.mask is not mask and plan.mask != mask):
        raise ValueError("plan: made for another layout or mask; call plan_attention() for this batch")
    if plan.total_rows != total_rows:
        raise ValueError(f"plan: made for {plan.total_rows} rows, got {total_rows} rows in q")
    made, now = plan.bias_shape, _bias_shape(bias)
    # Times are compared by identity: the same tensors, not equal numbers.
    if made[0] is not now[0] or made[1] is not now[1] or made[2:] != now[2:]:
        raise ValueError("plan: made for other timestamps or tables of other sizes; plan with the same bias")


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    shape, dtype, device = q.shape, q.dtype, q.device
    # In one go what nearly every call passes; `_refuse_qkv` finds out what is wrong.
    if (
        len(shape) != 3
        or k.shape != shape
        or v.dim() != 3
        or v.shape[:2] != shape[:2]
        or not (k.dtype == v.dtype == dtype)
        or not (k.device == v.device == device)
        or not q.is_floating_point()
    ):
        _refuse_qkv(q, k, v)


def _refuse_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name}: expected [L, H, D], got shape {tuple(tensor.shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(f"{name}: expected {q.dtype} on {q.device} as q, got {tensor.dtype} on {tensor.device}")
    if q.shape != k.shape:
        raise ValueError(f"k: expected the shape of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if q.shape[:2] != v.shape[:2]:
        raise ValueError(f"v: expected {q.shape[0]} rows and {q.shape[1]} heads as q, got {tuple(v.shape)}")


def _check_bias(bias: RelativeBias, q: Tensor) -> None:
    for name, tensor in (
        ("pos_table", bias.pos_table),
        ("time_table", bias.time_table),
        ("timestamps", bias.timestamps),
        ("row_timestamps", bias.row_timestamps),
    ):
        if tensor is not None and tensor.device != q.device:
            raise TypeError(f"bias.{name}: expected a tensor on {q.device} as q, got one on {tensor.device}")
