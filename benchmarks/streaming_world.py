"""Records of a stream whose vocabulary grows: the Dirichlet process of HSTU's synthetic data (arXiv 2402.17152).

Each record has up to five categories, a prior over them and a concentration alpha. Its n-th item is of a category
drawn from the prior with probability ``alpha / (alpha + n - 1)``, else of category c with probability
``n_c / (alpha + n - 1)``: what was frequent stays so. Where the paper is silent: the number of categories is drawn
evenly from 1 to 5, the prior from a flat Dirichlet distribution, and an item evenly among those of the category that
exist by then.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class World:
    """Constants of the data."""

    items: int = 20_000
    categories: int = 100
    records: int = 1_000_000
    length: int = 128
    picks: int = 5
    available: float = 0.4
    train_share: float = 0.9
    largest_alpha: float = 500.0

    @property
    def size(self) -> int:
        """Items of a category, in the end."""
        return self.items // self.categories

    @property
    def trained(self) -> int:
        """Records of the training part, which are the first."""
        return int(self.records * self.train_share)

    def existing(self, numbers: Tensor) -> Tensor:
        """Items that each category has when the records of these numbers are made; shape as ``numbers``, int64."""
        progress = numbers / max(1, self.records - 1)
        return (self.size * (self.available + (1 - self.available) * progress)).long().clamp(1, self.size)


def make_records(world: World, first: int, count: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """``[count, length]`` int64 item ids from 1, of the records from ``first`` on."""

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    alpha = 1 + draw(count, 1) * (world.largest_alpha - 1)
    chosen = draw(count, world.categories).topk(world.picks, dim=1).indices
    picks = 1 + (draw(count, 1) * world.picks).long().clamp(max=world.picks - 1)
    # Exponential numbers over their sum are a draw of the flat Dirichlet distribution.
    weights = -draw(count, world.picks).clamp(min=1e-12).log()
    weights = weights * (torch.arange(world.picks, device=device) < picks)
    reached = (weights / weights.sum(1, keepdim=True)).cumsum(1)
    fresh_place = (reached[:, None, :] <= draw(count, world.length, 1)).sum(2).clamp(max=world.picks - 1)
    # Category c with probability n_c / (n - 1) is the category of one of the earlier items, each as likely.
    numbers = torch.arange(world.length, device=device)
    fresh = draw(count, world.length) * (alpha + numbers) < alpha
    source = torch.where(fresh, numbers, (draw(count, world.length) * numbers).long())
    for _ in range(max(1, math.ceil(math.log2(world.length)))):
        source = source.gather(1, source)
    place = torch.minimum(fresh_place.gather(1, source), picks - 1)
    existing = world.existing(torch.arange(first, first + count, device=device))[:, None]
    item = torch.minimum((draw(count, world.length) * existing).long(), existing - 1)
    return 1 + chosen.gather(1, place) * world.size + item


def batches(
    world: World, first: int, last: int, size: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[int, Tensor]]:
    """The number of the first record of a batch, and its records, in the order of time; made in larger pieces."""
    piece = size * max(1, 8192 // size)
    for begin in range(first, last, piece):
        made = make_records(world, begin, min(piece, last - begin), generator, device)
        parts = made.split(size)
        yield from zip(range(begin, begin + size * len(parts), size), parts, strict=True)


def counting_hits(world: World, records: Tensor, first: int, begin: int, k: int) -> Tensor:
    """Expected hits among ``k`` of one who knows all categories, and names items of the most frequent one so far.

    No side can do clearly better: items of a category are alike.

    Args:
        records: ``[R, length]`` ids. first: number of the first of them. begin: the first place that is predicted.

    Returns:
        ``[R, length - begin]`` float64 probabilities.
    """
    categories = (records - 1) // world.size
    counts = torch.nn.functional.one_hot(categories, world.categories).to(torch.int16).cumsum(1)
    guess = counts[:, begin - 1 : -1].argmax(2)
    numbers = torch.arange(first, first + len(records), device=records.device)
    share = (k / world.existing(numbers).double()).clamp(max=1)
    return (guess == categories[:, begin:]) * share[:, None]
