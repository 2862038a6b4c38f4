"""Everything that is timed, bound to a batch: our backends, plain PyTorch compiled, softmax attention, public ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention.batches import Batch
from benchmarks.attention.cases import padded
from benchmarks.attention.peers import cutlass_hstu, fa3_hstu, triton_hstu
from benchmarks.attention.unavailable import Unavailable
from hstu_kernels import JaggedLayout, LayerKV, hstu_attention, hstu_target_attention, plan_attention

# What materialised logits may take.
_DENSE_BYTES = 30 * 2**30
# Some public kernels sum a gradient in bfloat16, over hundreds of tiles of a long sequence.
_PEER_TOLERANCE = 0.05
# Rows of memory behind those of a public kernel's inputs.
_ROOM = 512


class Result(Enum):
    """Rows of a contender's output and gradients."""

    ROWS = "the flat rows of the batch"
    PADDED = "[B, H, N, D]"
    TARGETS = "the target rows of the batch, in order"
    OTHER = "another function, not comparable"


@dataclass(frozen=True, slots=True)
class Bound:
    """A contender ready to be called.

    Attributes:
        name: column ``contender``.
        forward: from one of ``inputs`` to the output.
        inputs: leaves, one tuple for each copy of the batch. grads: what comes back into the outputs; none for a
            contender without a backward.
        result: where its rows stand. leaf_names: of the gradients of ``inputs``.
        ours: run with poisoned memory when it is checked.
        unplanned: the same call with its preparation included.
        tolerance: relative error in the Frobenius norm that each result may have; ``None`` for the rule of our tests.
    """

    name: str
    forward: Callable[..., Tensor]
    inputs: list[tuple[Tensor, ...]]
    grads: list[Tensor]
    result: Result = Result.ROWS
    leaf_names: tuple[str, ...] = ("dq", "dk", "dv")
    ours: bool = False
    unplanned: Callable[..., Tensor] | None = None
    tolerance: float | None = None


Binder = Callable[[Batch], Bound]


