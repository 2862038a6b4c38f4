"""``python -m benchmarks.cost``: what a training step and a request cost, HSTU against ULTRA-HSTU on long histories.

    run      check, measure and record
    report   the tables, as Markdown, and a chart

A step is forward, binary cross entropy of the candidates behind each history, backward and AdamW, in bfloat16
throughout. A request is one forward pass over a history and its candidates, of which several run at once so that the
GPU and not the host is measured; all figures are for one history. Inputs are token vectors: no embedding tables.

Operations are those that the model asks for (`hstu_plugin.flops`). ``tokens`` is how many rows an event takes: HSTU's
interleaved items and actions take two, ULTRA-HSTU's summed tokens one.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cost_report import COLUMNS, LEDGER, render
from benchmarks.ledger import RESULTS, LedgerError, append, read
from benchmarks.machine import provenance
from benchmarks.timing import synchronize
from hstu_kernels import AttentionMask, JaggedLayout
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.flops import model_flops, training_flops
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.ranking_config import RankingConfig, TaskConfig
from hstu_plugin.sequence import JaggedSequence

MODELS = ("hstu", "hstu-no-bias", "semi-local", "ultra")
PHASES = ("training", "scoring")
_EPOCH = 1_700_000_000
# Of the reduced case that is checked: rows, candidates, and largest difference of scores relative to the largest.
_CHECKED, _TOLERANCE = (1024, 64), 0.05


@click.group(help=__doc__, context_settings={"max_content_width": 110})
def main() -> None:
    pass


@main.command()
@click.option("--model", "models", multiple=True, type=click.Choice(MODELS), default=MODELS, show_default=True)
@click.option("--phase", "phases", multiple=True, type=click.Choice(PHASES), default=PHASES, show_default=True)
@click.option("--events", default=16384, show_default=True, help="Of a history.")
@click.option("--candidates", default=1024, show_default=True, help="Of a request.")
@click.option("--targets", default=64, show_default=True, help="Candidates behind a history in training.")
@click.option("--layers", default=18, show_default=True)
@click.option("--dim", default=512, show_default=True)
@click.option("--heads", default=4, show_default=True)
@click.option("--window", default=256, show_default=True, help="Local window and full tail, of ULTRA-HSTU.")
@click.option("--truncate-after", default=3, show_default=True, help="Layers over the whole history, of ULTRA-HSTU.")
@click.option("--truncate-to", default=512, show_default=True, help="Events that later layers see, of ULTRA-HSTU.")
@click.option("--batch-size", default=4, show_default=True, help="Histories of a training step.")
@click.option("--requests", default=8, show_default=True, help="Histories of a scoring pass.")
@click.option("--backend", default="triton", show_default=True)
@click.option("--device", default=None, help="Default: cuda where there is one, else cpu.")
@click.option("--seconds", default=0.5, show_default=True, help="Aim for each measurement.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), default=LEDGER, show_default=True)
@click.option("--check-only", is_flag=True, help="Compile and check, on short histories; measure nothing.")
@click.option("--commit", help="To record. Default: that of this checkout.")
def run(
    models: tuple[str, ...],
    phases: tuple[str, ...],
    events: int,
    candidates: int,
    targets: int,
    layers: int,
    dim: int,
    heads: int,
    window: int,
    truncate_after: int,
    truncate_to: int,
    batch_size: int,
    requests: int,
    backend: str,
    device: str | None,
    seconds: float,
    output: Path,
    check_only: bool,
    commit: str | None,
) -> None:
    """Check, measure and record. A model whose scores are wrong ends the run."""
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    about = provenance(place, commit)

    def config(model: str, rows: int, backend: str) -> HSTUConfig:
        return make_config(
            model,
            rows,
            layers=layers,
            dim=dim,
            heads=heads,
            window=window,
            truncation=(truncate_after, truncate_to),
            backend=backend,
        )

    cases = [(model, tokens) for model in models for tokens in ((1, 2) if model.startswith("hstu") else (1,))]
    for model, tokens in cases:
        rows = events * tokens
        error = check(config(model, rows, backend), config(model, rows, "eager"), place)
        # Written so that NaN fails.
        if not error <= _TOLERANCE:
            raise click.ClickException(f"{model}: scores are off by {error:.3g}; nothing is recorded")
        click.echo(f"PASS {model:13} {tokens} a event: scores differ from float64 by {error:.3g} of the largest")
    for model, tokens in () if check_only else cases:
        rows = events * tokens
        chosen = config(model, rows, backend)
        ranker = make_ranker(chosen).to(place, torch.bfloat16)
        for phase in phases:
            training = phase == "training"
            count, behind = (batch_size, targets) if training else (requests, candidates)
            seq = make_batch(count, rows, behind, dim, torch.bfloat16, place)
            work = training_step(ranker, seq) if training else scoring_pass(ranker, seq)
            if place.type == "cuda":
                torch.cuda.reset_peak_memory_stats(place)
            taken = measure(work, place, seconds)
            flops = (training_flops if training else model_flops)(chosen, seq.layout)
            row = about | {
                "model": model,
                "tokens": tokens,
                "phase": phase,
                "events": events,
                "candidates": behind,
                "layers": layers,
                "dim": dim,
                "heads": heads,
                "window": chosen.mask.max_attn_len,
                "tail": chosen.mask.full_attn_tail_len,
                "truncate_after": chosen.truncate_after_layers,
                "truncate_to": chosen.truncate_to,
                "dtype": "bfloat16",
                "backend": backend,
                "histories": count,
                "gflops": float(flops.total.sum()) / count / 1e9,
                "gflops_linear": float(flops.linear.sum()) / count / 1e9,
                "ms": statistics.median(taken) / count,
                "ms_least": min(taken) / count,
                "ms_most": max(taken) / count,
                "samples": len(taken),
                "peak_gib": torch.cuda.max_memory_allocated(place) / 2**30 if place.type == "cuda" else None,
            }
            # One at a time, so that a run that is cut off keeps what it has.
            append(output, COLUMNS, [row])
            click.echo(
                f"{model:13} {tokens} a event {phase:8} {row['gflops']:9.0f} GFLOP {row['ms']:9.3f} ms a history, "
                f"{row['samples']} samples, peak {row['peak_gib'] or 0:.1f} GiB"
            )
            del seq, work
        del ranker


def make_config(
    model: str,
    rows: int,
    *,
    layers: int,
    dim: int,
    heads: int,
    window: int,
    truncation: tuple[int, int],
    backend: str,
) -> HSTUConfig:
    """``hstu``: full attention with position and time bias, and without; ``semi-local``; ``ultra``: truncated, too."""
    shape = {"num_layers": layers, "embedding_dim": dim, "num_heads": heads, "max_seq_len": rows}
    shape |= {"dropout": 0.0, "backend": backend}
    if model == "hstu":
        return HSTUConfig(**shape)  # type: ignore[arg-type]
    if model == "hstu-no-bias":
        return HSTUConfig(**shape, variant=Variant.ULTRA)  # type: ignore[arg-type]
    after, kept = truncation if model == "ultra" else (0, 0)
    mask = AttentionMask(max_attn_len=window, full_attn_tail_len=window)
    return HSTUConfig(
        **shape,
        variant=Variant.ULTRA,
        mask=mask,
        truncate_after_layers=after,
        truncate_to=kept,  # type: ignore[arg-type]
    )


def make_ranker(config: HSTUConfig) -> HSTURanker:
    """With the same weights whenever the shape is the same."""
    torch.manual_seed(0)
    return HSTURanker(config, RankingConfig(tasks=(TaskConfig(name="click"),)))


def make_batch(
    count: int, rows: int, behind: int, dim: int, dtype: torch.dtype, device: torch.device
) -> JaggedSequence:
    """``count`` histories of ``rows`` random token vectors, a minute apart, and candidates an hour later."""
    length = rows + behind
    times = torch.full((length,), _EPOCH + 60 * rows + 3600)
    times[:rows] = _EPOCH + 60 * torch.arange(rows)
    layout = JaggedLayout.from_lengths(
        torch.full((count,), length, device=device),
        max_seq_len=length,
        num_targets=torch.full((count,), behind, device=device),
    )
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(count * length, dim, generator=generator).to(device, dtype)
    return JaggedSequence(values, layout, times.repeat(count).to(device))


def check(config: HSTUConfig, plain: HSTUConfig, device: torch.device) -> float:
    """Largest difference of bfloat16 scores from those of PyTorch's operators in float64, relative to the largest.

    On short histories, but for the model of long ones, so that all kernels of a step are compiled here.
    """
    seq = make_batch(2, *_CHECKED, config.embedding_dim, torch.float64, device)
    half = make_ranker(config).to(device, torch.bfloat16).eval()
    # The same rounded weights and inputs.
    exact = make_ranker(plain).to(device, torch.float64).eval()
    exact.load_state_dict({name: tensor.double() for name, tensor in half.state_dict().items()})
    low = seq.with_values(seq.values.to(torch.bfloat16))
    with torch.no_grad():
        truth = exact(low.with_values(low.values.double()))
        error = float((half(low).double() - truth).abs().max() / truth.abs().max())
    training_step(half, low)()
    return error if all(bool(p.isfinite().all()) for p in half.parameters()) else float("nan")


def training_step(ranker: HSTURanker, seq: JaggedSequence) -> Callable[[], object]:
    """A step on one batch; the token vectors get gradients, too, as embedding tables would need them."""
    ranker.train()
    optimizer = torch.optim.AdamW(ranker.parameters(), lr=1e-4, fused=seq.values.is_cuda)
    values = seq.values.requires_grad_()
    assert seq.layout.num_targets is not None
    total = int(seq.layout.num_targets.sum())
    labels = torch.randint(0, 2, (total, 1), generator=torch.Generator().manual_seed(2)).to(values)

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        values.grad = None
        loss = F.binary_cross_entropy_with_logits(ranker(seq), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss

    return step


def scoring_pass(ranker: HSTURanker, seq: JaggedSequence) -> Callable[[], object]:
    """One pass over histories and candidates."""
    ranker.eval()

    @torch.no_grad()
    def score() -> Tensor:
        scores: Tensor = ranker(seq)
        return scores

    return score


def measure(work: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Milliseconds of single runs, behind two that warm up; three at least."""

    def once() -> float:
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        return (time.perf_counter() - begin) * 1e3

    once()
    estimate = once()
    return [once() for _ in range(round(min(max(seconds * 1e3 / estimate, 3), 50)))]


@main.command()
@click.option("--input", "source", type=click.Path(path_type=Path, dir_okay=False), default=LEDGER, show_default=True)
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default=RESULTS, show_default=True)
def report(source: Path, output: Path) -> None:
    """``cost.md`` and ``cost.png`` from the newest row of each case."""
    try:
        rows = read(source, COLUMNS)
    except LedgerError as error:
        raise click.ClickException(str(error)) from None
    for path in render(rows, output):
        click.echo(path)


if __name__ == "__main__":
    main()
