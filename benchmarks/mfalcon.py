"""``python -m benchmarks.mfalcon``: M-FALCON against naive scoring and against one full forward pass.

    run     measure and record
    chart   candidates per second from the recorded rows, as PNG

Ways to score the candidates of one request: ``naive`` encodes the history again for every micro-batch; ``full`` is one
forward pass over history and all candidates; ``mfalcon`` encodes the history once and scores micro-batches against it,
and ``mfalcon-graphs`` does the latter by CUDA graphs. ``prefill`` is the encoding alone. The others find the history
encoded: ``cached`` by the backend's launches, ``cached-eager`` in plain PyTorch, ``graphs`` by CUDA graphs. Where a way
does not give the scores of ``full`` within the tolerance, nothing is recorded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks.ledger import RESULTS, LedgerError, append, read
from benchmarks.machine import provenance
from benchmarks.timing import synchronize
from hstu_kernels import AttentionMask, Backend, JaggedLayout
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.flops import decode_flops, prefill_flops, scoring_flops
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.ranking_config import RankingConfig, TaskConfig
from hstu_plugin.ranking_embedding import with_targets
from hstu_plugin.sequence import JaggedSequence

LEDGER = RESULTS / "mfalcon.csv"
WAYS = ("naive", "full", "prefill", "mfalcon", "mfalcon-graphs", "cached-eager", "cached", "graphs")
_CACHED, _RECORDED = ("cached-eager", "cached", "graphs"), ("mfalcon-graphs", "graphs")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
# Largest difference of scores, relative to the largest score; sums of half precision differ in their order.
TOLERANCE = {"bfloat16": 0.05, "float32": 1e-3, "float64": 1e-10}
_PROVENANCE = ("taken_at", "commit", "device", "torch", "triton", "python", "cuda")
_MODEL = ("model", "layers", "dim", "heads", "dtype", "backend")
_CASE = ("history", "candidates", "micro_batch_size", "way", "transfers")
_MEASURED = ("p50_ms", "p99_ms", "samples", "candidates_per_s", "gflops", "relative_error")
COLUMNS = (*_PROVENANCE, *_MODEL, *_CASE, *_MEASURED)
_EPOCH = 1_700_000_000
_FEWEST = 11


@dataclass(frozen=True, slots=True)
class Request:
    """One user's history and candidates, on the host (pinned beside a GPU) and on the device."""

    host: tuple[Tensor, Tensor]
    history: JaggedSequence
    candidates: JaggedSequence

    def moved(self, *, with_history: bool) -> Request:
        """The same after a copy of the token vectors from the host; a cached history does not travel."""
        device, history = self.history.values.device, self.history
        if with_history:
            history = history.with_values(self.host[0].to(device, non_blocking=True))
        candidates = self.candidates.with_values(self.host[1].to(device, non_blocking=True))
        return Request(self.host, history, candidates)


Way = Callable[[Request], Tensor]


@click.group(help=__doc__, context_settings={"max_content_width": 110})
def main() -> None:
    pass


