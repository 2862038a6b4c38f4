"""Optimisers of embedding tables that keep one second moment a row, and the pair of optimisers that a model needs.

Rowwise AdamW is that of ULTRA-HSTU: ``v_r = b2 v_r + (1 - b2) mean_j(g_rj^2)``, a first moment per element or none,
decoupled weight decay. FBGEMM has a fused form of it on CUDA; `hstu_plugin.adapters.torchrec.fused` picks it. These
here serve tables held by PyTorch itself, on any device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class _Rowwise(Optimizer):
    """What both share: rows of dense and sparse gradients, and states that may live on another device."""

    state_device: torch.device | None

    def _rows(self, table: nn.Parameter) -> tuple[Tensor | None, Tensor]:
        """Touched rows (``None``: all) and their gradient ``[rows, D]`` in float32 or better."""
        assert table.grad is not None
        if table.dim() != 2:
            raise ValueError(f"params: expected tables [rows, D], got shape {tuple(table.shape)}; use AdamW for it")
        grad = table.grad
        exact = torch.promote_types(grad.dtype, torch.float32)
        if not grad.is_sparse:
            return None, grad.to(exact)
        grad = grad.coalesce()
        return grad.indices()[0], grad.values().to(exact)

    def _zeros(self, table: nn.Parameter, shape: tuple[int, ...]) -> Tensor:
        device = self.state_device if self.state_device is not None else table.device
        exact = torch.promote_types(table.dtype, torch.float32)
        pinned = device.type == "cpu" and table.is_cuda
        return torch.zeros(shape, dtype=exact, device=device, pin_memory=pinned)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would move the states to the parameters' device and dtype."""
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for table in group["params"]:
                for name, value in self.state.get(table, {}).items():
                    if isinstance(value, Tensor) and value.dim():
                        exact = torch.promote_types(table.dtype, torch.float32)
                        self.state[table][name] = value.to(self.state_device or table.device, exact)


class RowwiseAdamW(_Rowwise):
    """AdamW with one second moment a row.

    ``m = b1 m + (1 - b1) g;  v_r = b2 v_r + (1 - b2) mean_j(g_rj^2);``
    ``w -= lr (m / (1 - b1^t) / (sqrt(v_r / (1 - b2^t)) + eps) + weight_decay w)``

    ``t`` counts the steps of the table. With a sparse gradient (``nn.Embedding(sparse=True)``) rows that it does not
    name stay as they are, moments and weight decay included, as in FBGEMM's fused kernel; with a dense one all rows
    move.

    Args:
        params: tables ``[rows, D]``.
        lr: learning rate, >= 0. betas: ``(b1, b2)`` in ``[0, 1)``; ``b1 = 0`` keeps no first moment.
        eps: added to the root. weight_decay: decoupled, >= 0.
        state_device: where the moments live; ``"cpu"`` frees device memory, and only touched rows travel.

    Raises:
        ValueError: a number is out of range or a parameter is no table.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_device: torch.device | str | None = None,
    ) -> None:
        _at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {betas}")
        self.state_device = None if state_device is None else torch.device(state_device)
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every table that has a gradient."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is not None:
                    self._update(table, group)
        return loss

    def _update(self, table: nn.Parameter, group: dict[str, Any]) -> None:
        rows, grad = self._rows(table)
        beta1, beta2 = group["betas"]
        state = self.state[table]
        if not state:
            state["step"] = 0
            state["exp_avg_sq"] = self._zeros(table, (table.shape[0],))
            if beta1 > 0:
                state["exp_avg"] = self._zeros(table, tuple(table.shape))
        state["step"] += 1
        first = grad
        if beta1 > 0:
            first = _moved(state["exp_avg"], rows, lambda old: old.mul_(beta1).add_(grad, alpha=1 - beta1), table)
        square = grad.square().mean(1)
        second = _moved(state["exp_avg_sq"], rows, lambda old: old.mul_(beta2).add_(square, alpha=1 - beta2), table)
        root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        step = first / (1 - beta1 ** state["step"]) / root[:, None]
        weights = (table if rows is None else table[rows]).to(grad.dtype)
        _write(table, rows, weights - group["lr"] * (step + group["weight_decay"] * weights))


class RowwiseAdagrad(_Rowwise):
    """Adagrad with one accumulator a row: ``v_r += mean_j(g_rj^2);  w -= lr (g / (sqrt(v_r) + eps) + weight_decay w)``.

    Equals FBGEMM's ``EXACT_ROWWISE_ADAGRAD`` with decoupled decay; arguments as `RowwiseAdamW`. Rows that a gradient
    does not name stay as they are.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        *,
        lr: float = 1e-2,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        state_device: torch.device | str | None = None,
    ) -> None:
        _at_least_zero(lr=lr, eps=eps, weight_decay=weight_decay)
        self.state_device = None if state_device is None else torch.device(state_device)
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every table that has a gradient."""
        loss = _evaluate(closure)
        for group in self.param_groups:
            for table in group["params"]:
                if table.grad is None:
                    continue
                rows, grad = self._rows(table)
                state = self.state[table]
                if not state:
                    state["sum"] = self._zeros(table, (table.shape[0],))
                square = grad.square().mean(1)
                total = _moved(state["sum"], rows, lambda old, square=square: old.add_(square), table)  # type: ignore[misc]
                weights = (table if rows is None else table[rows]).to(grad.dtype)
                step = grad / (total.sqrt() + group["eps"])[:, None]
                _write(table, rows, weights - group["lr"] * (step + group["weight_decay"] * weights))
        return loss


def _moved(state: Tensor, rows: Tensor | None, change: Callable[[Tensor], Tensor], table: Tensor) -> Tensor:
    """The touched part of a state after ``change``, computed beside the table and written back to where it lives."""
    if rows is None:
        new = change(state.to(table.device))
        if new.device != state.device:
            state.copy_(new)
        return new
    places = rows.to(state.device)
    new = change(state[places].to(table.device))
    state[places] = new.to(state.device)
    return new


def _write(table: Tensor, rows: Tensor | None, weights: Tensor) -> None:
    if rows is None:
        table.copy_(weights)
    else:
        table[rows] = weights.to(table.dtype)


def _evaluate(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _at_least_zero(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number >= 0:
            raise ValueError(f"{name}: expected a number >= 0, got {number!r}")


def dense_adamw(
    params: Iterable[nn.Parameter],
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    decay_vectors: bool = False,
    tables: Iterable[nn.Parameter] = (),
    table_options: Mapping[str, Any] | None = None,
) -> torch.optim.AdamW:
    """AdamW over dense weights.

    Args:
        params: weights; those that do not require a gradient are left out.
        lr, weight_decay, betas: of AdamW; ``weight_decay`` is that of matrices.
        decay_vectors: biases, norms and bias tables (1-D) decay, too.
        tables: those of ``params`` that take ``table_options`` (``lr``, ``weight_decay``, ``betas``, ``eps``) instead.
        table_options: numbers of the last group.
    """
    trained = [p for p in params if p.requires_grad]
    apart = {id(p) for p in tables}
    dense = [p for p in trained if id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in dense if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in dense if p.dim() < 2], "weight_decay": weight_decay if decay_vectors else 0.0},
        {"params": [p for p in trained if id(p) in apart], **(table_options or {})},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr, betas=betas)
