"""Both passes of the attention outside autograd, for those who keep their own books and say where gradients go.

Backends with a backward of their own: eager and Triton. A compiler sees `hstu_kernels.attention.ops` instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu_kernels.attention.api import AttentionPlan, prepare
from hstu_kernels.attention.eager import EagerPlan, eager_backward, eager_forward
from hstu_kernels.attention.triton import TritonPlan
from hstu_kernels.backend import Backend, UnsupportedBackend
from hstu_kernels.bias import RelativeBias
from hstu_kernels.layout import JaggedLayout
from hstu_kernels.mask import AttentionMask


@dataclass(frozen=True, slots=True)
class AttentionPasses:
    """A planned call; the tensors come with each pass, so that nothing of them is kept here."""

    state: EagerPlan | TritonPlan
    alpha: float
    scale: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, pos_table: Tensor | None, time_table: Tensor | None) -> Tensor:
        """``[L, H, Dv]``, contiguous; arguments as `hstu_kernels.hstu_attention`, in one dtype."""
        numbers = (self.alpha, self.scale)
        if isinstance(self.state, EagerPlan):
            return eager_forward(q, k, v, pos_table, time_table, self.state, *numbers)
        from hstu_kernels.attention.triton import launch

        return launch.triton_forward(q, k, v, pos_table, time_table, self.state, *numbers)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pos_table: Tensor | None,
        time_table: Tensor | None,
        *,
        needed: Sequence[bool],
        into: Sequence[Tensor],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of the tables where ``needed`` (two entries) says so; those of q, k and v are written.

        Args:
            grad: ``[L, H, Dv]``.
            into: where the gradients of q, k and v go, ``[L, H, D]``: columns of one matrix, so that rows have one
                stride and heads are contiguous.
        """
        numbers = (self.alpha, self.scale)
        if isinstance(self.state, EagerPlan):
            found = eager_backward(grad, q, k, v, pos_table, time_table, self.state, *numbers)
            for place, gradient in zip(into, found, strict=False):
                assert gradient is not None
                place.copy_(gradient)
        else:
            from hstu_kernels.attention.triton import launch

            wanted = (True, True, True, *needed)
            tables = (pos_table, time_table)
            found = launch.triton_backward(grad, q, k, v, *tables, self.state, *numbers, None, wanted, into=into)
        dpos, dtime = (gradient if need else None for gradient, need in zip(found[3:], needed, strict=True))
        return dpos, dtime


def attention_passes(
    layout: JaggedLayout,
    mask: AttentionMask,
    *,
    alpha: float,
    scale: float,
    bias: RelativeBias | None,
    plan: AttentionPlan | None,
    backend: Backend | str,
    like: Tensor,
    dtype: torch.dtype,
    widths: tuple[int, int],
) -> AttentionPasses:
    """Check a call to come and plan it, where ``plan`` is ``None``.

    Args:
        layout, mask, alpha, scale, bias, plan, backend: as in `hstu_kernels.hstu_attention`.
        like: ``[L, ...]`` on the device. dtype: of q, k and v. widths: ``Dqk`` and ``Dv``.

    Raises:
        ValueError, TypeError: the plan, the layout or the bias do not fit.
        UnsupportedBackend: the backend cannot serve the call, or has no backward of its own.
    """
    state = prepare(layout, mask, bias, plan, backend=backend, like=like, dtype=dtype, widths=widths).state
    if state is None:
        raise UnsupportedBackend("backend: the reference has no backward of its own; use 'triton' or 'eager'")
    return AttentionPasses(state, alpha, scale)
