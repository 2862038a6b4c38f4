"""From RecBole's spelling to our configs: pure functions on dictionaries, no RecBole import."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, TypeVar

from hstu_kernels import AttentionMask
from hstu_plugin.adapters.input_errors import close_names
from hstu_plugin.config import HSTUConfig, LossType, RetrievalConfig
from hstu_plugin.schedule import LearningRateSchedule
from hstu_plugin.ultra.stochastic_length import StochasticLengthConfig

C = TypeVar("C")

# RecBole key -> field of HSTUConfig.
ENCODER_KEYS: Mapping[str, str] = {
    "hidden_size": "embedding_dim",
    "n_layers": "num_layers",
    "n_heads": "num_heads",
    "attention_dim": "attention_dim",
    "linear_dim": "linear_dim",
    "MAX_ITEM_LIST_LENGTH": "max_seq_len",
    "variant": "variant",
    "hidden_dropout_prob": "dropout",
    "alpha": "alpha",
    "attn_scale": "attn_scale",
    "position_bias": "position_bias",
    "time_bias": "time_bias",
    "num_time_buckets": "num_time_buckets",
    "row_time": "row_time",
    "position_embedding": "position_embedding",
    "truncate_after_layers": "truncate_after_layers",
    "truncate_to": "truncate_to",
    "recompute": "recompute",
    "layer_norm_eps": "norm_eps",
    "backend": "backend",
}
# RecBole key -> field of AttentionMask.
MASK_KEYS: Mapping[str, str] = {
    "max_attn_len": "max_attn_len",
    "global_prefix_len": "global_prefix_len",
    "full_attn_tail_len": "full_attn_tail_len",
}
# RecBole key -> field of RetrievalConfig.
RETRIEVAL_KEYS: Mapping[str, str] = {
    "similarity": "similarity",
    "temperature": "temperature",
    "loss_type": "loss",
    "num_negatives": "num_negatives",
    "negatives": "negatives",
    "logq_correction": "logq_correction",
}
# RecBole key -> field of StochasticLengthConfig.
LENGTH_KEYS: Mapping[str, str] = {
    "stochastic_length_alpha": "alpha",
    "stochastic_length_sampling": "sampling",
    "MAX_ITEM_LIST_LENGTH": "max_seq_len",
}
_LOSSES = {
    "ce": LossType.FULL_SOFTMAX,
    "sampled_softmax": LossType.SAMPLED_SOFTMAX,
    "bce": LossType.BCE,
}
_LOSS_NAMES = {LossType.FULL_SOFTMAX: "CE", LossType.SAMPLED_SOFTMAX: "sampled_softmax", LossType.BCE: "BCE"}

# Read by RecBole's shared code, but neither in its argument list nor in the defaults that it loads.
_RECBOLE_KEYS = """
model dataset config_files nproc ip port world_size group_offset offset local_rank single_spec verbose device
encoding worker shuffle enable_amp enable_scaler log_wandb wandb_project reg_weight require_pow
transform mask_ratio ft_ratio crop_eta tail_ratio kg_reverse_r entity_kg_num_interval relation_kg_num_interval
discretization numerical_features
"""


class TrainExamples(StrEnum):
    """``GENERATIVE``: one row for each user (or window), all positions trained. ``PREFIX``: RecBole's augmentation, one
    row for each prefix of a user's sequence, the last position trained."""

    GENERATIVE = "generative"
    PREFIX = "prefix"


class TrainWindows(StrEnum):
    """Of users longer than the window: train the ``LATEST`` window, or ``ALL`` of them, each position exactly once."""

    LATEST = "latest"
    ALL = "all"


class TimestampUnit(StrEnum):
    """Unit of the time column in the file."""

    SECONDS = "s"
    MILLISECONDS = "ms"


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How rows are made from users' events.

    Attributes:
        train_examples, train_windows, timestamp_unit: as their enumerations say.
        action_field: numerical column with what was done at an event, part of the event's token: a name, ``auto`` for
            RATING_FIELD where the file has it, or ``None``.
        action_levels: vectors for it; beyond so many different numbers they are cut by quantiles.
    """

    train_examples: TrainExamples = TrainExamples.GENERATIVE
    train_windows: TrainWindows = TrainWindows.LATEST
    timestamp_unit: TimestampUnit = TimestampUnit.SECONDS
    action_field: str | None = None
    action_levels: int = 32


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Further keys of ours, read by the trainer and the model.

    Attributes:
        filter_seen_items: never rank an item of the input window (the published ML-1M protocol).
        checkpoint_every: epochs between two writes of the checkpoint from which a killed run goes on.
        adam_betas: of the learners adam and adamw; PyTorch's own where ``None``.
        lr_schedule: course of ``learning_rate`` over ``epochs``: ``constant``, or ``cosine`` down to zero.
        warmup_steps: optimiser steps over which the rate first rises linearly.
        detect_anomaly: autograd's search for the operation behind a NaN; several times slower.
    """

    filter_seen_items: bool = False
    checkpoint_every: int = 1
    adam_betas: tuple[float, float] | None = None
    lr_schedule: LearningRateSchedule = LearningRateSchedule.CONSTANT
    warmup_steps: int = 0
    detect_anomaly: bool = False


def default_values() -> dict[str, Any]:
    """Our keys in RecBole's spelling with the defaults of our configs, so that RecBole's echo shows them all."""
    encoder = {f.name: f.default for f in fields(HSTUConfig)}
    retrieval = {f.name: f.default for f in fields(RetrievalConfig)}
    values = {key: encoder[name] for key, name in ENCODER_KEYS.items()}
    values |= {key: getattr(AttentionMask(), name) for key, name in MASK_KEYS.items()}
    values |= {key: retrieval[name] for key, name in RETRIEVAL_KEYS.items()}
    values |= {f.name: f.default for cls in (DataOptions, RunOptions) for f in fields(cls)}
    values |= {"stochastic_length_alpha": None, "stochastic_length_sampling": StochasticLengthConfig.sampling}
    values["loss_type"] = _LOSS_NAMES[RetrievalConfig.loss]
    return {key: str(value) if isinstance(value, StrEnum) else value for key, value in values.items()}


