"""GraphScorer: fixed buffers give the scores of the full forward; recorded graphs give them, too."""

from __future__ import annotations

import pytest
import torch

from hstu_kernels import JaggedLayout
from hstu_kernels.attention import static
from hstu_plugin.graph_scoring import GraphScorer, capacity_for
from hstu_plugin.mfalcon import MFalconRanker
from hstu_plugin.ranker import HSTURanker
from hstu_plugin.sequence import JaggedSequence

from .mfalcon_cases import CONTEXT, KINDS, MIXTURE, full_scores, make_histories, make_ranker, make_sequence, same


@pytest.mark.parametrize("kind", [*KINDS, MIXTURE])
def test_fixed_buffers_equal_one_full_forward(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "_KEY_BLOCK", 7)
    ranker = make_ranker(kind)
    transducers = {"": ranker} if isinstance(ranker, HSTURanker) else dict(ranker.mixture.transducers())
    scorer = GraphScorer(
        transducers,
        ranker.head,
        micro_batch_size=4,
        capacity=dict.fromkeys(transducers, 30),
        contextual_seq_len=CONTEXT,
        capture=False,
    )
    # A long history before a short one: what the long one leaves in the buffers must not count.
    for length in (21, 6, CONTEXT):
        histories, candidates = make_histories(kind, (length,)), make_sequence((6,), begin=2000, seed=4)
        with torch.no_grad():
            if isinstance(histories, JaggedSequence):
                assert isinstance(ranker, HSTURanker)
                caches = {"": ranker.prefill(histories)}
            else:
                assert not isinstance(ranker, HSTURanker)
                caches = ranker.prefill(histories)
        assert same(scorer.score(caches, candidates), full_scores(ranker, histories, candidates))


def test_capacities_are_few() -> None:
    assert [capacity_for(n) for n in (0, 1, 256, 257, 1024, 1025)] == [256, 256, 256, 512, 1024, 2048]


def test_graphs_need_a_gpu() -> None:
    with pytest.raises(ValueError, match=r"^cuda_graphs: expected a ranker on a CUDA device, got one on cpu"):
        MFalconRanker(make_ranker("plain"), micro_batch_size=4, cuda_graphs=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: records CUDA graphs")
@pytest.mark.parametrize("kind", ["plain", "truncated-semi-local-tail", MIXTURE])
def test_recorded_graphs_equal_plain_launches(kind: str) -> None:
    ranker = make_ranker(kind).cuda()

    def move(seq: JaggedSequence) -> JaggedSequence:
        layout = JaggedLayout.from_lengths(
            seq.layout.seq_lengths.cuda(), contextual_seq_len=seq.layout.contextual_seq_len
        )
        return JaggedSequence(seq.values.cuda(), layout, None if seq.timestamps is None else seq.timestamps.cuda())

    histories = make_histories(kind, (20, 5, CONTEXT))
    histories = (
        move(histories)
        if isinstance(histories, JaggedSequence)
        else {name: move(seq) for name, seq in histories.items()}
    )
    recorded = MFalconRanker(ranker, micro_batch_size=4, cuda_graphs=True)
    plain = MFalconRanker(ranker, micro_batch_size=4)
    for counts in ((7, 0, 2), (1, 9, 4)):
        candidates = move(make_sequence(counts, begin=2000, seed=4))
        assert same(recorded.score(histories, candidates), plain.score(histories, candidates))
