"""Mixture of transducers (ULTRA-HSTU): one for each channel of behaviour, all asked about the same candidates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hstu_plugin.config import HSTUConfig
from hstu_plugin.embedding import SequenceEmbedding
from hstu_plugin.encoder import HSTUEncoder, KVCache
from hstu_plugin.jagged_series import concatenate
from hstu_plugin.ranker import MultiTaskHead
from hstu_plugin.ranking_config import RankingConfig
from hstu_plugin.ranking_embedding import with_targets
from hstu_plugin.sequence import JaggedSequence

Histories = Mapping[str, JaggedSequence]


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Channels by name; each has its own layers, widths of the heads, mask and truncation.

    Attributes:
        channels: at least one, of one ``embedding_dim``: the candidates are shared.
    """

    channels: Mapping[str, HSTUConfig]

    def __post_init__(self) -> None:
        if not self.channels:
            raise ValueError("channels: expected at least one, got none")
        for name, config in self.channels.items():
            if not isinstance(name, str) or not name or "." in name:
                raise ValueError(f"channels: expected names without dots, got {name!r}")
            if not isinstance(config, HSTUConfig):
                raise TypeError(f"channels[{name!r}]: expected an HSTUConfig, got {type(config).__name__}")
        widths = {name: config.embedding_dim for name, config in self.channels.items()}
        if len(set(widths.values())) > 1:
            raise ValueError(f"channels: expected one embedding_dim, as candidates are shared, got {widths}")

    @property
    def output_dim(self) -> int:
        """Width of a candidate's row: the channels side by side."""
        return sum(config.embedding_dim for config in self.channels.values())


class Transducer(nn.Module):
    """Embedding and encoder of one channel."""

    def __init__(self, config: HSTUConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = SequenceEmbedding(config)
        self.encoder = HSTUEncoder(config)

    def forward(self, seq: JaggedSequence) -> JaggedSequence:
        """Token vectors ``[contextual | history | targets]`` to contextualised rows."""
        rows: JaggedSequence = self.encoder(self.embedding(seq))
        return rows


class MixtureOfTransducers(nn.Module):
    """Per-candidate outputs of all channels, concatenated in the order of the config.

    A channel's history is ``[contextual | events]`` of that channel alone; the contextual tokens and the candidates are
    the same in all. A user may have no event in a channel.
    """

    def __init__(self, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.channels = nn.ModuleDict({name: Transducer(c) for name, c in config.channels.items()})

    def transducers(self) -> dict[str, Transducer]:
        """By channel, in the order of the config."""
        return {name: module for name, module in self.channels.items() if isinstance(module, Transducer)}

    def forward(self, histories: Histories, targets: JaggedSequence) -> JaggedSequence:
        """Rows ``[T, output_dim]`` of the candidates.

        Args:
            histories: for each channel, ``[contextual | events]`` token vectors ``[L, D]`` (`with_context`).
            targets: token vectors ``[T, D]``, one sequence of candidates for each user; request times as timestamps
                where a channel has a time bias.

        Raises:
            ValueError: channels or users do not fit.
        """
        self._check(histories, targets)
        rows = []
        for name, transducer in self.transducers().items():
            seq = with_targets(*_timed_alike(histories[name], targets, transducer.config))
            rows.append(transducer(seq).targets().values)
        return targets.with_values(torch.cat(rows, dim=-1))

    def prefill(self, histories: Histories) -> dict[str, KVCache]:
        """Keys and values of the histories, by channel."""
        self._check(histories, None)
        return {
            name: transducer.encoder.prefill(transducer.embedding(histories[name]))[1]
            for name, transducer in self.transducers().items()
        }

    def decode(self, targets: JaggedSequence, caches: Mapping[str, KVCache]) -> JaggedSequence:
        """Rows ``[T, output_dim]`` of candidates against cached histories; equals `forward` over both."""
        rows = []
        for name, transducer in self.transducers().items():
            ends = caches[name][0].layout.seq_lengths
            places = torch.repeat_interleave(ends, targets.layout.seq_lengths, output_size=targets.values.shape[0])
            placed = transducer.embedding(targets, places)
            rows.append(transducer.encoder.decode(placed, caches[name]).values)
        return targets.with_values(torch.cat(rows, dim=-1))

    def _check(self, histories: Histories, targets: JaggedSequence | None) -> None:
        if set(histories) != set(self.channels):
            raise ValueError(f"histories: expected the channels {sorted(self.channels)}, got {sorted(histories)}")
        sizes = {name: history.layout.batch_size for name, history in histories.items()}
        if targets is not None:
            sizes["targets"] = targets.layout.batch_size
        if len(set(sizes.values())) > 1:
            raise ValueError(f"histories: expected the same users everywhere, got {sizes}")


class MixtureRanker(nn.Module):
    """Mixture of transducers and a multi-task head over the concatenated rows; the counterpart of `HSTURanker`."""

    def __init__(self, config: MixtureConfig, ranking: RankingConfig) -> None:
        super().__init__()
        self.config, self.ranking = config, ranking
        self.mixture = MixtureOfTransducers(config)
        self.head = MultiTaskHead(config.output_dim, ranking)

    def forward(self, histories: Histories, targets: JaggedSequence) -> Tensor:
        """Scores ``[T, num_tasks]``; arguments as `MixtureOfTransducers.forward`."""
        scores: Tensor = self.head(self.mixture(histories, targets).values)
        return scores

    def prefill(self, histories: Histories) -> dict[str, KVCache]:
        """As `MixtureOfTransducers.prefill`."""
        return self.mixture.prefill(histories)

    def decode(self, targets: JaggedSequence, caches: Mapping[str, KVCache]) -> Tensor:
        """Scores ``[T, num_tasks]`` of candidates against cached histories; equals `forward` over both."""
        scores: Tensor = self.head(self.mixture.decode(targets, caches).values)
        return scores


def with_context(context: JaggedSequence, events: JaggedSequence) -> JaggedSequence:
    """``[contextual | events]``: the shared contextual tokens in front of one channel's events.

    Args:
        context: the same number of tokens for each user. events: without contextual rows and targets.
    """
    lengths = context.layout.seq_lengths
    count = int(lengths[0]) if lengths.numel() else 0
    if bool((lengths != count).any()):
        raise ValueError(f"context: expected the same number of tokens for each user, got {lengths.tolist()}")
    joined, _ = concatenate([context, events])
    return replace(joined, layout=replace(joined.layout, contextual_seq_len=count))


def _timed_alike(
    history: JaggedSequence, targets: JaggedSequence, config: HSTUConfig
) -> tuple[JaggedSequence, JaggedSequence]:
    """Both with times, or, for a channel that reads none, both without."""
    if config.time_bias:
        return history, targets
    return replace(history, timestamps=None), replace(targets, timestamps=None)