@main.command()
@click.option("--model", type=click.Choice(["hstu", "ultra"]), default="hstu", show_default=True)
@click.option("--history", "histories", multiple=True, type=int, default=(1024, 4096, 16384), show_default=True)
@click.option("--candidates", "counts", multiple=True, type=int, default=(256, 1024, 16384), show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice(WAYS), help="Default: all that run here.")
@click.option("--micro-batch-size", default=1024, show_default=True, help="Of the naive way; others choose theirs.")
@click.option("--layers", default=8, show_default=True)
@click.option("--dim", default=512, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option("--backend", default="auto", show_default=True)
@click.option("--device", default=None, help="Default: cuda where there is one, else cpu.")
@click.option("--seconds", default=2.0, show_default=True, help="Aim for each measurement.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=LEDGER, show_default=True)
@click.option("--commit", help="To record. Default: that of this checkout.")
def run(
    model: str,
    histories: tuple[int, ...],
    counts: tuple[int, ...],
    ways: tuple[str, ...],
    micro_batch_size: int,
    layers: int,
    dim: int,
    heads: int,
    dtype: str,
    backend: str,
    device: str | None,
    seconds: float,
    output: Path,
    commit: str | None,
) -> None:
    """Measure and record."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config = make_config(model, layers, dim, heads, max(histories), backend)
    torch.manual_seed(0)
    ranking = RankingConfig(tasks=(TaskConfig(name="click"), TaskConfig(name="share")))
    ranker = HSTURanker(config, ranking).to(place, DTYPES[dtype]).eval()
    about = provenance(place, commit) | {
        "model": model, "layers": layers, "dim": dim, "heads": heads, "dtype": dtype, "backend": backend
    }  # fmt: skip
    chosen = ways or tuple(way for way in WAYS if way not in _RECORDED or place.type == "cuda")
    for length in histories:
        for count in counts:
            request = make_request(length, count, dim, DTYPES[dtype], place)
            made, sizes = make_ways(ranker, request, micro_batch_size, chosen)
            errors = check(made, ranker, request, TOLERANCE[dtype])
            rows = []
            for name, way in made.items():
                for transfers in (False, True):
                    row = about | {
                        "history": length,
                        "candidates": count,
                        "micro_batch_size": sizes[name],
                        "way": name,
                        "transfers": transfers,
                        "gflops": gigaflops(config, name, length, count, micro_batch_size),
                        "relative_error": errors.get(name),
                        **measure(name, way, request, place, transfers=transfers, seconds=seconds),
                    }
                    rows.append(row)
                    click.echo(
                        f"{length:6} history {count:6} candidates {name:14}{' +transfers' if transfers else '':11} "
                        f"p50 {row['p50_ms']:9.3f} ms  p99 {row['p99_ms']:9.3f} ms  {row['samples']:4} samples"
                    )
            # One case at a time, so that a run that is cut off keeps what it has.
            append(output, COLUMNS, rows)


def make_config(model: str, layers: int, dim: int, heads: int, longest: int, backend: str) -> HSTUConfig:
    """HSTU with full attention and bias, or ULTRA-HSTU: semi-local, truncated behind a third of the layers."""
    shape = {"num_layers": layers, "embedding_dim": dim, "num_heads": heads, "max_seq_len": longest}
    if model == "hstu":
        return HSTUConfig(**shape, dropout=0.0, backend=backend)  # type: ignore[arg-type]
    first = max(1, layers // 3)
    truncation = {"truncate_after_layers": first, "truncate_to": max(1, longest // 16)} if layers > 1 else {}
    mask = AttentionMask(max_attn_len=256, full_attn_tail_len=256)
    return HSTUConfig(**shape, **truncation, dropout=0.0, backend=backend, variant=Variant.ULTRA, mask=mask)  # type: ignore[arg-type]


def make_request(length: int, count: int, dim: int, dtype: torch.dtype, device: torch.device) -> Request:
    """Random token vectors, one event a minute, all candidates asked about at one time."""
    pin = device.type == "cuda"
    host = [torch.randn(rows, dim).to(dtype) for rows in (length, count)]
    host = [part.pin_memory() for part in host] if pin else host
    times = _EPOCH + 60 * torch.arange(length, device=device)
    asked = torch.full((count,), _EPOCH + 60 * length + 3600, device=device)
    layouts = [JaggedLayout.from_lengths(torch.tensor([rows], device=device)) for rows in (length, count)]
    return Request(
        (host[0], host[1]),
        JaggedSequence(host[0].to(device), layouts[0], times),
        JaggedSequence(host[1].to(device), layouts[1], asked),
    )


def make_ways(
    ranker: HSTURanker, request: Request, size: int, names: tuple[str, ...]
) -> tuple[dict[str, Way], dict[str, int]]:
    """The chosen ways, and candidates of their micro-batches; where a cache is asked for, it is filled here."""
    scorers = {"mfalcon": MFalconRanker(ranker)}
    if set(names) & set(_RECORDED):
        scorers["graphs"] = MFalconRanker(ranker, cuda_graphs=True)
    if "cached-eager" in names:
        plain = HSTURanker(replace(ranker.config, backend=Backend.EAGER), ranker.ranking)
        plain.to(request.history.values).load_state_dict(ranker.state_dict())
        scorers["cached-eager"] = MFalconRanker(plain.eval())
    count = request.candidates.values.shape[0]

    def full(asked: Request) -> Tensor:
        scores: Tensor = ranker(with_targets(asked.history, asked.candidates))
        return scores

    def naive(asked: Request) -> Tensor:
        return torch.cat([full(_part(asked, begin, min(begin + size, count))) for begin in range(0, count, size)])

    def prefill(asked: Request) -> Tensor:
        encoded: Tensor = ranker.prefill(asked.history)[-1].k[:0]
        return encoded

    def cached(scorer: MFalconRanker) -> Way:
        cache = scorer.new_cache()
        scorer.prefill(cache, [0], request.history)
        return lambda asked: scorer.score_cached(cache, [0], asked.candidates)

    made: dict[str, Way] = {}
    sizes = {}
    for name in names:
        scorer = scorers["graphs" if name in _RECORDED else name if name in scorers else "mfalcon"]
        sizes[name] = {"naive": size, "full": count, "prefill": 0}.get(name, scorer.micro_batch_size)
        if name in _CACHED:
            made[name] = cached(scorer)
        elif name in ("mfalcon", "mfalcon-graphs"):
            made[name] = lambda asked, scorer=scorer: scorer.score(asked.history, asked.candidates)  # type: ignore[misc]
        else:
            made[name] = {"naive": naive, "full": full, "prefill": prefill}[name]
    return made, sizes


def check(ways: dict[str, Way], ranker: HSTURanker, request: Request, tolerance: float) -> dict[str, float]:
    """Largest difference from the full forward, relative to the largest score.

    Raises:
        click.ClickException: one is above the tolerance.
    """
    errors = {}
    with torch.no_grad():
        truth = ranker(with_targets(request.history, request.candidates)).double()
        for name, way in ways.items():
            if name == "prefill":
                continue
            errors[name] = float((way(request).double() - truth).abs().max() / truth.abs().max())
            # Written so that NaN fails.
            if not errors[name] <= tolerance:
                raise click.ClickException(f"{name}: scores are off by {errors[name]:.3g}; nothing is recorded")
    return errors


@torch.no_grad()
def measure(
    name: str, way: Way, request: Request, device: torch.device, *, transfers: bool, seconds: float
) -> dict[str, float | int]:
    """Latencies of single requests, one after another; with ``transfers`` from host memory to scores on the host."""

    def once() -> float:
        begin = time.perf_counter()
        scores = way(request.moved(with_history=name not in _CACHED) if transfers else request)
        if transfers:
            scores = scores.cpu()
        synchronize(device)
        return (time.perf_counter() - begin) * 1e3

    once()
    estimate = once()
    samples = int(min(max(seconds * 1e3 / max(estimate, 1e-3), _FEWEST), 500))
    times = [once() for _ in range(samples)]
    percentiles = statistics.quantiles(times, n=100, method="inclusive")
    count = request.candidates.values.shape[0]
    return {
        "p50_ms": percentiles[49],
        "p99_ms": percentiles[98],
        "samples": samples,
        "candidates_per_s": count / percentiles[49] * 1e3,
    }


def gigaflops(config: HSTUConfig, way: str, length: int, count: int, size: int) -> float:
    """Operations of one request in the encoder, by exact visible pairs."""
    history, candidates = torch.tensor([length]), torch.tensor([count])
    if way in _CACHED:
        flops = decode_flops(config, history, candidates)
    elif way == "prefill":
        flops = prefill_flops(config, history)
    else:
        flops = scoring_flops(config, history, candidates, micro_batch_size=size if way == "naive" else None)
    return float(flops.total.sum()) / 1e9


@main.command()
@click.option("--input", "source", type=click.Path(path_type=Path, dir_okay=False), default=LEDGER, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=RESULTS / "mfalcon.png")
@click.option("--model", default="hstu", show_default=True)
@click.option("--transfers/--no-transfers", default=False, show_default=True)
def chart(source: Path, output: Path, model: str, transfers: bool) -> None:
    """Candidates per second over the number of candidates, a panel for each history length."""
    try:
        rows = [r for r in read(source, COLUMNS) if r["model"] == model and r["transfers"] == str(transfers)]
    except LedgerError as error:
        raise click.ClickException(str(error)) from None
    if not rows:
        raise click.ClickException(f"{source}: no rows of model {model} with transfers={transfers}")
    draw(rows, output)
    click.echo(output)


def draw(rows: list[dict[str, str]], output: Path) -> None:
    """The newest row of each way and case counts."""
    from matplotlib.figure import Figure

    newest = {(int(r["history"]), r["way"], int(r["candidates"])): r for r in rows}
    lengths = sorted({key[0] for key in newest})
    figure = Figure(figsize=(3.6 * len(lengths) + 1.4, 3.4), layout="constrained")
    panels = figure.subplots(1, len(lengths), sharey=True, squeeze=False)[0]
    for panel, length in zip(panels, lengths, strict=True):
        for way in (way for way in WAYS if way != "prefill"):
            found = ((n, r) for (h, w, n), r in newest.items() if (h, w) == (length, way))
            points = sorted((n, float(r["candidates_per_s"])) for n, r in found)
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", label=way)
        panel.set(xscale="log", yscale="log", title=f"history {length}", xlabel="candidates of a request")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("candidates per second")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper")
    figure.suptitle(f"{rows[-1]['device']}, {rows[-1]['layers']} layers, d {rows[-1]['dim']}, {rows[-1]['dtype']}")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def _part(asked: Request, begin: int, end: int) -> Request:
    whole = asked.candidates
    layout = JaggedLayout(torch.tensor([0, end - begin], device=whole.values.device), end - begin)
    times = None if whole.timestamps is None else whole.timestamps[begin:end]
    return Request(asked.host, asked.history, JaggedSequence(whole.values[begin:end], layout, times))


if __name__ == "__main__":
    main()
