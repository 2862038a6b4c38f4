"""One rank of the load-balancing test, a process of its own: ``python balance_ranks.py RANK RANKS STORE OUT``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import distributed as dist

from hstu_kernels import AttentionMask, JaggedLayout
from hstu_plugin.config import HSTUConfig
from hstu_plugin.sequence import JaggedSequence
from hstu_plugin.ultra.load_balance import LoadBalanceConfig, LoadBalancedLength, model_load
from hstu_plugin.ultra.stochastic_length import StochasticLengthConfig

STEPS, BATCH, LONGEST = 24, 20, 512


def main(rank: int, ranks: int, store: str, out: Path) -> None:
    """Balance ``STEPS`` batches; rank ``r``'s users are the longer the larger ``r``."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    mask = AttentionMask(max_attn_len=32, full_attn_tail_len=32)
    config = HSTUConfig(embedding_dim=32, num_layers=2, max_seq_len=LONGEST, variant="ultra", mask=mask)
    load = model_load(config)
    balanced = LoadBalancedLength(
        StochasticLengthConfig(alpha=1.5, max_seq_len=LONGEST), LoadBalanceConfig(warmup_steps=8, period=8), load
    )
    generator = torch.Generator().manual_seed(rank)
    loads, targets = [], []
    for _ in range(STEPS):
        drawn = torch.randn(BATCH, generator=generator) * 1.0 + 4.5 + 0.1 * rank
        lengths = drawn.exp().long().clamp(2, LONGEST)
        layout = JaggedLayout.from_lengths(lengths)
        times = torch.arange(int(lengths.sum()))
        shorter = balanced(JaggedSequence(times, layout, times), generator=generator)
        kept = shorter.layout.seq_lengths
        loads.append(float(load(kept, torch.zeros_like(kept)).sum()))
        targets.append(balanced.target)
    out.write_text(json.dumps({"loads": loads, "targets": targets}), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
