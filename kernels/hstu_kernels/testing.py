"""Named cases, input makers and the precision rule, shared by tests and benchmarks. Imports torch alone.

The precision rule compares a kernel in low precision with the oracle in fp64 on the same, already rounded inputs:

    max|kernel - fp64| <= 2 * max|oracle in low precision - fp64| + eps

for the output and for every gradient. The rule means something only where the signal stands well above that budget, so
`assert_within_budget` checks this, too; inputs are of unit scale for the same reason.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from hstu_kernels.attention.reference import reference_attention
from hstu_kernels.bias import RelativeBias
from hstu_kernels.layout import JaggedLayout, LayerKV
from hstu_kernels.mask import AttentionMask

SIGNAL_TO_BUDGET = 10.0
FP64_TOLERANCE = 1e-12

_MINUTE, _HOUR, _DAY = 60, 3_600, 86_400
_EPOCH_BEGIN = 1_600_000_000


class BiasKind(StrEnum):
    """Terms of the relative bias that a case uses."""

    NONE = "none"
    POSITION = "position"
    TIME = "time"
    BOTH = "both"


@dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Shapes and structure of one attention call; ``name`` is the test id.

    Attributes:
        name: readable and unique.
        lengths: rows of each sequence, contextual rows and targets included.
        heads, qk_dim, v_dim: ``H``, ``Dqk``, ``Dv``.
        mask: who sees whom.
        contextual_seq_len: leading feature rows of every non-empty sequence.
        num_targets: candidates at the end of each sequence, or ``None``.
        bias: terms of the relative bias.
        num_buckets: buckets of the time term.
        table_reach: ``N`` of ``pos_table [2N - 1]``; the longest sequence when ``None``.
    """

    name: str
    lengths: tuple[int, ...]
    heads: int = 1
    qk_dim: int = 8
    v_dim: int = 8
    mask: AttentionMask = field(default_factory=AttentionMask)
    contextual_seq_len: int = 0
    num_targets: tuple[int, ...] | None = None
    bias: BiasKind = BiasKind.BOTH
    num_buckets: int = 128
    table_reach: int | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def total_rows(self) -> int:
        return sum(self.lengths)

    def layout(self, device: torch.device | str = "cpu") -> JaggedLayout:
        """The geometry, with the longest sequence as ``max_seq_len``."""
        targets = None if self.num_targets is None else torch.tensor(self.num_targets, dtype=torch.int64, device=device)
        return JaggedLayout.from_lengths(
            torch.tensor(self.lengths, dtype=torch.int64, device=device),
            num_targets=targets,
            contextual_seq_len=self.contextual_seq_len,
        )


def _mask(**options: Any) -> AttentionMask:
    return AttentionMask(**options)


