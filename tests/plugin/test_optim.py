"""Rowwise optimisers against loops in float64 over single numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from hstu_plugin.optim import RowwiseAdagrad, RowwiseAdamW, dense_adamw

ROWS, WIDTH = 5, 3
SETUP = {"lr": 0.1, "eps": 1e-3, "weight_decay": 0.05}


def gradients(steps: int = 4) -> list[torch.Tensor]:
    """Each names some rows, one of them twice."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for step in range(steps):
        rows = torch.tensor([[step % ROWS, 3, 3]])
        found.append(
            torch.sparse_coo_tensor(rows, torch.randn(3, WIDTH, generator=draw, dtype=torch.float64), (ROWS, WIDTH))
        )
    return found


def start(dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(
        torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    )


def plain(kind: str, betas: tuple[float, float], dense: bool) -> list[list[float]]:
    """The formulas over Python floats."""
    w = start().detach().tolist()
    m = [[0.0] * WIDTH for _ in range(ROWS)]
    v = [0.0] * ROWS
    lr, eps, decay = SETUP["lr"], SETUP["eps"], SETUP["weight_decay"]
    for t, sparse in enumerate(gradients(), start=1):
        grad = sparse.to_dense().tolist()
        touched = set(range(ROWS)) if dense else set(sparse.coalesce().indices()[0].tolist())
        for r in touched:
            square = sum(g * g for g in grad[r]) / WIDTH
            if kind == "adagrad":
                v[r] += square
                w[r] = [x - lr * (g / (math.sqrt(v[r]) + eps) + decay * x) for x, g in zip(w[r], grad[r], strict=True)]
                continue
            v[r] = betas[1] * v[r] + (1 - betas[1]) * square
            m[r] = [betas[0] * old + (1 - betas[0]) * g for old, g in zip(m[r], grad[r], strict=True)]
            root = math.sqrt(v[r] / (1 - betas[1] ** t)) + eps
            w[r] = [x - lr * (a / (1 - betas[0] ** t) / root + decay * x) for x, a in zip(w[r], m[r], strict=True)]
    return w


def build(kind: str, table: nn.Parameter, betas: tuple[float, float], **more: object):
    if kind == "adagrad":
        return RowwiseAdagrad([table], **SETUP, **more)
    return RowwiseAdamW([table], betas=betas, **SETUP, **more)


CASES = [("adamw", (0.9, 0.99)), ("adamw", (0.0, 0.99)), ("adagrad", (0.0, 0.0))]


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize(("kind", "betas"), CASES, ids=["adamw", "adamw-no-first", "adagrad"])
@pytest.mark.parametrize("state_device", [None, "cpu"])
def test_equals_the_formula(kind: str, betas: tuple[float, float], dense: bool, state_device: str | None) -> None:
    table = start()
    optimizer = build(kind, table, betas, state_device=state_device)
    for grad in gradients():
        table.grad = grad.to_dense() if dense else grad
        optimizer.step()
    wanted = torch.tensor(plain(kind, betas, dense), dtype=torch.float64)
    torch.testing.assert_close(table.detach(), wanted, rtol=1e-12, atol=1e-12)
    state = optimizer.state[table]
    assert ("exp_avg" in state) == (betas[0] > 0)
    assert sum(value.numel() for value in state.values() if torch.is_tensor(value) and value.dim()) == ROWS + (
        ROWS * WIDTH if betas[0] > 0 else 0
    )


def test_states_return_from_a_checkpoint(tmp_path) -> None:
    tables = start(), start()
    runs = [build("adamw", table, (0.9, 0.99)) for table in tables]
    for table, optimizer in zip(tables, runs, strict=True):
        table.grad = gradients()[0]
        optimizer.step()
    torch.save(runs[0].state_dict(), tmp_path / "state.pt")
    runs[1] = build("adamw", tables[1], (0.9, 0.99))
    runs[1].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for table, optimizer in zip(tables, runs, strict=True):
        table.grad = gradients()[1]
        optimizer.step()
    torch.testing.assert_close(*tables, rtol=0, atol=0)


def test_low_precision_tables_keep_their_moments_in_float32(tmp_path) -> None:
    table = start(torch.bfloat16)
    optimizer = build("adamw", table, (0.9, 0.99))
    table.grad = gradients()[0].to(torch.bfloat16)
    optimizer.step()
    state = optimizer.state_dict()
    again = build("adamw", table, (0.9, 0.99))
    again.load_state_dict(state)
    for kept in (optimizer, again):
        assert kept.state[table]["exp_avg"].dtype == kept.state[table]["exp_avg_sq"].dtype == torch.float32


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_states_in_host_memory() -> None:
    table = nn.Parameter(start().detach().cuda())
    optimizer = build("adamw", table, (0.9, 0.99), state_device="cpu")
    for grad in gradients():
        table.grad = grad.cuda()
        optimizer.step()
    assert all(value.device.type == "cpu" for value in optimizer.state[table].values() if torch.is_tensor(value))
    torch.testing.assert_close(
        table.detach().cpu(), torch.tensor(plain("adamw", (0.9, 0.99), False), dtype=torch.float64)
    )


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"eps": float("nan")}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)}], ids=str
)
def test_numbers_out_of_range(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RowwiseAdamW([start()], **wrong)


def test_only_tables() -> None:
    vector = nn.Parameter(torch.zeros(3))
    vector.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"expected tables \[rows, D\]"):
        RowwiseAdamW([vector]).step()


def test_dense_decay_spares_vectors() -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    optimizer = dense_adamw(module.parameters(), lr=0.1, weight_decay=0.5)
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    before = [p.detach().clone() for p in module.parameters()]
    optimizer.step()
    for p, old in zip(module.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old * (0.95 if p.dim() == 2 else 1.0))
