"""Operation counts against torch's own counter on dense masks, and the relations between the ways to score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.encoder import HSTUEncoder
from hstu_plugin.flops import decode_flops, full_attention, model_flops, prefill_flops, scoring_flops, training_flops
from hstu_plugin.sequence import JaggedSequence


def make_config(**options: Any) -> HSTUConfig:
    return HSTUConfig(
        **{"embedding_dim": 8, "num_heads": 2, "attention_dim": 3, "linear_dim": 5, "num_layers": 3, "max_seq_len": 64}
        | {"variant": "ultra", **options}
    )


def make_layout(contextual: int = 2) -> JaggedLayout:
    return JaggedLayout.from_lengths(
        torch.tensor([30, 0, 9]), num_targets=torch.tensor([4, 0, 3]), contextual_seq_len=contextual
    )


@pytest.mark.parametrize("variant", list(Variant), ids=str)
@pytest.mark.parametrize("truncated", [False, True])
def test_linear_part_is_what_torch_counts(variant: Variant, truncated: bool) -> None:
    config = make_config(variant=variant, **({"truncate_after_layers": 1, "truncate_to": 4} if truncated else {}))
    layout = make_layout()
    model = HSTUEncoder(config)
    times = torch.arange(39)
    with FlopCounterMode(display=False) as counter:
        model(JaggedSequence(torch.randn(39, 8), layout, times))
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    assert int(model_flops(config, layout).linear.sum()) == products


@pytest.mark.parametrize(
    "mask", [AttentionMask(), AttentionMask(max_attn_len=3, global_prefix_len=2, full_attn_tail_len=4)], ids=str
)
def test_attention_part_is_that_of_the_dense_mask(mask: AttentionMask) -> None:
    config = make_config(mask=mask, truncate_after_layers=1, truncate_to=4)
    pairs = 0
    for history, targets in ((26, 4), (6, 3)):
        for layers, end in ((1, history), (2, 2 + min(history - 2, 4))):
            rows = torch.arange(end + targets)
            pairs += layers * int(mask.visible(rows[:, None], rows[None, :], end, 2).sum())
    # Two heads, widths 3 and 5, two operations each.
    assert int(model_flops(config, make_layout()).attention.sum()) == pairs * 2 * (3 + 5) * 2


def test_training_is_three_forwards() -> None:
    config, layout = make_config(), make_layout()
    assert torch.equal(training_flops(config, layout).total, 3 * model_flops(config, layout).total)


def test_scoring() -> None:
    config = make_config(mask=AttentionMask(max_attn_len=3), truncate_after_layers=1, truncate_to=4)
    histories, targets = torch.tensor([26, 0, 6]), torch.tensor([4, 0, 3])
    prefill = prefill_flops(config, histories, contextual_seq_len=2).total
    decode = decode_flops(config, histories, targets, contextual_seq_len=2).total
    cached = scoring_flops(config, histories, targets, contextual_seq_len=2).total
    naive = scoring_flops(config, histories, targets, contextual_seq_len=2, micro_batch_size=2).total
    assert torch.equal(cached, model_flops(config, make_layout()).total)
    assert torch.equal(cached, prefill + decode)
    assert torch.equal(naive, torch.tensor([2, 0, 2]) * prefill + decode)
    with pytest.raises(ValueError, match=r"^micro_batch_size: expected"):
        scoring_flops(config, histories, targets, micro_batch_size=0)


def test_full_attention_is_what_a_window_is_compared_with() -> None:
    config = make_config(mask=AttentionMask(max_attn_len=3), truncate_after_layers=1, truncate_to=4)
    layout = make_layout()
    plain = full_attention(config)
    assert (plain.mask, plain.truncates) == (AttentionMask(), False)
    assert bool((model_flops(plain, layout).total >= model_flops(config, layout).total).all())
