"""The measured shapes, in groups that one call can pick from, and the work each of them holds."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_kernels.testing import BiasKind

LOCAL, GLOBAL = 256, 256
LENGTHS = (4096, 8192, 16384, 32768, 65536)
TRUNCATED_SHARE = 4
PREFIX = AttentionMask(max_attn_len=LOCAL, global_prefix_len=GLOBAL)
TAIL = AttentionMask(max_attn_len=LOCAL, full_attn_tail_len=GLOBAL)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One batch to measure.

    Attributes:
        group, name: what it is picked by; the name is unique.
        series: the line of a chart that it belongs to.
        length: nominal sequence length, the chart's x; ``lengths``: rows of each sequence, targets included.
        heads, qk_dim, v_dim: ``H``, ``Dqk``, ``Dv``.
        num_targets: candidates at the end of each sequence.
        bias: terms of the relative bias.
        small: also measured as graph replays.
        cached: also measured as targets against cached histories, forward only.
    """

    group: str
    name: str
    series: str
    length: int
    lengths: tuple[int, ...]
    heads: int = 4
    qk_dim: int = 128
    v_dim: int = 128
    mask: AttentionMask = field(default_factory=AttentionMask)
    num_targets: tuple[int, ...] | None = None
    bias: BiasKind = BiasKind.NONE
    small: bool = False
    cached: bool = False

    @property
    def total_rows(self) -> int:
        return sum(self.lengths)

    @property
    def dense(self) -> bool:
        """Rows of equal length under the plain causal mask: what softmax attention of a batch can run."""
        plain = self.mask == AttentionMask() and self.num_targets is None and self.bias is BiasKind.NONE
        return plain and len(set(self.lengths)) == 1

    def layout(self, device: torch.device) -> JaggedLayout:
        """The geometry on ``device``."""
        targets = None if self.num_targets is None else torch.tensor(self.num_targets, device=device)
        return JaggedLayout.from_lengths(torch.tensor(self.lengths, device=device), num_targets=targets)


def visible_pairs(layout: JaggedLayout, mask: AttentionMask) -> int:
    """How many (row, key) pairs of the batch `AttentionMask.visible` shows, counted row by row in closed form."""
    total = int(layout.seq_offsets[-1])
    context = layout.contextual_seq_len
    rows, history = layout.row_indices(total), layout.history_ends(total)
    target = rows >= history
    # Keys before `end` are causal; of them a row sees a prefix and those from `near` on, or all.
    end = torch.minimum(rows + 1, history)
    position = torch.minimum(rows, history)
    near = (position - mask.max_attn_len).clamp(min=0) if mask.max_attn_len else torch.zeros_like(rows)
    tail = ~target & (rows >= history - mask.full_attn_tail_len)
    sees_all = tail | (target & (not mask.window_targets))
    near = torch.where(sees_all, 0, torch.minimum(near, end))
    prefix = end.clamp(max=context + mask.global_prefix_len)
    seen = end - near + torch.minimum(prefix, near)
    from_context = history if mask.contextual_sees_history else history.clamp(max=context)
    seen = torch.where(rows < context, from_context, seen)
    return int((seen + target.long()).sum())


@dataclass(frozen=True, slots=True)
class Work:
    """Floating-point operations of a forward; a backward has 2.5 times as many.

    Attributes:
        pairs: visible (row, key) pairs of one head.
        exact: two products for every visible pair, ``2 * pairs * H * (Dqk + Dv)``.
        convention: as publications count causal attention, ``2 * sum(L^2) / 2 * H * (Dqk + Dv)``; else as ``exact``.
    """

    pairs: int
    exact: float
    convention: float

    @classmethod
    def of(cls, case: Case, layout: JaggedLayout) -> Work:
        """Of one batch."""
        pairs = visible_pairs(layout, case.mask)
        factor = 2.0 * case.heads * (case.qk_dim + case.v_dim)
        causal = case.mask == AttentionMask() and case.num_targets is None
        halves = sum(length**2 for length in case.lengths) / 2 if causal else pairs
        return cls(pairs, factor * pairs, factor * halves)


BACKWARD_FACTOR = 2.5


def jagged_lengths(count: int, longest: int, mean_share: float, *, seed: int = 0) -> tuple[int, ...]:
    """``count`` lengths up to ``longest``, their mean about ``mean_share`` of it: even steps with jitter, shuffled."""
    rng = random.Random(seed)
    low = max(0.0, 2 * mean_share - 1)
    high = 2 * mean_share - low
    shares = [low + (high - low) * (i + rng.random()) / count for i in range(count)]
    rng.shuffle(shares)
    return tuple(max(1, round(share * longest)) for share in shares)


def _full(group: str, batch: int, length: int, heads: int = 4, width: int = 128) -> Case:
    name = f"{batch}x{length}x{heads}x{width}-full"
    case = Case(group=group, name=name, series="full", length=length, lengths=(length,) * batch, heads=heads)
    return replace(case, qk_dim=width, v_dim=width)


