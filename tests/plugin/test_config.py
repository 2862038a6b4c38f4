"""Configurations: defaults that follow from one another, and a clear refusal for everything else."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from hstu_kernels import AttentionMask, Backend, UnsupportedBackend
from hstu_plugin.config import (
    HSTUConfig,
    LossType,
    NegativeSource,
    RetrievalConfig,
    RowTime,
    Similarity,
    Variant,
    field_names,
)


@pytest.mark.parametrize(
    ("variant", "alpha", "bias"),
    [("research", 1.0, True), ("production", 0.25, True), ("ultra", 1 / 16, False)],
)
def test_defaults_by_variant(variant: str, alpha: float, bias: bool) -> None:
    config = HSTUConfig(variant=variant, embedding_dim=64, num_heads=4)  # type: ignore[arg-type]
    assert config.variant is Variant(variant)
    assert (config.attention_dim, config.linear_dim) == (16, 16)
    assert config.alpha == pytest.approx(alpha, abs=1e-15)
    assert config.position_bias is bias
    assert config.time_bias is bias


def test_explicit_values_win_over_the_variant() -> None:
    config = HSTUConfig(variant=Variant.ULTRA, alpha=0.7, time_bias=True, attention_dim=5, linear_dim=9, attn_scale=0.1)
    assert config.alpha == 0.7
    assert config.time_bias is True
    assert config.position_bias is False
    assert (config.attention_dim, config.linear_dim, config.attn_scale) == (5, 9, 0.1)


def test_scale_follows_max_seq_len() -> None:
    assert HSTUConfig(max_seq_len=50).attn_scale == 0.02


def test_linear_dim_follows_attention_dim() -> None:
    assert HSTUConfig(embedding_dim=50, num_heads=3, attention_dim=25).linear_dim == 25


def test_names_become_enums() -> None:
    config = HSTUConfig(row_time="event", backend="reference")  # type: ignore[arg-type]
    assert config.row_time is RowTime.EVENT
    assert config.backend is Backend.REFERENCE
    retrieval = RetrievalConfig(similarity="dot", loss="bce", negatives="in_batch")  # type: ignore[arg-type]
    assert retrieval.similarity is Similarity.DOT
    assert retrieval.loss is LossType.BCE
    assert retrieval.negatives is NegativeSource.IN_BATCH


@pytest.mark.parametrize("config", [HSTUConfig(), RetrievalConfig()], ids=["hstu", "retrieval"])
def test_configs_are_frozen_keyword_only_and_rebuilt_by_replace(config: Any) -> None:
    name = field_names(type(config))[0]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, getattr(config, name))
    with pytest.raises(TypeError):
        type(config)(1)
    assert dataclasses.replace(config) == config


def test_field_names() -> None:
    assert set(field_names(RetrievalConfig)) == {
        "similarity",
        "temperature",
        "loss",
        "num_negatives",
        "negatives",
        "logq_correction",
    }


def test_unknown_option_is_refused() -> None:
    with pytest.raises(TypeError, match="n_layers"):
        HSTUConfig(n_layers=2)  # type: ignore[call-arg]


BAD_HSTU: list[tuple[str, Any]] = [
    *(
        (name, value)
        for name in (
            "embedding_dim",
            "num_layers",
            "num_heads",
            "max_seq_len",
            "num_time_buckets",
            "attention_dim",
            "linear_dim",
        )
        for value in (0, -3, 1.5, "8", True)
    ),
    ("num_heads", 7),
    ("variant", "fast"),
    ("row_time", "now"),
    ("backend", "cuda"),
    *(("dropout", value) for value in (-0.1, 1.0, "0.1", True, float("nan"), float("inf"))),
    *(
        (name, value)
        for name in ("alpha", "attn_scale", "norm_eps")
        for value in (0, -1.0, "1", float("nan"), float("inf"), True)
    ),
    *((name, value) for name in ("position_bias", "time_bias", "position_embedding") for value in (1, "yes")),
    ("mask", None),
    ("mask", {"max_attn_len": 3}),
]
BAD_RETRIEVAL: list[tuple[str, Any]] = [
    ("similarity", "cosine"),
    ("loss", "mse"),
    ("negatives", "popular"),
    *(("num_negatives", value) for value in (0, 1.5, True, "4")),
    *(("temperature", value) for value in (0, -1, "x", float("nan"), float("inf"), True)),
    ("logq_correction", 1),
]


@pytest.mark.parametrize(("name", "value"), BAD_HSTU, ids=[f"{n}-{v!r}" for n, v in BAD_HSTU])
def test_hstu_config_refuses(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        HSTUConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_RETRIEVAL, ids=[f"{n}-{v!r}" for n, v in BAD_RETRIEVAL])
def test_retrieval_config_refuses(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        RetrievalConfig(**{name: value})


def test_unknown_backend_is_an_unsupported_backend() -> None:
    with pytest.raises(UnsupportedBackend, match="cuda"):
        HSTUConfig(backend="cuda")  # type: ignore[arg-type]


def test_mask_is_kept() -> None:
    mask = AttentionMask(max_attn_len=8)
    assert HSTUConfig(mask=mask).mask is mask


def test_derived_fields_are_of_their_own_type() -> None:
    config = HSTUConfig(alpha=1, attn_scale=2)
    assert all(type(getattr(config, name)) is float for name in ("alpha", "attn_scale", "norm_eps"))
    assert all(type(getattr(config, name)) is int for name in ("attention_dim", "linear_dim"))
    # One name for one thing.
    assert not {"attn_alpha", "scale", "qk_dim", "uv_dim"} & set(dir(config))