ATTENTION_CASES: tuple[AttentionCase, ...] = (
    # Geometry.
    AttentionCase(name="one-row", lengths=(1,)),
    AttentionCase(name="odd-lengths", lengths=(1, 63, 111, 2), heads=2),
    AttentionCase(name="length-1000", lengths=(1000, 63), qk_dim=16, v_dim=16),
    AttentionCase(name="empty-sequences", lengths=(0, 63, 0, 5, 0)),
    AttentionCase(name="all-sequences-empty", lengths=(0, 0)),
    AttentionCase(name="empty-batch", lengths=()),
    AttentionCase(name="empty-batch-targets", lengths=(), num_targets=()),
    AttentionCase(name="three-heads-unequal-widths", lengths=(33, 64, 7), heads=3, qk_dim=5, v_dim=7),
    AttentionCase(name="many-short", lengths=(5, 3, 8, 1, 2, 9, 4, 7, 6, 3, 2, 1), heads=2),
    # Bias.
    AttentionCase(name="no-bias", lengths=(63, 20), bias=BiasKind.NONE, heads=2),
    AttentionCase(name="position-bias", lengths=(63, 20), bias=BiasKind.POSITION, heads=2),
    AttentionCase(name="time-bias", lengths=(63, 20), bias=BiasKind.TIME, heads=2),
    AttentionCase(name="position-table-shorter-than-sequence", lengths=(63, 20), table_reach=9),
    AttentionCase(name="three-buckets", lengths=(63, 20), num_buckets=3),
    # History masks.
    AttentionCase(name="window", lengths=(63, 111, 4), mask=_mask(max_attn_len=7)),
    AttentionCase(name="window-prefix", lengths=(63, 111, 4), mask=_mask(max_attn_len=7, global_prefix_len=5)),
    AttentionCase(name="window-tail", lengths=(63, 111, 4), mask=_mask(max_attn_len=7, full_attn_tail_len=5), heads=2),
    AttentionCase(
        name="window-prefix-tail-several-blocks",
        lengths=(400, 390, 111),
        mask=_mask(max_attn_len=64, global_prefix_len=8, full_attn_tail_len=32),
    ),
    AttentionCase(name="contextual", lengths=(63, 5, 0, 3), contextual_seq_len=3, heads=2),
    AttentionCase(name="contextual-window", lengths=(140, 63, 3), contextual_seq_len=3, mask=_mask(max_attn_len=4)),
    AttentionCase(
        name="contextual-sees-history",
        lengths=(63, 150, 3),
        contextual_seq_len=3,
        mask=_mask(max_attn_len=6, contextual_sees_history=True),
    ),
    # Targets.
    AttentionCase(name="targets", lengths=(63, 20, 9, 1), num_targets=(5, 0, 3, 1), heads=2),
    AttentionCase(name="all-targets", lengths=(6, 1, 3), num_targets=(6, 1, 3)),
    AttentionCase(name="zero-targets", lengths=(20, 9), num_targets=(0, 0)),
    AttentionCase(name="targets-window", lengths=(63, 20, 9), num_targets=(5, 0, 3), mask=_mask(max_attn_len=4)),
    AttentionCase(
        name="window-targets",
        lengths=(63, 20, 9),
        num_targets=(5, 0, 3),
        mask=_mask(max_attn_len=4, window_targets=True),
    ),
    AttentionCase(
        name="window-targets-tail-unequal-histories",
        lengths=(300, 300, 300, 300),
        num_targets=(200, 100, 10, 60),
        mask=_mask(max_attn_len=5, full_attn_tail_len=10, window_targets=True),
    ),
    AttentionCase(
        name="window-targets-prefix-unequal-histories",
        lengths=(300, 300, 280),
        num_targets=(200, 2, 140),
        mask=_mask(max_attn_len=5, global_prefix_len=6, window_targets=True),
    ),
    AttentionCase(
        name="everything",
        lengths=(150, 0, 33, 149, 5),
        heads=2,
        qk_dim=6,
        v_dim=10,
        num_targets=(20, 0, 4, 140, 2),
        contextual_seq_len=3,
        mask=_mask(max_attn_len=9, global_prefix_len=4, full_attn_tail_len=6, window_targets=True),
    ),
    AttentionCase(
        name="everything-contextual-sees-history",
        lengths=(150, 0, 33, 149, 5),
        num_targets=(20, 0, 4, 9, 2),
        contextual_seq_len=2,
        mask=_mask(max_attn_len=9, global_prefix_len=4, full_attn_tail_len=6, contextual_sees_history=True),
    ),
)


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Arguments of one attention call and the gradient that comes back into its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    grad_out: Tensor
    layout: JaggedLayout
    mask: AttentionMask
    bias: RelativeBias | None
    alpha: float
    scale: float

    def to(self, dtype: torch.dtype) -> AttentionInputs:
        """The same numbers in another precision; tables never go below float32, as parameters do not in training."""
        bias = self.bias
        if bias is not None:
            table_dtype = torch.promote_types(dtype, torch.float32)
            bias = replace(
                bias,
                pos_table=None if bias.pos_table is None else bias.pos_table.to(table_dtype),
                time_table=None if bias.time_table is None else bias.time_table.to(table_dtype),
            )
        tensors = (self.q.to(dtype), self.k.to(dtype), self.v.to(dtype), self.grad_out.to(dtype))
        return AttentionInputs(*tensors, self.layout, self.mask, bias, self.alpha, self.scale)


def make_timestamps(layout: JaggedLayout, total_rows: int, *, seed: int = 0) -> Tensor:
    """``[L]`` int64 seconds as logs have them: sessions, ties, gaps from seconds to months, one request time per user.

    Contextual rows carry the time of the first event; all targets of a user carry one request time.
    """
    rng = random.Random(seed)
    times: list[int] = []
    for length, history in zip(layout.seq_lengths.tolist(), layout.history_lengths.tolist(), strict=True):
        now = _EPOCH_BEGIN + rng.randrange(365 * _DAY)
        times += [now] * min(layout.contextual_seq_len, history)
        for _ in range(history - layout.contextual_seq_len):
            draw = rng.random()
            if draw < 0.75:
                now += rng.randrange(1, 5 * _MINUTE)
            elif draw < 0.85:
                now += int(_HOUR * 24 ** rng.random())
            elif draw < 0.9:
                now += int(_DAY * 120 ** rng.random())
            # Otherwise a tie: several events share a second.
            times.append(now)
        times += [now + rng.randrange(_DAY)] * max(0, length - history)
    assert len(times) == total_rows
    return torch.tensor(times, dtype=torch.int64, device=layout.device)


