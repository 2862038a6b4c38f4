"""Channels of a mixture of transducers: which events of a history each of them reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hstu_plugin.adapters.torchrec.schema import FeatureSchema
from hstu_plugin.config import HSTUConfig


@dataclass(frozen=True, kw_only=True)
class Channel:
    """One transducer of a mixture (ULTRA-HSTU): the events that it reads, and its layers.

    Attributes:
        actions: names of action types; an event at which any of them was done is read. Empty: all events.
        config: of the transducer; all channels have one ``embedding_dim``.
    """

    config: HSTUConfig
    actions: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "actions", tuple(self.actions))


def check_channels(channels: Mapping[str, Channel], config: HSTUConfig, schema: FeatureSchema) -> None:
    """Raise ``ValueError`` unless the channels fit the tables' width and the actions of the schema."""
    if schema.actions is None:
        raise ValueError("mixture: channels are told apart by what was done; expected schema.actions, got None")
    if schema.reads_candidate_actions:
        raise ValueError(
            "mixture: expected schema.actions.form summed, got interleaved; channels see parts of a history, so that "
            "there is no one series to train on"
        )
    for name, channel in channels.items():
        unknown = sorted(set(channel.actions) - set(schema.actions.names))
        if unknown:
            raise ValueError(f"mixture.{name}.actions: unknown types {unknown}; known: {list(schema.actions.names)}")
        if channel.config.embedding_dim != config.embedding_dim:
            raise ValueError(
                f"mixture.{name}: expected embedding_dim {config.embedding_dim}, the width of the tables, got "
                f"{channel.config.embedding_dim}"
            )
