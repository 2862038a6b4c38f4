"""M-FALCON from ids: the scores of the model, whatever holds the item rows and whatever is fetched ahead."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hstu_kernels.int4 import PackedRows
from hstu_plugin.config import HSTUConfig
from hstu_plugin.events import Events
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.mfalcon_serving import MFalconServer, ServingRequest
from hstu_plugin.quantize import quantize
from hstu_plugin.ranking_config import TokenForm
from hstu_plugin.ranking_model import RankingModel
from hstu_plugin.serving_tables import Placement, ServingTable, Transfer

from .mfalcon_cases import ready
from .ranking_cases import RANKING, make_events, make_features

HISTORY, OFFERED = [6, 0, 3, 9], [4, 2, 0, 3]
devices = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use"),
        ],
    ),
]
on_devices = pytest.mark.parametrize("device", devices)
in_places = pytest.mark.parametrize("placement", list(Placement))


def make_model(*, quantised: bool = True, backend: str = "auto", **options: Any) -> RankingModel:
    torch.manual_seed(0)
    # Triton's attention takes no narrower heads.
    wide = {"attention_dim": 32, "linear_dim": 32} if backend == "triton" else {}
    sizes = {"embedding_dim": 8, "num_layers": 2, "num_heads": 2, "max_seq_len": 40, **wide}
    config = HSTUConfig(**sizes, dropout=0.0, backend=backend)
    model: RankingModel = ready(RankingModel(make_features(**options), config, RANKING)).float()
    return quantize(model).module if quantised else model  # type: ignore[return-value]


def make_request(model: RankingModel, seed: int = 0, times: int = 1) -> ServingRequest:
    """Of four users; ``times`` as many candidates as `OFFERED`."""
    features = model.embedding.features
    generator = torch.Generator().manual_seed(seed)
    users = torch.stack([torch.randint(0, c.num_ids, (4,), generator=generator) for c in features.users], 1)
    history = make_events(HISTORY, features, seed=seed)
    return ServingRequest(
        candidates=make_events([times * count for count in OFFERED], features, seed=seed + 1, start=20_000),
        history=history,
        contextual=users,
    )


def expected(model: RankingModel, request: ServingRequest, device: str) -> Tensor:
    """By the model's own tables, on the device."""
    model = model.to(device)
    tokens = model.embedding
    with torch.no_grad():
        assert request.history is not None
        assert request.contextual is not None
        history = tokens.history(request.history.to(device), request.contextual.to(device))
        offered = tokens.candidates(request.candidates.to(device))
        return MFalconRanker(model.ranker, micro_batch_size=3).score(history, offered)


@pytest.fixture
def servers() -> Iterator[list[MFalconServer]]:
    made: list[MFalconServer] = []
    yield made
    for server in made:
        server.close()


def serve(servers: list[MFalconServer], model: RankingModel, **options: Any) -> MFalconServer:
    servers.append(MFalconServer.from_model(model, micro_batch_size=3, **options))
    return servers[-1]


@on_devices
@in_places
@pytest.mark.parametrize("quantised", [True, False], ids=["int4", "full"])
@pytest.mark.parametrize("form", list(TokenForm), ids=str)
def test_scores_are_those_of_the_model(
    servers: list[MFalconServer], device: str, placement: Placement, quantised: bool, form: TokenForm
) -> None:
    model = make_model(quantised=quantised, form=form)
    request = make_request(model)
    wanted = expected(model, request, device)
    server = serve(servers, model.cpu(), device=device, placement=placement)
    got = server.score(request)
    assert got.device.type == device
    assert torch.equal(got, wanted)
    # The model itself goes on working, from the same tables.
    assert torch.equal(expected(model, request, device), wanted)


@on_devices
@in_places
@pytest.mark.parametrize("ahead", [1, 3])
def test_a_stream_gives_every_request_its_own_scores(
    servers: list[MFalconServer], device: str, placement: Placement, ahead: int
) -> None:
    model = make_model()
    requests = [make_request(model, seed) for seed in range(7)]
    wanted = [expected(model, request, device) for request in requests]
    server = serve(servers, model.cpu(), device=device, placement=placement, ahead=ahead)
    got = list(server.stream(iter(requests)))
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.equal(ours, theirs)
    assert list(server.stream([])) == []


def test_the_next_rows_are_fetched_before_a_request_is_scored(servers: list[MFalconServer]) -> None:
    server = serve(servers, make_model(), ahead=2)
    requests = [make_request(server.model, seed) for seed in range(5)]
    taken: list[int] = []

    def arriving() -> Iterator[ServingRequest]:
        for number, request in enumerate(requests):
            taken.append(number)
            yield request

    answers = server.stream(arriving())
    next(answers)
    assert taken == [0, 1, 2]
    next(answers)
    assert taken == [0, 1, 2, 3]
    answers.close()  # type: ignore[attr-defined]
    # What was fetched and never scored does no harm.
    assert torch.equal(server.score(requests[4]), list(server.stream(requests))[4])