def make_bias(
    kind: BiasKind, layout: JaggedLayout, total_rows: int, *, num_buckets: int, table_reach: int, seed: int = 0
) -> RelativeBias | None:
    """Tables of unit scale (so that a wrong entry shows) in float64, rounded to float32."""
    if kind is BiasKind.NONE:
        return None
    generator = torch.Generator().manual_seed(seed)
    pos = torch.randn(2 * table_reach - 1, generator=generator).double().to(layout.device)
    time = torch.randn(num_buckets + 1, generator=generator).double().to(layout.device)
    if kind is BiasKind.POSITION:
        return RelativeBias(pos)
    timestamps = make_timestamps(layout, total_rows, seed=seed)
    return RelativeBias(pos if kind is BiasKind.BOTH else None, time, timestamps)


def make_inputs(
    case: AttentionCase,
    dtype: torch.dtype = torch.float64,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> AttentionInputs:
    """Unit-scale inputs of ``case``; logits and outputs are of order one, too."""
    generator = torch.Generator().manual_seed(seed)
    rows, heads, longest = case.total_rows, case.heads, max(case.lengths, default=0)

    def draw(width: int) -> Tensor:
        return torch.randn(rows, heads, width, generator=generator).to(device)

    q, k, v, grad_out = draw(case.qk_dim), draw(case.qk_dim), draw(case.v_dim), draw(case.v_dim)
    layout = case.layout(device)
    reach = case.table_reach if case.table_reach is not None else max(1, longest)
    bias = make_bias(case.bias, layout, rows, num_buckets=case.num_buckets, table_reach=reach, seed=seed)
    alpha, scale = case.qk_dim**-0.5, max(1, longest) ** -0.5
    return AttentionInputs(q, k, v, grad_out, layout, case.mask, bias, alpha, scale).to(dtype)


AttentionFunction = Callable[..., Tensor]


def run_attention(attention: AttentionFunction, inputs: AttentionInputs) -> dict[str, Tensor]:
    """Output and every gradient of ``attention(q, k, v, layout, mask, alpha=, scale=, bias=)``, by name."""
    leaves = {name: getattr(inputs, name).detach().clone().requires_grad_() for name in ("q", "k", "v")}
    bias = inputs.bias
    if bias is not None:
        for name in ("pos_table", "time_table"):
            table = getattr(bias, name)
            if table is not None:
                leaves[name] = table.detach().clone().requires_grad_()
        bias = replace(bias, pos_table=leaves.get("pos_table"), time_table=leaves.get("time_table"))
    out = attention(
        leaves["q"],
        leaves["k"],
        leaves["v"],
        inputs.layout,
        inputs.mask,
        alpha=inputs.alpha,
        scale=inputs.scale,
        bias=bias,
    )
    results = {"out": out.detach()}
    grads: tuple[Tensor | None, ...] = (None,) * len(leaves)
    if out.requires_grad:
        # A shape or dtype that differs from v's is for the caller to judge, on the output itself.
        grad_out = inputs.grad_out.to(out.dtype).expand_as(out)
        grads = torch.autograd.grad(out, list(leaves.values()), grad_out, allow_unused=True)
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"grad of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def assert_within_budget(
    attention: AttentionFunction,
    inputs: AttentionInputs | Sequence[AttentionInputs],
    *,
    factor: float = 2.0,
    signal: bool = True,
) -> None:
    """Raise ``AssertionError`` unless ``attention`` is as near to fp64 as the oracle is in the precision of ``inputs``.

    Args:
        attention: what is judged.
        inputs: in low precision; the fp64 truth is computed from the same rounded numbers. Several draws of one case
            are judged together, by their largest numbers: a gradient may be a single number (all pairs of events in
            one time bucket), and one that is a sum of terms that cancel; the oracle's error in it is small by luck.
        factor: how much larger than the oracle's the error may be.
        signal: also check that the numbers stand `SIGNAL_TO_BUDGET` times above the budget.
    """
    draws = [inputs] if isinstance(inputs, AttentionInputs) else list(inputs)
    largest: dict[str, float] = {}
    rounding: dict[str, float] = {}
    errors: dict[str, float] = {}
    for draw in draws:
        truth = run_attention(reference_attention, draw.to(torch.float64))
        rounded = run_attention(reference_attention, draw)
        got = run_attention(attention, draw)
        for name, expected in truth.items():
            assert got[name].shape == expected.shape, f"{name}: expected shape {expected.shape}, got {got[name].shape}"
            assert got[name].dtype == rounded[name].dtype, (
                f"{name}: expected {rounded[name].dtype}, got {got[name].dtype}"
            )
            if expected.numel() == 0:
                continue
            for found, x in (
                (largest, expected),
                (rounding, rounded[name].double() - expected),
                (errors, got[name].double() - expected),
            ):
                # A NaN stays whatever else is drawn.
                found[name] = float(torch.maximum(x.abs().max().double(), x.new_tensor(found.get(name, 0.0)).double()))
    for name, error in errors.items():
        eps = torch.finfo(draws[0].q.dtype).eps * largest[name]
        budget = factor * rounding[name] + eps
        if signal:
            assert largest[name] >= SIGNAL_TO_BUDGET * budget, (
                f"{name}: signal {largest[name]:.3g} drowns in budget {budget:.3g}"
            )
        # Written so that NaN fails.
        assert error <= budget, (
            f"{name}: error {error:.3g} exceeds the budget {budget:.3g} "
            f"(oracle's error {rounding[name]:.3g}, eps {eps:.3g}, signal {largest[name]:.3g})"
        )


