"""Known-wrong kernels must fail the very assertions that the other tests rely on, in every precision."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hstu_kernels import AttentionMask, JaggedLayout, RelativeBias, next_event_timestamps
from hstu_kernels.attention.reference import reference_attention
from hstu_kernels.bias import bucket_boundaries, time_buckets
from hstu_kernels.testing import AttentionCase, assert_equals_oracle, assert_within_budget, make_inputs

CASE = AttentionCase(
    name="all-features",
    lengths=(63, 111, 30),
    num_targets=(9, 30, 4),
    contextual_seq_len=2,
    heads=2,
    qk_dim=16,
    v_dim=16,
    mask=AttentionMask(max_attn_len=11, global_prefix_len=3, full_attn_tail_len=5, window_targets=True),
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True)
class Kernel:
    """An attention kernel with places to break; broken nowhere it is correct. ``dots`` already hold alpha."""

    visible: Callable[[AttentionMask, Tensor, Tensor, int, int], Tensor] = AttentionMask.visible
    positions: Callable[[Tensor, int], Tensor] = lambda rows, history_end: rows.clamp(max=history_end)
    asked_at: Callable[[Tensor, JaggedLayout], Tensor] = next_event_timestamps
    bucket: Callable[[Tensor, int], Tensor] = lambda buckets, num_buckets: buckets
    weights: Callable[[Tensor, Tensor, float, float], Tensor] = lambda dots, rab, scale, alpha: (
        F.silu(dots + rab) * scale
    )
    spread: Callable[[Tensor], Tensor] = lambda out: out

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: JaggedLayout,
        mask: AttentionMask,
        *,
        alpha: float,
        scale: float,
        bias: RelativeBias | None,
    ) -> Tensor:
        assert bias is not None
        assert bias.pos_table is not None
        assert bias.time_table is not None
        assert bias.timestamps is not None
        asked_at = self.asked_at(bias.timestamps, layout)
        reach = (bias.pos_table.numel() - 1) // 2
        outputs = []
        offsets = layout.seq_offsets.tolist()
        for (begin, end), history_end in zip(itertools.pairwise(offsets), layout.history_lengths.tolist(), strict=True):
            rows = torch.arange(end - begin)
            places = self.positions(rows, history_end)
            distance = (places[None, :] - places[:, None]).clamp(-reach, reach)
            buckets = time_buckets(
                asked_at[begin:end, None], bias.timestamps[None, begin:end], bucket_boundaries(bias.num_buckets)
            ).long()
            buckets = self.bucket(buckets, bias.num_buckets)
            rab = (bias.pos_table[distance + reach] + bias.time_table[buckets]).to(q.dtype)
            visible = self.visible(mask, rows[:, None], rows[None, :], history_end, layout.contextual_seq_len)
            dots = alpha * torch.einsum("ihd,jhd->hij", q[begin:end], k[begin:end])
            weights = torch.where(visible, self.weights(dots, rab, scale, alpha), 0.0)
            outputs.append(torch.einsum("hij,jhd->ihd", weights, v[begin:end]))
        return self.spread(torch.cat(outputs))


def window_off_by(shift: int) -> dict[str, Any]:
    return {"visible": lambda mask, *where: replace(mask, max_attn_len=mask.max_attn_len + shift).visible(*where)}


def altered_mask(**fields: Any) -> dict[str, Any]:
    return {"visible": lambda mask, *where: replace(mask, **fields).visible(*where)}


def context_ignored(mask: AttentionMask, rows: Tensor, cols: Tensor, history_end: int, contextual: int) -> Tensor:
    return mask.visible(rows, cols, history_end, 0)


def targets_see_each_other(
    mask: AttentionMask, rows: Tensor, cols: Tensor, history_end: int, contextual: int
) -> Tensor:
    earlier_target = (rows >= history_end) & (cols >= history_end) & (cols <= rows)
    return mask.visible(rows, cols, history_end, contextual) | earlier_target


def history_sees_targets(mask: AttentionMask, rows: Tensor, cols: Tensor, history_end: int, contextual: int) -> Tensor:
    last = (rows == history_end - 1) & (cols == history_end)
    return mask.visible(rows, cols, history_end, contextual) | last


def targets_do_not_see_themselves(
    mask: AttentionMask, rows: Tensor, cols: Tensor, history_end: int, contextual: int
) -> Tensor:
    return mask.visible(rows, cols, history_end, contextual) & ~((rows == cols) & (rows >= history_end))


def key_block_dropped(mask: AttentionMask, rows: Tensor, cols: Tensor, history_end: int, contextual: int) -> Tensor:
    """One tile of 16 rows and 16 keys of the longest sequence only."""
    tile = (rows >= 64) & (rows < 80) & (cols >= 48) & (cols < 64)
    return mask.visible(rows, cols, history_end, contextual) & ~tile


def last_key_dropped(mask: AttentionMask, rows: Tensor, cols: Tensor, history_end: int, contextual: int) -> Tensor:
    """The ragged end of one sequence of odd length."""
    return mask.visible(rows, cols, history_end, contextual) & (cols != 110)


def transposed(mask: AttentionMask, rows: Tensor, cols: Tensor, history_end: int, contextual: int) -> Tensor:
    return mask.visible(rows, cols, history_end, contextual).T


def not_causal(mask: AttentionMask, rows: Tensor, cols: Tensor, history_end: int, contextual: int) -> Tensor:
    """Each history row also sees the next one: the label leaks."""
    leak = (cols == rows + 1) & (cols < history_end)
    return mask.visible(rows, cols, history_end, contextual) | leak


MUTANTS: dict[str, dict[str, Any]] = {
    "window-one-short": window_off_by(-1),
    "window-one-long": window_off_by(1),
    "window-ignored": altered_mask(max_attn_len=0),
    "prefix-ignored": altered_mask(global_prefix_len=0),
    "prefix-one-short": altered_mask(global_prefix_len=2),
    "tail-ignored": altered_mask(full_attn_tail_len=0),
    "tail-one-long": altered_mask(full_attn_tail_len=6),
    "targets-not-windowed": altered_mask(window_targets=False),
    "context-sees-history": altered_mask(contextual_sees_history=True),
    "context-ignored": {"visible": context_ignored},
    "targets-see-each-other": {"visible": targets_see_each_other},
    "targets-do-not-see-themselves": {"visible": targets_do_not_see_themselves},
    "history-sees-a-target": {"visible": history_sees_targets},
    "key-block-dropped": {"visible": key_block_dropped},
    "last-key-dropped": {"visible": last_key_dropped},
    "mask-transposed": {"visible": transposed},
    "not-causal": {"visible": not_causal},
    "scale-on-bias": {"weights": lambda dots, rab, scale, alpha: F.silu(dots + rab * scale) * scale},
    "scale-inside-silu": {"weights": lambda dots, rab, scale, alpha: F.silu((dots + rab) * scale)},
    "scale-forgotten": {"weights": lambda dots, rab, scale, alpha: F.silu(dots + rab)},
    "alpha-on-bias": {"weights": lambda dots, rab, scale, alpha: F.silu(dots + rab * alpha) * scale},
    "alpha-twice": {"weights": lambda dots, rab, scale, alpha: F.silu(dots * alpha + rab) * scale},
    "bias-forgotten": {"weights": lambda dots, rab, scale, alpha: F.silu(dots) * scale},
    "bias-after-silu": {"weights": lambda dots, rab, scale, alpha: (F.silu(dots) + rab) * scale},
    "relu-for-silu": {"weights": lambda dots, rab, scale, alpha: F.relu(dots + rab) * scale},
    "row-asks-at-its-own-time": {"asked_at": lambda times, layout: times},
    "last-history-row-asks-at-the-request": {"asked_at": lambda times, layout: torch.cat([times[1:], times[-1:]])},
    "targets-at-their-index": {"positions": lambda rows, history_end: rows},
    "targets-one-place-early": {"positions": lambda rows, history_end: rows.clamp(max=history_end - 1)},
    "bucket-one-high": {"bucket": lambda buckets, num_buckets: (buckets + 1).clamp(max=num_buckets)},
    "bucket-one-low": {"bucket": lambda buckets, num_buckets: (buckets - 1).clamp(min=0)},
    "zeros": {"spread": lambda out: out * 0},
    "nan-in-one-row": {
        "spread": lambda out: out.masked_fill((torch.arange(out.shape[0]) == 7)[:, None, None], float("nan"))
    },
    "one-row-unwritten": {"spread": lambda out: out * (torch.arange(out.shape[0]) != 100)[:, None, None]},
    "sequences-shifted-by-a-row": {"spread": lambda out: out.roll(1, 0)},
    "heads-swapped": {"spread": lambda out: out.flip(1)},
}


def judge(kernel: Callable[..., Tensor], dtype: torch.dtype) -> None:
    inputs = make_inputs(CASE, dtype)
    if dtype == torch.float64:
        assert_equals_oracle(kernel, inputs)
    else:
        assert_within_budget(kernel, inputs)


any_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@any_dtype
def test_the_unbroken_kernel_passes(dtype: torch.dtype) -> None:
    judge(Kernel(), dtype)


@any_dtype
@pytest.mark.parametrize("mutant", MUTANTS.values(), ids=MUTANTS.keys())
def test_the_broken_kernel_fails(mutant: dict[str, Any], dtype: torch.dtype) -> None:
    with pytest.raises(AssertionError, match=r"error|off by"):
        judge(Kernel(**mutant), dtype)


class _WrongGradient(torch.autograd.Function):
    """Passes the values on and multiplies the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.save_for_backward(factor)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (factor,) = ctx.saved_tensors
        return grad * factor, None


