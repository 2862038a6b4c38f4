"""The padded scoring path: equal to the jagged model, exported, reloaded in a fresh process, compiled ahead of time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hstu_kernels import AttentionMask
from hstu_plugin.adapters.torchrec.export import (
    PaddedMixtureScorer,
    PaddedRankingScorer,
    PaddedRetrievalScorer,
    export_scorer,
)
from hstu_plugin.config import RetrievalConfig, Variant
from hstu_plugin.losses import normalise
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.ranking_tokens import with_targets
from hstu_plugin.retrieval import HSTURetrieval
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.mixture import MixtureConfig, MixtureRanker

from .cases import NOW, TASKS, config, unit_tables

LENGTHS = (3, 0, 7, 12, 1)
WIDTH, ASKED = 12, 4


def core(dtype: torch.dtype = torch.float64, **changes: object) -> HSTURetrieval:
    torch.manual_seed(1)
    model = HSTURetrieval(config(**changes), RetrievalConfig()).to(dtype).eval()
    unit_tables(model.encoder)
    return model


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(2)
    history = torch.randn(len(LENGTHS), WIDTH, 8, generator=draw, dtype=dtype)
    candidates = torch.randn(len(LENGTHS), ASKED, 8, generator=draw, dtype=dtype)
    times = NOW + torch.randint(1, 300, (len(LENGTHS), WIDTH), generator=draw).cumsum(1)
    return history, torch.tensor(LENGTHS), candidates, times, times[:, -1] + 999


def jagged_scores(model: HSTURetrieval, given: tuple[torch.Tensor, ...]) -> torch.Tensor:
    history, lengths, candidates, times, asked_at = given
    seq = JaggedSequence.from_padded(history, lengths, times)
    users = model(seq, asked_at)
    return torch.einsum("bd,bmd->bm", users, normalise(candidates, "l2")) / model.retrieval.temperature


@pytest.mark.parametrize("variant", list(Variant))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"row_time": "event"},
        {"time_bias": False, "position_embedding": False},
        {"mask": AttentionMask(max_attn_len=2, full_attn_tail_len=2)},
    ],
    ids=["default", "event-time", "plain", "semi-local"],
)
def test_padded_scores_are_the_jagged_models(variant: Variant, changes: dict[str, object]) -> None:
    model, given = core(variant=variant, **changes), inputs()
    torch.testing.assert_close(
        PaddedRetrievalScorer(model)(*given), jagged_scores(model, given), rtol=1e-10, atol=1e-10
    )


def test_what_lies_behind_the_lengths_does_not_matter() -> None:
    scorer, given = PaddedRetrievalScorer(core()), inputs()
    padded = torch.arange(WIDTH)[None, :] >= given[1][:, None]
    moved = (given[0].masked_fill(padded[..., None], 9.0), *given[1:3], given[3].masked_fill(padded, 0), given[4])
    torch.testing.assert_close(scorer(*moved), scorer(*given), rtol=0, atol=0)


def ranker(dtype: torch.dtype = torch.float64, **changes: object) -> HSTURanker:
    torch.manual_seed(1)
    model = HSTURanker(config(**changes), TASKS).to(dtype).eval()
    unit_tables(model.encoder)
    return model


def ranking_inputs(contextual: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    history, lengths, candidates, times, _ = inputs(dtype)
    lengths = lengths.clamp(min=contextual)
    times = times.clone()
    times[:, :contextual] = 0
    asked_at = times.amax(1, keepdim=True) + 50 * torch.arange(ASKED)
    return history, lengths, candidates, times, asked_at


@pytest.mark.parametrize("contextual", [0, 2])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"row_time": "event", "variant": "production"},
        {"variant": "ultra", "mask": AttentionMask(max_attn_len=2, full_attn_tail_len=2, global_prefix_len=1)},
        {"mask": AttentionMask(max_attn_len=2, window_targets=True)},
        {"num_layers": 3, "truncate_after_layers": 2, "truncate_to": 3},
        {"num_layers": 2, "truncate_after_layers": 1, "truncate_to": 40, "mask": AttentionMask(max_attn_len=2)},
    ],
    ids=["default", "production", "semi-local", "windowed-targets", "truncated", "truncated-to-all"],
)
def test_padded_ranking_scores_are_the_jagged_models(contextual: int, changes: dict[str, object]) -> None:
    model, given = ranker(**changes), ranking_inputs(contextual)
    history, lengths, candidates, times, asked_at = given
    before = JaggedSequence.from_padded(history, lengths, times)
    before = replace(before, layout=replace(before.layout, contextual_seq_len=contextual))
    behind = JaggedSequence.from_padded(candidates, torch.full_like(lengths, ASKED), asked_at)
    wanted = model(with_targets(before, behind)).view(len(LENGTHS), ASKED, -1)
    scorer = PaddedRankingScorer(model, contextual=contextual)
    torch.testing.assert_close(scorer(*given), wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scorer(*(x[:1] for x in given)), wanted[:1], rtol=1e-10, atol=1e-10)
    assert wanted.std() > 0.01


def test_a_head_that_reads_the_user_is_exported_with_its_context() -> None:
    torch.manual_seed(0)
    model = HSTURanker(config(), TASKS, context_width=6).eval()
    given = ranking_inputs(0, torch.float32)
    history, lengths, candidates, times, asked_at = given
    context = torch.randn(len(LENGTHS), 6)
    before = JaggedSequence.from_padded(history, lengths, times)
    behind = JaggedSequence.from_padded(candidates, torch.full_like(lengths, ASKED), asked_at)
    wanted = model(with_targets(before, behind), context).view(len(LENGTHS), ASKED, -1)
    scorer = PaddedRankingScorer(model)
    program = export_scorer(scorer, history_len=WIDTH, num_candidates=ASKED)
    for call in (scorer, program.module()):
        torch.testing.assert_close(call(*given, context), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"context: expected \[B, 6\], got None"):
        scorer(*given)


@pytest.mark.parametrize("keep", [1, 4, 40])
def test_truncated_models_are_padded_too(keep: int) -> None:
    changes = {"num_layers": 3, "truncate_after_layers": 1, "truncate_to": keep}
    model, given = core(**changes), inputs()
    torch.testing.assert_close(
        PaddedRetrievalScorer(model)(*given), jagged_scores(model, given), rtol=1e-10, atol=1e-10
    )
    program = export_scorer(PaddedRetrievalScorer(model), history_len=WIDTH, num_candidates=ASKED)
    torch.testing.assert_close(program.module()(*given), jagged_scores(model, given), rtol=1e-10, atol=1e-10)


CHANNELS = {
    "all": {"num_layers": 2, "truncate_after_layers": 1, "truncate_to": 3, "variant": "ultra"},
    "liked": {"num_layers": 1, "time_bias": False},
}


@pytest.mark.parametrize("contextual", [0, 2])
def test_a_mixture_is_exported_with_all_its_channels(contextual: int) -> None:
    torch.manual_seed(1)
    channels = {name: config(**changes) for name, changes in CHANNELS.items()}
    model = MixtureRanker(MixtureConfig(channels=channels), TASKS).double().eval()
    for one in model.mixture.transducers().values():
        unit_tables(one.encoder)
    history, lengths, candidates, times, asked_at = ranking_inputs(contextual)
    # The second channel has other events, and none of one user.
    histories = torch.stack([history, history.flip(0)], 1)
    histories[:, 1, :contextual] = history[:, :contextual]
    each = torch.stack([lengths, lengths.flip(0)], 1)
    seconds = torch.stack([times, times.flip(0)], 1)
    jagged = {}
    for c, name in enumerate(CHANNELS):
        seq = JaggedSequence.from_padded(histories[:, c], each[:, c], seconds[:, c])
        jagged[name] = replace(seq, layout=replace(seq.layout, contextual_seq_len=contextual))
    behind = JaggedSequence.from_padded(candidates, torch.full_like(lengths, ASKED), asked_at)
    wanted = model(jagged, behind).view(len(LENGTHS), ASKED, -1)
    scorer, given = PaddedMixtureScorer(model, contextual=contextual), (histories, each, candidates, seconds, asked_at)
    program = export_scorer(scorer, history_len=WIDTH, num_candidates=ASKED)
    for call in (scorer, program.module()):
        torch.testing.assert_close(call(*given), wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(call(*(x[:1] for x in given)), wanted[:1], rtol=1e-10, atol=1e-10)
    assert wanted.std() > 0.01


RELOAD = """
import sys, torch
program = torch.export.load(sys.argv[1])
given, wanted = torch.load(sys.argv[2], weights_only=True)
for users in (1, len(given[0])):
    got = program.module()(*(x[:users] for x in given))
    torch.testing.assert_close(got, wanted[:users], rtol=1e-5, atol=1e-5)