@on_devices
def test_cached_users_and_new_events(servers: list[MFalconServer], device: str) -> None:
    model = make_model()
    request = make_request(model)
    wanted = expected(model, request, device)
    assert request.history is not None
    server = serve(servers, model.cpu(), device=device)
    keys = ["ann", "bob", "cid", "dan"]
    server.prefill(keys, request.history, request.contextual)
    later = replace(request, history=None, contextual=None, cached=keys)
    torch.testing.assert_close(server.score(later), wanted, rtol=1e-5, atol=1e-6)
    # Events that arrive with the request are in the history of this request and of the ones behind it.
    news = make_events([1, 2, 0, 1], model.embedding.features, seed=5, start=15_000)
    first = server.score(replace(later, history=news))
    torch.testing.assert_close(server.score(later), first, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(first, wanted, rtol=1e-3)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that this PyTorch can use")
@pytest.mark.parametrize("transfer", list(Transfer), ids=str)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_graphs_score_while_a_thread_fetches(servers: list[MFalconServer], backend: str, transfer: Transfer) -> None:
    model = make_model(backend=backend)
    # Different sizes: graphs are recorded while the thread brings the next rows.
    requests = [make_request(model, seed, times=1 + 7 * (seed % 3)) for seed in range(9)]
    wanted = [expected(model, request, "cuda") for request in requests]
    options = {"backend": backend, "transfer": transfer, "ahead": 2, "device": "cuda"}
    server = MFalconServer.from_model(model.cpu(), micro_batch_size=64, cuda_graphs=True, **options)
    servers.append(server)
    for _ in range(2):
        for ours, theirs in zip(server.stream(requests), wanted, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    keys = ["ann", "bob", "cid", "dan"]
    first = requests[0]
    assert first.history is not None
    server.prefill(keys, first.history, first.contextual)
    later = [replace(request, history=None, contextual=None, cached=keys) for request in requests]
    torch.testing.assert_close(server.score(later[0]), wanted[0], rtol=1e-4, atol=1e-5)
    # Of a stream as of requests alone, to the bit.
    alone = [server.score(request) for request in later]
    for ours, theirs in zip(server.stream(later), alone, strict=True):
        assert torch.equal(ours, theirs)


def test_only_distinct_packed_rows_travel(servers: list[MFalconServer]) -> None:
    model = make_model()
    server = serve(servers, model)
    request = make_request(model)
    assert request.history is not None
    ids = torch.cat([request.history.items, request.candidates.items])
    server.score(request)
    sizes = server.model.embedding.items.sizes
    # Equal ids of different features are different rows.
    distinct = sum(ids[:, column].unique().numel() for column in range(len(sizes)))
    assert server.table.num_rows == sum(sizes)
    assert server.table.counts.unique_rows == distinct
    # Four bytes of codes, four of scale and bias; int32 places.
    assert server.table.counts.bytes == 8 * distinct + 4 * ids.numel()


def test_the_models_device_holds_no_item_table(servers: list[MFalconServer]) -> None:
    model = make_model()
    server = serve(servers, model)
    names = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert not any(name.startswith("embedding.items.rows") for name in names)
    lookup: Any = model.embedding.items.rows
    assert lookup.table.source.data.data_ptr() == server.table.source.data.data_ptr()  # type: ignore[union-attr]


def test_errors_of_the_thread_reach_the_caller(servers: list[MFalconServer]) -> None:
    server = serve(servers, make_model())
    good = make_request(server.model)
    offered = good.candidates
    wrong = replace(good, candidates=replace(offered, items=offered.items + 1000))
    with pytest.raises(IndexError, match=r"\w+: expected ids in \[0, 20\), got \d+ to 10\d\d"):
        server.score(wrong)
    narrow = replace(offered, items=offered.items[:, :1])
    with pytest.raises(ValueError, match=r"ids: expected \[R, 2\] for \w+, \w+, got"):
        server.score(ServingRequest(candidates=narrow, history=_first_column(good.history)))
    assert torch.isfinite(server.score(good)).all()


def _first_column(events: Events | None) -> Events:
    assert events is not None
    return replace(events, items=events.items[:, :1])


def test_wrong_arguments_are_refused() -> None:
    model = make_model()
    request = make_request(model)
    with pytest.raises(ValueError, match="history, cached: expected histories or keys of cached users, got neither"):
        ServingRequest(candidates=request.candidates)
    with pytest.raises(ValueError, match="contextual: expected none for cached users"):
        ServingRequest(candidates=request.candidates, cached=["ann"], contextual=request.contextual)
    rows: Any = model.embedding.items.rows
    table = ServingTable(rows, dtype=torch.float32)
    few = PackedRows(rows.rows.data[:-1], rows.rows.dim, rows.rows.format)
    for wrong in (ServingTable(few, dtype=torch.float32), ServingTable(rows)):
        with pytest.raises(ValueError, match="table: expected rows, width, dtype and device of the model's items"):
            MFalconServer(model, wrong, micro_batch_size=2)
    with pytest.raises(ValueError, match="ahead: expected an int >= 1, got 0"):
        MFalconServer(model, table, micro_batch_size=2, ahead=0)