def ours(backend: str) -> Binder:
    """`hstu_attention` with a plan made once for the batch, as a stack of layers calls it."""

    def bind(batch: Batch) -> Bound:
        layout, mask = batch.layout, batch.case.mask
        plan = plan_attention(layout, mask, bias=batch.bias, total_rows=batch.case.total_rows, backend=backend)
        fixed = {"alpha": batch.alpha, "scale": batch.scale, "backend": backend}

        def call(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
            return hstu_attention(q, k, v, layout, mask, bias=batch.bias, plan=plan, **fixed)  # type: ignore[arg-type]

        def unplanned(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
            return hstu_attention(q, k, v, layout, mask, bias=batch.bias, **fixed)  # type: ignore[arg-type]

        return replace(_bound(batch, backend, call), ours=True, unplanned=unplanned)

    return bind


def ours_cached(backend: str) -> Binder:
    """`hstu_target_attention`: the candidates alone, against cached histories."""

    def bind(batch: Batch) -> Bound:
        if not batch.case.cached:
            raise Unavailable("for cases with cached targets", by_design=True)
        total = batch.case.total_rows
        layout = batch.layout
        history = layout.row_indices(total) < layout.history_ends(total)
        assert layout.num_targets is not None
        targets = JaggedLayout.from_lengths(layout.num_targets)
        kept = layout.without_targets()

        def call(q: Tensor, k: Tensor, v: Tensor, cached_k: Tensor, cached_v: Tensor) -> Tensor:
            cache = LayerKV(cached_k, cached_v, kept)
            return hstu_target_attention(
                q, k, v, cache, targets, batch.case.mask, alpha=batch.alpha, scale=batch.scale, backend=backend
            )

        inputs = [
            tuple(x.detach() for x in (c.q[~history], c.k[~history], c.v[~history], c.k[history], c.v[history]))
            for c in batch.copies
        ]
        return Bound(f"{backend}-cached", call, inputs, [], Result.TARGETS, ours=True)

    return bind


def compiled_reference(batch: Batch) -> Bound:
    """The formula in plain PyTorch on padded ``[B, H, N, D]``, through ``torch.compile``; padding is not timed."""
    case, layout = batch.case, batch.layout
    longest = layout.max_seq_len
    if batch.bias is not None or case.num_targets is not None:
        raise Unavailable("written for masks without bias and targets")
    logits = layout.batch_size * case.heads * longest**2 * batch.copies[0].q.element_size()
    if 3 * logits > _DENSE_BYTES:
        raise Unavailable(f"its logits would take {logits / 2**30:.0f} GiB each")
    rows = torch.arange(longest, device=batch.device)
    ends = layout.seq_lengths[:, None, None, None]
    seen = case.mask.visible(rows[:, None], rows[None, :], ends, 0) & (rows < ends)
    alpha, scale = batch.alpha, batch.scale

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = F.silu(alpha * (q @ k.transpose(2, 3))) * scale
        return torch.where(seen, weights, 0.0) @ v

    # Every batch brings code for its own shapes; without this the ninth would silently run uncompiled.
    torch.compiler.reset()
    # The timed backward runs several times over one graph.
    functorch_config.donated_buffer = False
    return _dense(batch, "compiled-reference", torch.compile(attend, dynamic=False))


def softmax(kind: SDPBackend, name: str) -> Binder:
    """Causal softmax attention of the same shape: the same two products for each pair, another function of them."""

    def bind(batch: Batch) -> Bound:
        if not batch.case.dense:
            raise Unavailable("for rows of equal length under the plain causal mask", by_design=True)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return replace(_dense(batch, name, attend), result=Result.OTHER)

    return bind


def _bound(batch: Batch, name: str, forward: Callable[..., Tensor]) -> Bound:
    inputs = [(c.q, c.k, c.v, *batch.tables.values()) for c in batch.copies]
    names = ("dq", "dk", "dv", *batch.tables)
    return Bound(name, forward, inputs, [c.grad_out for c in batch.copies], leaf_names=names)


def _dense(batch: Batch, name: str, attend: Callable[..., Tensor]) -> Bound:
    layout, copies = batch.layout, batch.copies
    if layout.batch_size * layout.max_seq_len**2 > 2**28:
        # Logits that fill the cache by themselves need no second copy, and would not fit into memory twice.
        copies = copies[:1]
    inputs = [tuple(padded(x, layout).detach().requires_grad_() for x in (c.q, c.k, c.v)) for c in copies]
    return Bound(name, attend, inputs, [padded(c.grad_out, layout) for c in copies], Result.PADDED)


def _with_room(x: Tensor) -> Tensor:
    """A copy with memory of its own behind the last row: public kernels read there and may lose the device."""
    room = torch.zeros(x.shape[0] + _ROOM, *x.shape[1:], dtype=x.dtype, device=x.device)
    room[: x.shape[0]] = x.detach()
    return room[: x.shape[0]].requires_grad_(x.requires_grad)


def _peer(name: str, make: Callable[[Batch], Callable[..., Tensor]]) -> Binder:
    def bind(batch: Batch) -> Bound:
        if batch.bias is not None:
            raise Unavailable("takes no tables")
        bound = replace(_bound(batch, name, make(batch)), tolerance=_PEER_TOLERANCE)
        inputs = [tuple(_with_room(x) for x in leaves) for leaves in bound.inputs]
        return replace(bound, inputs=inputs, grads=[_with_room(grad) for grad in bound.grads])

    return bind


BASELINES: dict[str, Binder] = {
    "eager": ours("eager"),
    "compiled-reference": compiled_reference,
    "sdpa-flash": softmax(SDPBackend.FLASH_ATTENTION, "sdpa-flash"),
    "sdpa-cudnn": softmax(SDPBackend.CUDNN_ATTENTION, "sdpa-cudnn"),
    "meta-triton": _peer("meta-triton", triton_hstu),
    "meta-fa3": _peer("meta-fa3", fa3_hstu),
    "fbgemm-cutlass": _peer("fbgemm-cutlass", cutlass_hstu),
}
