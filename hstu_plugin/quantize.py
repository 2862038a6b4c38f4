"""Embedding tables of a trained model in quantised rows: ``quantize(model, "int4")``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from hstu_kernels.int4 import PackedRows, RowFormat, RowRange, pack_rows
from hstu_plugin.quantize_report import QuantizationReport, TableReport, table_report
from hstu_plugin.quantized_embedding import QuantizedEmbedding, QuantizedLinear

Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """Which tables, and how their ranges are chosen.

    Attributes:
        tables: patterns (as of file names) of modules to quantise.
        skip: patterns of modules left alone, over ``tables``. Position tables by default: they are small, and every
            token carries one.
        ranges: of a row: ``min_max`` gives FBGEMM's bytes, ``search`` those of least squared error, which int4 tables
            should have unless the bytes must be FBGEMM's own.
        search_coverage: with known access frequencies only the most used rows that together have this share of all
            accesses are searched; the others take ``min_max``. 1: all rows, also those never seen.
    """

    tables: tuple[str, ...] = ("*",)
    skip: tuple[str, ...] = ("*position*",)
    ranges: RowRange = RowRange.MIN_MAX
    search_coverage: float = 1.0

    def __post_init__(self) -> None:
        for name in ("tables", "skip"):
            patterns = getattr(self, name)
            if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
                raise ValueError(f"{name}: expected a sequence of patterns such as ('item*',), got {patterns!r}")
            object.__setattr__(self, name, tuple(patterns))
        object.__setattr__(self, "ranges", RowRange.parse(self.ranges))
        if not 0 < self.search_coverage <= 1:
            raise ValueError(f"search_coverage: expected a number in (0, 1], got {self.search_coverage!r}")


@dataclass(frozen=True, slots=True)
class Quantized:
    """The model with quantised tables, and what that cost."""

    module: nn.Module
    report: QuantizationReport


def quantize(
    module: nn.Module,
    dtype: RowFormat | str = RowFormat.INT4,
    *,
    config: QuantizeConfig | None = None,
    frequencies: Mapping[str, Tensor] | None = None,
    evaluate: Evaluate | None = None,
) -> Quantized:
    """Replace the embedding tables of ``module`` by quantised ones, for inference.

    Works in place and leaves the module in evaluation mode; when an error is raised, its tables are untouched. A table
    that is looked up at several places, or that is the weight of an output layer as well, stays one table.

    Args:
        module: a model, or an ``nn.Embedding`` alone.
        dtype: format of the rows: ``int4``, ``int8`` or ``fp8``.
        config: which tables and ranges; default `QuantizeConfig()`.
        frequencies: by module name, ``[rows]`` counts of accesses (`count_accesses`): they weight the report and, with
            ``ranges=search``, say which rows are worth the search.
        evaluate: metrics of a model, computed before and after; called in evaluation mode.

    Returns:
        the module (its replacement when it was a table itself) and the report.

    Raises:
        ValueError: no table matches, a table cannot be held in ``dtype``, a table is shared with something that cannot
            read quantised rows, or frequencies fit no table.
    """
    row_format, config = RowFormat.parse(dtype), config or QuantizeConfig()
    known = dict(frequencies or {})
    groups, kept = _find(module, config)
    check_frequencies(known, {name: group.weight.shape[0] for group in groups for name in group.names})
    module.eval()
    before = dict(evaluate(module)) if evaluate else {}
    replacements: dict[int, nn.Module] = {}
    reports: list[TableReport] = []
    with torch.no_grad():
        for group in groups:
            counts = next((known[name] for name in group.names if name in known), None)
            packed = pack_table(group.names[0], group.weight, row_format, config, searched_rows(config, counts))
            reports.append(table_report(group.names[0], group.weight, packed, ranges=config.ranges, frequency=counts))
            replacements |= group.replacements(packed)
    module = replace_modules(module, replacements)
    after = dict(evaluate(module)) if evaluate else {}
    report = QuantizationReport(tables=tuple(reports), kept=kept, metrics_before=before, metrics_after=after)
    return Quantized(module, report)


@contextmanager
def count_accesses(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Count which rows are looked up while batches run through ``module`` inside the ``with`` block.

    Yields:
        counts ``[rows]`` int64 on the CPU by module name, for ``quantize(frequencies=...)``.
    """
    tables = {name: table for name, table in module.named_modules() if isinstance(table, nn.Embedding)}
    counts = {name: torch.zeros(table.num_embeddings, dtype=torch.int64) for name, table in tables.items()}

    def counter(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor]], None]:
        def count(_: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            ids = arguments[0] if arguments else named["input"]
            counts[name] += torch.bincount(ids.reshape(-1).cpu(), minlength=counts[name].numel())

        return count

    handles = [table.register_forward_pre_hook(counter(name), with_kwargs=True) for name, table in tables.items()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, slots=True)
class TableGroup:
    """Modules that share one weight: lookups, and output layers tied to it."""

    names: tuple[str, ...]
    weight: Tensor
    lookups: tuple[nn.Embedding, ...]
    outputs: tuple[nn.Linear, ...]

    def replacements(self, packed: PackedRows) -> dict[int, nn.Module]:
        """By identity of the old module, its quantised stand-in."""
        first = self.lookups[0]
        table = QuantizedEmbedding(packed, dtype=self.weight.dtype, padding_idx=first.padding_idx)
        found: dict[int, nn.Module] = {id(lookup): table for lookup in self.lookups}
        return found | {id(output): QuantizedLinear(table, output.bias) for output in self.outputs}


def table_groups(module: nn.Module, names: Mapping[str, object]) -> list[TableGroup]:
    """The embedding tables called ``names``, each with all that shares its weight.

    Raises:
        ValueError: something other than a lookup or a linear output layer owns the weight as well.
    """
    every = dict(module.named_modules())
    tables = [found for name, found in every.items() if name in names and isinstance(found, nn.Embedding)]
    weights = {id(table.weight): table.weight for table in tables}
    groups = []
    for identity, weight in weights.items():
        owners = {
            name: owner
            for name, owner in every.items()
            if any(id(parameter) == identity for parameter in owner.parameters(recurse=False))
        }
        for name, owner in owners.items():
            if not isinstance(owner, nn.Embedding | nn.Linear):
                raise ValueError(
                    f"module: expected the table {min(owners)!r} to be used by embeddings and linear layers alone, but "
                    f"{name!r}, a {type(owner).__name__}, holds it as well and cannot read quantised rows; leave it "
                    "out with skip"
                )
        lookups = tuple(owner for owner in owners.values() if isinstance(owner, nn.Embedding))
        tied = tuple(owner for owner in owners.values() if isinstance(owner, nn.Linear))
        ordered = tuple(name for name, owner in owners.items() if isinstance(owner, nn.Embedding))
        groups.append(TableGroup(ordered, weight, lookups, tied))
    return groups


def replace_modules(module: nn.Module, replacements: Mapping[int, nn.Module]) -> nn.Module:
    """Put the stand-ins in place wherever the old modules are held, and return the module or its own stand-in."""
    if id(module) in replacements:
        return replacements[id(module)]
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replacements:
                parent._modules[name] = replacements[id(child)]
    return module


def why_not(name: str, config: QuantizeConfig) -> str | None:
    """Why the patterns leave a table of this name alone; ``None`` when they choose it."""
    if any(fnmatchcase(name, pattern) for pattern in config.skip):
        return f"skip: {', '.join(config.skip)}"
    if not any(fnmatchcase(name, pattern) for pattern in config.tables):
        return f"not among tables: {', '.join(config.tables)}"
    return None


def _find(module: nn.Module, config: QuantizeConfig) -> tuple[list[TableGroup], dict[str, str]]:
    chosen: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    for name, found in module.named_modules():
        if isinstance(found, nn.EmbeddingBag):
            kept[name] = "pooled lookups are not served"
        elif not isinstance(found, nn.Embedding):
            continue
        elif type(found).forward is not nn.Embedding.forward:
            kept[name] = f"{type(found).__name__} has a lookup of its own"
        elif reason := why_not(name, config):
            kept[name] = reason
        elif found.max_norm is not None:
            raise ValueError(
                f"module: expected embeddings without max_norm, got {name!r} with {found.max_norm}; its lookups would "
                "change the table. Apply the norm to the weight first, or leave the table out with skip"
            )
        else:
            chosen[name] = found
    if not chosen:
        there = "; ".join(f"{name!r} ({reason})" for name, reason in kept.items()) or "no embedding at all"
        raise ValueError(f"module: expected an embedding table that matches tables and not skip, found {there}")
    return table_groups(module, chosen), kept


def check_frequencies(frequencies: Mapping[str, Tensor], rows: Mapping[str, int]) -> None:
    """Refuse counts that do not fit tables of so many rows.

    Raises:
        ValueError: of another shape, negative, or for none of the tables.
    """
    for name, counts in frequencies.items():
        if name in rows and (counts.shape != (rows[name],) or bool((counts < 0).any())):
            raise ValueError(
                f"frequencies[{name!r}]: expected {rows[name]} counts >= 0, one for each row, got {tuple(counts.shape)}"
            )
    if frequencies and not rows.keys() & frequencies.keys():
        raise ValueError(
            f"frequencies: expected counts for one of {', '.join(rows)}, got them for {', '.join(frequencies)}"
        )


def searched_rows(config: QuantizeConfig, counts: Tensor | None) -> Tensor | None:
    """Which rows of a table are worth the search, ``[rows]`` bool; ``None`` where all are treated alike."""
    if config.ranges is not RowRange.SEARCH or counts is None or config.search_coverage == 1:
        return None
    chosen = torch.zeros(counts.shape[0], dtype=torch.bool, device=counts.device)
    chosen[_most_used(counts, config.search_coverage)] = True
    return chosen


def pack_table(
    name: str, weight: Tensor, row_format: RowFormat, config: QuantizeConfig, searched: Tensor | None = None
) -> PackedRows:
    """The packed rows of a table, or of a part of it, their ranges as the configuration wants them.

    Args:
        searched: of these rows (`searched_rows`); the others take plain ranges.

    Raises:
        ValueError: names the table and the rows that cannot be held.
    """
    try:
        packed = pack_rows(weight, row_format, ranges=config.ranges if searched is None else RowRange.MIN_MAX)
        if searched is not None:
            used = searched.to(weight.device)
            packed.data[used] = pack_rows(weight[used], row_format, ranges=config.ranges).data
    except ValueError as error:
        raise ValueError(f"table {name!r}: {error}") from error
    return packed


def _most_used(counts: Tensor, coverage: float) -> Tensor:
    """The fewest rows that together have this share of the accesses."""
    ordered, rows = counts.double().sort(descending=True)
    share = ordered.cumsum(0) / ordered.sum().clamp(min=1)
    needed = int((share < coverage).sum()) + 1
    return rows[:needed][ordered[:needed] > 0]
