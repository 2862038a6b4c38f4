"""Dropout on a CPU: what stays, how it is scaled, and that seeds repeat it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hstu_kernels.dropout import dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.93])
def test_a_share_of_p_is_dropped_from_each_lane_and_the_mean_stays(p: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(4001, 101, dtype=torch.float64)
    y = dropout(x, p)
    by_lane = y.flatten()[: y.numel() // 4 * 4].view(-1, 4)
    # Five standard deviations of a share of 101,025 draws.
    limit = 5 * (p * (1 - p) / len(by_lane)) ** 0.5
    assert ((by_lane == 0).double().mean(0) - p).abs().max() < limit
    assert abs(y.mean().item() - 1) < limit / (1 - p)
    assert y.unique().tolist() == [0, pytest.approx(1 / (1 - p), rel=1e-3)]


def test_neighbours_are_independent() -> None:
    torch.manual_seed(0)
    kept = (dropout(torch.ones(1 << 18), 0.5) > 0).double() - 0.5
    for distance in (1, 2, 3, 4, 5):
        correlation = (kept[distance:] * kept[:-distance]).mean() * 4
        assert abs(correlation) < 5 / (1 << 18) ** 0.5, distance


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 7), (7, 0), (2, 3, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_any_shape_and_dtype(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    y = dropout(x, 0.3)
    assert y.shape == x.shape and y.dtype == dtype
    kept = y != 0
    torch.testing.assert_close(y[kept], (x[kept].double() / 0.7).to(dtype), rtol=0.01, atol=0)


def test_gradient_is_that_of_what_stayed() -> None:
    x = torch.randn(40, 9, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(grad * x.detach(), y.detach())
    assert 0 < (grad == 0).sum() < grad.numel()


def test_a_strided_view() -> None:
    x = torch.randn(6, 10).t()
    y = dropout(x, 0.5)
    torch.testing.assert_close(y[y != 0], 2 * x[y != 0])


def test_seeds_repeat_it() -> None:
    x = torch.ones(1000)
    torch.manual_seed(7)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(7)
    assert torch.equal(dropout(x, 0.5), first)
    assert not torch.equal(first, second)


def test_nothing_to_drop_is_the_same_tensor() -> None:
    x = torch.randn(5)
    assert torch.equal(dropout(x, 0.5, training=False), x)
    assert torch.equal(dropout(x, 0.0), x)


@pytest.mark.parametrize("p", [-0.1, 1.5])
def test_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        dropout(torch.ones(3), p)


def test_compiled_code_takes_the_compilers_own() -> None:
    compiled = torch.compile(lambda x: dropout(x, 0.5), backend="eager", fullgraph=True)
    x = torch.ones(64)
    torch.manual_seed(3)
    expected = F.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), expected)