def hstu_config(values: Mapping[str, Any]) -> HSTUConfig:
    """``HSTUConfig`` of a RecBole configuration; absent keys take our defaults.

    Raises:
        ValueError: a value does not fit; names the RecBole key.
    """
    chosen = _chosen(values, ENCODER_KEYS)
    mask = _build(AttentionMask, _chosen(values, MASK_KEYS), MASK_KEYS)
    return _build(HSTUConfig, {**chosen, "mask": mask}, ENCODER_KEYS)


def retrieval_config(values: Mapping[str, Any]) -> RetrievalConfig:
    """``RetrievalConfig`` of a RecBole configuration; ``loss_type`` is ``CE``, ``sampled_softmax`` or ``BCE``."""
    chosen = _chosen(values, RETRIEVAL_KEYS)
    if "loss" in chosen:
        loss = _LOSSES.get(str(chosen["loss"]).lower())
        if loss is None:
            raise ValueError(f"loss_type: expected one of CE, sampled_softmax, BCE, got {chosen['loss']!r}")
        chosen["loss"] = loss
    return _build(RetrievalConfig, chosen, RETRIEVAL_KEYS)


def data_options(values: Mapping[str, Any]) -> DataOptions:
    """How rows are made; each value is one of the names of its enumeration."""
    choices = {"train_examples": TrainExamples, "train_windows": TrainWindows, "timestamp_unit": TimestampUnit}
    chosen: dict[str, Any] = {}
    for key, cls in choices.items():
        if values.get(key) is not None:
            try:
                chosen[key] = cls(values[key])
            except ValueError:
                raise ValueError(f"{key}: expected one of {', '.join(cls)}, got {values[key]!r}") from None
    for key in ("action_field", "action_levels"):
        if values.get(key) is not None:
            chosen[key] = values[key]
    options = DataOptions(**chosen)
    if options.action_field is not None and not isinstance(options.action_field, str):
        raise ValueError(f"action_field: expected the name of a column, auto or nothing, got {options.action_field!r}")
    levels = options.action_levels
    if not isinstance(levels, int) or isinstance(levels, bool) or levels < 1:
        raise ValueError(f"action_levels: expected an int >= 1, got {levels!r}")
    return options


def stochastic_length_config(values: Mapping[str, Any]) -> StochasticLengthConfig | None:
    """How training shortens histories; ``None`` where ``stochastic_length_alpha`` is not given."""
    if values.get("stochastic_length_alpha") is None:
        return None
    return _build(StochasticLengthConfig, _chosen(values, LENGTH_KEYS), LENGTH_KEYS)


def run_options(values: Mapping[str, Any]) -> RunOptions:
    """The keys of `RunOptions`, checked."""
    chosen = {f.name: values[f.name] for f in fields(RunOptions) if values.get(f.name) is not None}
    options = RunOptions(**chosen)
    for name in ("filter_seen_items", "detect_anomaly"):
        if not isinstance(getattr(options, name), bool):
            raise ValueError(f"{name}: expected a bool, got {getattr(options, name)!r}")
    every = options.checkpoint_every
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"checkpoint_every: expected an int >= 1, got {every!r}")
    betas = options.adam_betas
    if betas is not None:
        if len(betas) != 2 or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas):
            raise ValueError(f"adam_betas: expected two numbers in [0, 1), got {betas!r}")
        chosen["adam_betas"] = (float(betas[0]), float(betas[1]))
    try:
        chosen["lr_schedule"] = LearningRateSchedule(options.lr_schedule)
    except ValueError:
        raise ValueError(
            f"lr_schedule: expected one of {', '.join(LearningRateSchedule)}, got {options.lr_schedule!r}"
        ) from None
    warmup = options.warmup_steps
    if not isinstance(warmup, int) or isinstance(warmup, bool) or warmup < 0:
        raise ValueError(f"warmup_steps: expected an int >= 0, got {warmup!r}")
    return RunOptions(**chosen)


def known_keys(internal: Iterable[str], arguments: Iterable[str]) -> frozenset[str]:
    """All keys that mean something for our models.

    Args:
        internal: keys of the defaults that RecBole loaded for this model and data set.
        arguments: names from RecBole's argument list.
    """
    return frozenset(internal) | frozenset(arguments) | frozenset(_RECBOLE_KEYS.split()) | frozenset(default_values())


def refuse_unknown(sources: Mapping[str, Collection[str]], known: Collection[str]) -> None:
    """Raise for the first key that nobody would read.

    Args:
        sources: keys by where they came from, in words.
        known: from `known_keys`.

    Raises:
        ValueError: names the key, its source and the nearest known keys.
    """
    for source, keys in sources.items():
        for key in keys:
            if key not in known:
                near = close_names(key, known, 3)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                raise ValueError(f"unknown configuration key {key!r} in {source}{hint}")


def _chosen(values: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {name: values[key] for key, name in keys.items() if values.get(key) is not None}


def _build(cls: type[C], chosen: dict[str, Any], keys: Mapping[str, str]) -> C:
    """An instance of ``cls``, with errors that speak of the RecBole key instead of the field."""
    try:
        return cls(**chosen)
    except (ValueError, TypeError) as error:
        text = str(error)
        for key, name in keys.items():
            if key != name and text.startswith(f"{name}:"):
                raise ValueError(key + text.removeprefix(name)) from None
        raise ValueError(text) from None