assert not any(name.startswith(("hstu_kernels", "torchrec")) for name in sys.modules)
print("equal")
"""


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_exported_program_runs_in_a_fresh_process_without_us(kind: str, tmp_path: Path) -> None:
    scorer, given = PaddedRetrievalScorer(core(torch.float32)), inputs(torch.float32)
    if kind == "ranking":
        scorer, given = PaddedRankingScorer(ranker(torch.float32), contextual=1), ranking_inputs(1, torch.float32)
    torch.export.save(export_scorer(scorer, history_len=WIDTH, num_candidates=ASKED), tmp_path / "scorer.pt2")
    torch.save((given, scorer(*given).detach()), tmp_path / "case.pt")
    environment = {"PATH": os.environ["PATH"], "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "scorer.pt2"), str(tmp_path / "case.pt")],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "equal"


@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_the_graph_stays_on_the_devices_of_the_weights(kind: str) -> None:
    # "meta" stands for any device that is not the CPU: a constant left on the CPU stops the export here as on CUDA.
    scorer: PaddedRetrievalScorer | PaddedRankingScorer
    if kind == "retrieval":
        scorer = PaddedRetrievalScorer(core(torch.float32).to("meta"))
    else:
        scorer = PaddedRankingScorer(ranker(torch.float32).to("meta"), contextual=1)
    program = export_scorer(scorer, history_len=WIDTH, num_candidates=ASKED)
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert {value.device.type for value in values if isinstance(value, torch.Tensor)} == {"meta"}


def test_a_scorer_that_moves_takes_its_thresholds_along() -> None:
    scorer = PaddedRetrievalScorer(core(torch.float32)).to("meta")
    assert scorer.padded.boundaries.is_meta and scorer.padded.boundaries.numel() > 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="exports a model that lies on a GPU: needs an NVIDIA GPU")
@pytest.mark.parametrize("kind", ["retrieval", "ranking"])
def test_exported_on_cuda_equals_the_jagged_path(kind: str) -> None:
    scorer, given = PaddedRetrievalScorer(core(torch.float32).cuda()), inputs(torch.float32)
    if kind == "ranking":
        scorer = PaddedRankingScorer(ranker(torch.float32).cuda(), contextual=1)
        given = ranking_inputs(1, torch.float32)
    on_device = tuple(x.cuda() for x in given)
    program = export_scorer(scorer, history_len=WIDTH, num_candidates=ASKED)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*on_device), scorer(*on_device), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles C++, and there is no g++")
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    scorer, given = PaddedRetrievalScorer(core(torch.float32, num_layers=1)), inputs(torch.float32)
    program = export_scorer(scorer, history_len=WIDTH, num_candidates=ASKED)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "scorer.pt2"))
    compiled = torch._inductor.aoti_load_package(package)
    for users in (len(LENGTHS), 2):
        part = tuple(x[:users] for x in given)
        torch.testing.assert_close(compiled(*part), scorer(*part), rtol=1e-4, atol=1e-4)