def _jagged(group: str, batch: int, length: int, share: float, heads: int = 4, width: int = 128) -> Case:
    lengths = jagged_lengths(batch, length, share)
    name = f"{batch}x{length}x{heads}x{width}-jagged"
    case = Case(group=group, name=name, series="jagged", length=length, lengths=lengths, heads=heads)
    return replace(case, qk_dim=width, v_dim=width)


def _over_lengths() -> list[Case]:
    cases = []
    for length in LENGTHS:
        # One batch size throughout, so that time against length shows the cost of a sequence.
        full, short = _full("length", 4, length), f"4x{length}"
        latest = _full("truncated", 4, length // TRUNCATED_SHARE)
        cases += [
            replace(full, name=f"{short}-causal"),
            replace(full, group="semi_local", name=f"{short}-prefix", series="semi-local prefix", mask=PREFIX),
            replace(full, group="semi_local", name=f"{short}-tail", series="semi-local tail", mask=TAIL),
            replace(latest, name=f"{short}-truncated", series="truncated", length=length),
        ]
    return cases


def _cases() -> tuple[Case, ...]:
    jagged = _jagged("jagged", 16, 4096, 0.65)
    jagged_long = _jagged("jagged", 8, 16384, 0.53)
    cases = [
        _full("causal", 32, 1024),
        _full("causal", 16, 4096),
        _full("causal", 4, 16384),
        _full("causal", 16, 4096, 8, 64),
        jagged,
        jagged_long,
        _jagged("jagged", 16, 4096, 0.65, 8, 64),
        _jagged("jagged", 128, 512, 0.65, 4, 64),
    ]
    for word, mask in (("prefix", PREFIX), ("tail", TAIL)):
        series = f"semi-local {word} of published shapes"
        wide = replace(_full("semi_local", 16, 4096), name=f"16x4096-{word}", series=series, mask=mask)
        name = f"8x16384-{word}-jagged"
        cases += [wide, replace(jagged_long, group="semi_local", name=name, series=series, mask=mask)]
    cases += _over_lengths()
    for kind in (BiasKind.NONE, BiasKind.POSITION, BiasKind.TIME, BiasKind.BOTH):
        name = f"16x4096-bias-{kind.value}"
        cases.append(replace(jagged, group="biased", name=name, series=f"bias {kind.value}", bias=kind))
    histories = jagged_lengths(32, 4096, 0.625, seed=1)
    histories = tuple(min(4096, max(1024, n)) for n in histories)
    with_targets = Case(
        group="targets",
        name="32x4096-1024-candidates",
        series="targets",
        length=4096,
        lengths=tuple(n + 1024 for n in histories),
        num_targets=(1024,) * 32,
        cached=True,
    )
    cases.append(with_targets)
    for batch, length, heads, width in ((128, 200, 1, 50), (128, 200, 2, 25), (8, 256, 2, 64), (1, 1024, 4, 128)):
        small = _jagged("small", batch, length, 0.6, heads, width) if batch > 1 else _full("small", 1, 1024)
        cases.append(replace(small, small=True, series="small"))
    return tuple(cases)


CASES = _cases()
GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


def tiny(case: Case) -> Case:
    """The same structure at a size that a CPU does at once: for tests of this command."""
    room = 0 if case.num_targets is None else 4
    lengths = tuple(8 + n % 29 + room for n in case.lengths[:3])
    if len(set(case.lengths)) == 1:
        lengths = (32 + room,) * len(lengths)
    targets = None if case.num_targets is None else (room,) * len(lengths)
    mask = case.mask
    if mask.max_attn_len:
        prefix, tail = (4 if n else 0 for n in (mask.global_prefix_len, mask.full_attn_tail_len))
        mask = replace(mask, max_attn_len=4, global_prefix_len=prefix, full_attn_tail_len=tail)
    name, heads = f"tiny-{case.name}", min(case.heads, 2)
    return replace(case, name=name, lengths=lengths, num_targets=targets, mask=mask, heads=heads, qk_dim=16, v_dim=16)


def choose(groups: tuple[str, ...], pattern: str | None) -> list[Case]:
    """The cases of ``groups`` (all for none) whose name contains ``pattern``."""
    chosen = [case for case in CASES if not groups or case.group in groups]
    return [case for case in chosen if pattern is None or pattern in case.name]


def padded(x: Tensor, layout: JaggedLayout) -> Tensor:
    """``[L, H, D] -> [B, H, N, D]`` with zeros behind the end of each sequence."""
    rows = x.shape[0]
    out = x.new_zeros(layout.batch_size, layout.max_seq_len, *x.shape[1:])
    out[layout.sequence_ids(rows), layout.row_indices(rows)] = x
    return out.transpose(1, 2)