def assert_equals_oracle(attention: AttentionFunction, inputs: AttentionInputs) -> None:
    """Raise ``AssertionError`` unless output and gradients equal the oracle's to `FP64_TOLERANCE` (fp64 inputs)."""
    assert inputs.q.dtype == torch.float64, "assert_equals_oracle: expected fp64 inputs; low precision has its own rule"
    truth = run_attention(reference_attention, inputs)
    for name, got in run_attention(attention, inputs).items():
        expected = truth[name]
        assert got.shape == expected.shape, f"{name}: expected shape {expected.shape}, got {got.shape}"
        if expected.numel() == 0:
            continue
        error, largest = float((got - expected).abs().max()), float(expected.abs().max())
        assert error <= FP64_TOLERANCE * max(1.0, largest), f"{name}: off by {error:.3g} (signal {largest:.3g})"


@dataclass(frozen=True, slots=True)
class TargetInputs:
    """Arguments of one target attention call; ``rows [T]`` says where its targets stand in the full sequences."""

    q: Tensor
    k: Tensor
    v: Tensor
    cache: LayerKV
    layout: JaggedLayout
    bias: RelativeBias | None
    rows: Tensor


def split_targets(inputs: AttentionInputs, micro_batch_size: int | None = None) -> list[TargetInputs]:
    """Cut full sequences into a cache of their histories and micro-batches of at most that many targets per user."""
    layout, bias = inputs.layout, inputs.bias
    assert layout.num_targets is not None, "split_targets: expected a layout with targets"
    total = inputs.q.shape[0]
    rows = layout.row_indices(total)
    behind = rows - layout.history_ends(total)
    history = behind < 0
    times = None if bias is None else bias.timestamps
    cache = LayerKV(
        inputs.k[history], inputs.v[history], layout.without_targets(), None if times is None else times[history]
    )
    most = int(layout.num_targets.max()) if layout.batch_size else 0
    step = max(1, most if micro_batch_size is None else micro_batch_size)
    batches = []
    for begin in range(0, max(1, most), step):
        chosen = ((behind >= begin) & (behind < begin + step)).nonzero().squeeze(1)
        counts = (layout.num_targets - begin).clamp(0, step)
        part_bias = bias
        if bias is not None and times is not None:
            part_bias = replace(bias, timestamps=times[history], row_timestamps=times[chosen])
        batches.append(
            TargetInputs(
                inputs.q[chosen],
                inputs.k[chosen],
                inputs.v[chosen],
                cache,
                JaggedLayout.from_lengths(counts),
                part_bias,
                chosen,
            )
        )
    return batches


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """While active, uninitialised floating-point memory from ``torch.empty`` and its relatives holds NaN.

    A kernel that leaves part of its output unwritten then fails every comparison instead of passing by luck.
    """

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            if out.is_floating_point():
                with torch.no_grad():
                    out.fill_(float("nan"))
            return out

        return wrapped

    places: tuple[tuple[Any, str], ...] = (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (Tensor, "new_empty"),
    )
    originals = [getattr(owner, name) for owner, name in places]
    try:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, poison(original))
        yield
    finally:
        for (owner, name), original in zip(places, originals, strict=True):
            setattr(owner, name, original)
