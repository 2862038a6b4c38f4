"""Who sees whom: the one definition of the attention mask, and the bound that tiles are chosen by."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor


class KeyRange(NamedTuple):
    """Keys that a block of rows may see: ``[0, prefix_end)`` and ``[begin, end)``, with ``prefix_end <= begin``."""

    prefix_end: int
    begin: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMask:
    """The structure of the attention inside ``[contextual | history | targets]``; static and hashable.

    History is always causal, a target is never seen by any other row, and the contextual prefix is seen by all.

    Attributes:
        max_attn_len: 0 for unlimited; otherwise a history row sees that many earlier keys and itself
            (K1 of ULTRA-HSTU).
        global_prefix_len: history keys right after the contextual prefix that all later rows see
            (first reading of K2 of ULTRA-HSTU).
        full_attn_tail_len: history rows at the end that keep full causal attention (second reading of K2).
        window_targets: targets see only the global prefix and the last ``max_attn_len`` history rows.
        contextual_sees_history: contextual rows see the whole history, too, not only the contextual prefix. From the
            second layer on every row then depends on the whole history through them: a next-item loss would see its
            own answers, and keys and values cached for a history are stale once it grows.
    """

    max_attn_len: int = 0
    global_prefix_len: int = 0
    full_attn_tail_len: int = 0
    window_targets: bool = False
    contextual_sees_history: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise TypeError(f"{field.name}: expected a bool, got {value!r}")
            elif not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{field.name}: expected an int, got {value!r}")
            elif value < 0:
                raise ValueError(f"{field.name}: expected a number >= 0, got {value}")

    def visible(self, rows: Tensor, cols: Tensor, history_end: Tensor | int, contextual_seq_len: int) -> Tensor:
        """The definition: may row ``rows`` see key ``cols``?

        Args:
            rows, cols: int64 indices inside one sequence, of shapes that broadcast together.
            history_end: index of the first target (the number of contextual and history rows); broadcasts, too.
            contextual_seq_len: leading contextual rows.

        Returns:
            bool tensor of the broadcast shape.
        """
        target_row = rows >= history_end
        # Every target stands at the history end, whatever its index.
        position = torch.where(target_row, history_end, rows)
        contextual_row = rows < contextual_seq_len
        contextual_key = cols < contextual_seq_len
        history_key = cols < history_end

        near = torch.ones_like(target_row) if self.max_attn_len == 0 else position - cols <= self.max_attn_len
        prefix = cols < contextual_seq_len + self.global_prefix_len
        tail = ~target_row & (rows >= history_end - self.full_attn_tail_len)
        full_target = target_row & (not self.window_targets)

        causal = (cols <= rows) & history_key & (near | prefix | tail | full_target)
        from_context = history_key & (contextual_key | self.contextual_sees_history)
        return torch.where(contextual_row, from_context, causal) | (rows == cols)

    def key_range(
        self, row_begin: int, row_end: int, seq_len: int, history_end: int, contextual_seq_len: int
    ) -> KeyRange:
        """Bounds that cover `visible` for rows ``[row_begin, row_end)`` of one sequence of ``seq_len`` rows."""
        row_end = min(row_end, seq_len)
        if row_begin >= row_end:
            return KeyRange(0, 0, 0)
        end = row_end
        if row_begin < contextual_seq_len:
            end = max(end, history_end if self.contextual_sees_history else min(contextual_seq_len, history_end))
        sees_all = (
            self.max_attn_len == 0
            or row_begin < contextual_seq_len
            or (row_end > history_end and not self.window_targets)
            or (
                self.full_attn_tail_len > 0
                and row_end > history_end - self.full_attn_tail_len
                and row_begin < history_end
            )
        )
        if sees_all:
            return KeyRange(0, 0, end)
        begin = max(0, min(row_begin, history_end) - self.max_attn_len)
        prefix_end = min(contextual_seq_len + self.global_prefix_len, history_end, end)
        return KeyRange(0, 0, end) if prefix_end >= begin else KeyRange(prefix_end, begin, end)
