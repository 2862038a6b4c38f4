"""Load-balanced stochastic length: every rank of a data-parallel training gets the same work in every step.

Ranks that shorten histories independently have loads that differ, and all wait for the slowest. ULTRA-HSTU names three
phases and no details; this is our reading of them:

1. Warm-up: plain stochastic length. Each rank sums up its loads; an all-reduce gives the mean load of a rank and step.
2. Budget: starting from the plain draw, a rank shortens or restores histories until its load is that target. Histories
   are taken in the order of a random priority that is weighted by importance, so that important ones are shortened
   last and restored first. The last one touched gets the length that fits.
3. Every ``period`` steps an all-reduce renews the target, from the loads that plain draws would have had: loads under
   the budget would only confirm the old target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from hstu_plugin.config import HSTUConfig, _checked_int, _expect, _probability
from hstu_plugin.flops import sequence_flops
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.stochastic_length import StochasticLengthConfig, count_events, draw_lengths, shorten

LoadFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class LoadBalanceConfig:
    """Phases and tolerance.

    Attributes:
        warmup_steps: steps of plain stochastic length before the first target.
        period: steps between two all-reduces behind the warm-up.
        tolerance: share of the target that a rank's load may differ from it before histories are touched.
        min_events: no history is shortened below this to meet a budget.
    """

    warmup_steps: int = 20
    period: int = 100
    tolerance: float = 0.01
    min_events: int = 1

    def __post_init__(self) -> None:
        for name in ("warmup_steps", "period", "min_events"):
            _checked_int(name, getattr(self, name), 1)
        _probability("tolerance", self.tolerance)


def model_load(config: HSTUConfig, *, contextual_seq_len: int = 0) -> LoadFunction:
    """Load of a sequence by ``events [B]`` and ``targets [B]``: its operations under the model's own mask."""

    def load(events: Tensor, targets: Tensor) -> Tensor:
        flops = sequence_flops(config, events + contextual_seq_len, targets, contextual_seq_len=contextual_seq_len)
        return flops.total

    return load


def all_reduce_sum(total: Tensor) -> Tensor:
    """The sum over the ranks of the default process group; ``total`` itself where there is none."""
    if dist.is_available() and dist.is_initialized():
        on_gpu = dist.get_backend() == "nccl"
        total = total.cuda() if on_gpu else total.clone()
        dist.all_reduce(total)
    return total.cpu()