@any_dtype
@pytest.mark.parametrize("which", ["q", "k", "v", "pos_table", "time_table"])
@pytest.mark.parametrize("factor", ["forgotten", "one-row-forgotten", "doubled"])
def test_a_right_output_with_a_wrong_gradient_fails(which: str, factor: str, dtype: torch.dtype) -> None:
    def kernel(q: Tensor, k: Tensor, v: Tensor, layout: JaggedLayout, mask: AttentionMask, **rest: Any) -> Tensor:
        tensors = {"q": q, "k": k, "v": v, "pos_table": rest["bias"].pos_table, "time_table": rest["bias"].time_table}
        wrong = tensors[which]
        multiplier = torch.full_like(
            wrong.detach(), {"forgotten": 0.0, "one-row-forgotten": 1.0, "doubled": 2.0}[factor]
        )
        if factor == "one-row-forgotten":
            # Row 20 is a history row; distance 0 and bucket 0 are the middle and the first table entry.
            multiplier[{"pos_table": (wrong.shape[0] - 1) // 2, "time_table": 0}.get(which, 20)] = 0.0
        tensors[which] = _WrongGradient.apply(wrong, multiplier)  # type: ignore[no-untyped-call]
        rest["bias"] = replace(rest["bias"], pos_table=tensors["pos_table"], time_table=tensors["time_table"])
        return reference_attention(tensors["q"], tensors["k"], tensors["v"], layout, mask, **rest)

    with pytest.raises(AssertionError, match=f"grad of {which}"):
        judge(kernel, dtype)


def test_drowned_signal_is_refused() -> None:
    """Inputs too small to show an error make the rule void, and it says so."""
    inputs = make_inputs(CASE, torch.float16)
    faint = replace(inputs, v=inputs.v * 1e-7)
    with pytest.raises(AssertionError, match="drowns"):
        assert_within_budget(Kernel(), faint)


def test_wrong_shape_and_dtype_are_refused() -> None:
    inputs = make_inputs(CASE, torch.bfloat16)
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(lambda *args, **rest: reference_attention(*args, **rest)[None], inputs)
    with pytest.raises(AssertionError, match="bfloat16"):
        assert_within_budget(lambda *args, **rest: reference_attention(*args, **rest).float(), inputs)