class LoadBalancedLength:
    """Stochastic length under a budget; one object for each rank, called once in each training step of all ranks.

    Args:
        stochastic: the plain draw.
        balance: phases and tolerance.
        load: `model_load` of the model, or another that rises with the events.
        reduce: sums ``[2]`` float64 over the ranks; every rank calls it in the same steps.
    """

    def __init__(
        self,
        stochastic: StochasticLengthConfig,
        balance: LoadBalanceConfig,
        load: LoadFunction,
        *,
        reduce: Callable[[Tensor], Tensor] = all_reduce_sum,
    ) -> None:
        self.stochastic, self.balance = stochastic, balance
        self._load, self._reduce = load, reduce
        self.target: float | None = None
        self._step = 0
        self._observed = torch.zeros(2, dtype=torch.float64)

    def __call__(
        self, seq: JaggedSequence, *, importance: Tensor | None = None, generator: torch.Generator | None = None
    ) -> JaggedSequence:
        """The batch of this step, with histories shortened.

        Args:
            seq: rows of any kind in ``[contextual | history | targets]``.
            importance: ``[B]`` numbers > 0; recent users by default, where there are times (`recency`).
            generator: source of all draws.
        """
        layout = seq.layout
        if importance is None:
            importance = recency(seq)
        events = count_events(layout)
        targets = torch.zeros_like(events) if layout.num_targets is None else layout.num_targets
        kept = self.lengths(events.cpu(), targets.cpu(), importance=importance.cpu(), generator=generator)
        return shorten(seq, kept.to(layout.device), self.stochastic, generator)

    def lengths(
        self,
        events: Tensor,
        targets: Tensor,
        *,
        importance: Tensor,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """``[B]`` int64 events to keep; the decision behind `__call__`, on tensors of the CPU."""
        _expect(bool((importance > 0).all()), "importance", "numbers > 0", importance.tolist())
        own = None if generator is None or generator.device.type == "cpu" else generator
        if own is not None:
            # Draws of a device's generator stay on that device; only the lengths come here.
            generator = torch.Generator().manual_seed(int(torch.randint(2**62, (), device=own.device, generator=own)))
        plain = draw_lengths(events, self.stochastic, generator)
        self._observed += torch.stack([self._load(plain, targets).sum(), torch.ones((), dtype=torch.float64)])
        kept = plain
        if self.target is not None:
            drawn = torch.rand(events.shape, dtype=torch.float64, generator=generator).clamp(min=1e-300)
            # Weighted draw without replacement: the largest keys come first.
            priority = torch.log(drawn) / importance.double()
            kept = self._fit(plain, events, targets, priority)
        self._step += 1
        behind = self._step - self.balance.warmup_steps
        if behind >= 0 and behind % self.balance.period == 0:
            total, steps = self._reduce(self._observed).tolist()
            self.target = total / steps
            self._observed = torch.zeros(2, dtype=torch.float64)
        return kept

    def state_dict(self) -> dict[str, Any]:
        """Plain data to go on from."""
        return {"target": self.target, "step": self._step, "observed": self._observed.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.target, self._step = state["target"], int(state["step"])
        self._observed = torch.tensor(state["observed"], dtype=torch.float64)

    def _fit(self, kept: Tensor, events: Tensor, targets: Tensor, priority: Tensor) -> Tensor:
        assert self.target is not None
        total = float(self._load(kept, targets).sum())
        slack = self.target * self.balance.tolerance
        if total > self.target + slack:
            least_first = torch.argsort(priority)
            short = kept.clamp(max=self.stochastic.threshold)
            kept = self._shift(kept, short, targets, least_first, total)
            if float(self._load(kept, targets).sum()) > self.target + slack:
                kept = self._cap(kept, targets, least_first.flip(0))
        elif total < self.target - slack:
            kept = self._shift(kept, events, targets, torch.argsort(priority, descending=True), total)
        return kept

    def _shift(self, kept: Tensor, wanted: Tensor, targets: Tensor, order: Tensor, total: float) -> Tensor:
        """Go from ``kept`` to ``wanted``, history by history in ``order``, until the load passes the target."""
        assert self.target is not None
        before, after = self._load(kept, targets), self._load(wanted, targets)
        reached = total + torch.cumsum((after - before)[order], 0)
        rising = float(reached[-1]) > total
        inside = reached <= self.target if rising else reached >= self.target
        done = int(inside.long().cumprod(0).sum())
        kept = kept.clone()
        kept[order[:done]] = wanted[order[:done]]
        if done < len(order):
            # The one that passes the target goes as far as it may.
            last = order[done]
            low, high = sorted((int(kept[last]), int(wanted[last])))
            lengths = torch.arange(low, high + 1)
            rest = self.target - (float(reached[done]) - float(after[last]))
            loads = self._load(lengths, targets[last].expand(len(lengths)))
            kept[last] = low + max(0, int((loads <= rest).sum()) - 1)
        return kept

    def _cap(self, kept: Tensor, targets: Tensor, order: Tensor) -> Tensor:
        """The longest common length under which the load meets the target, for batches of short histories, too many.

        What is left of the budget gives the first in ``order`` one event more.
        """
        assert self.target is not None
        low, high = self.balance.min_events, max(self.balance.min_events, int(kept.max()))
        while low < high:
            middle = (low + high + 1) // 2
            if float(self._load(kept.clamp(max=middle), targets).sum()) <= self.target:
                low = middle
            else:
                high = middle - 1
        capped = kept.clamp(max=low)
        total = float(self._load(capped, targets).sum())
        return self._shift(capped, kept.clamp(max=low + 1), targets, order, total) if total < self.target else capped


def recency(seq: JaggedSequence, half_life: float = 30 * 86_400.0) -> Tensor:
    """``[B]`` importance by the time of each user's latest event: half as much for every ``half_life`` seconds before
    the batch's latest one, one thousandth at least. Ones where there are no times."""
    layout = seq.layout
    ones = torch.ones(layout.batch_size, dtype=torch.float64, device=layout.device)
    filled = layout.history_lengths > 0
    if seq.timestamps is None or not bool(filled.any()):
        return ones
    latest = seq.timestamps[seq.last_history_rows()[filled]]
    ones[filled] = torch.exp2((latest - latest.max()).double() / half_life).clamp(min=1e-3)
    return ones
