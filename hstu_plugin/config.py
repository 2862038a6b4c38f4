"""Configuration of the models; the only place where defaults live."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from hstu_kernels import AttentionMask, Backend, resolve_backend


class Variant(StrEnum):
    """The published forms of the HSTU layer; their weights are not interchangeable.

    ``RESEARCH``: SiLU on U, V, Q, K; norms without affine; alpha 1; no concatenation. Published the ML-1M figures.
    ``PRODUCTION``: affine norms; SiLU on U only; alpha 1/sqrt(Dqk); output from ``concat[U, A, Norm(A) * U]``.
    ``ULTRA``: SiLU on all four; alpha 1/Dqk; no relative bias (ULTRA-HSTU).
    """

    RESEARCH = "research"
    PRODUCTION = "production"
    ULTRA = "ultra"


class RowTime(StrEnum):
    """The time from which a row measures time differences.

    ``REQUEST``: the time of the event that the row predicts: the next event's in training, the request's in use.
    ``EVENT``: the time of the row's own event, in training and in use; nothing about the request is known.
    """

    REQUEST = "request"
    EVENT = "event"


class Recompute(StrEnum):
    """What a layer rebuilds in the backward instead of storing it (ULTRA-HSTU, selective rematerialisation).

    ``INPUT_NORM``: the normed input of the projection. ``UVQK``: the projection's output before and after SiLU, with
    U, V, Q and K, which are parts of it. ``GATED_OUTPUT``: normed attention, gate, dropout and the input of ``W_o``.
    The layer's input and the attention's output stay stored: attention itself never runs again. In Triton kernels a
    norm without parameters stores its rows in place of the layer's input, so that ``INPUT_NORM`` has nothing to save.
    """

    INPUT_NORM = "input_norm"
    UVQK = "uvqk"
    GATED_OUTPUT = "gated_output"


class Similarity(StrEnum):
    """Score of a user vector and an item vector: plain dot product, or cosine of both."""

    DOT = "dot"
    L2 = "l2"


class LossType(StrEnum):
    """``FULL_SOFTMAX`` over all items, ``SAMPLED_SOFTMAX`` over drawn negatives, ``BCE`` with drawn negatives."""

    FULL_SOFTMAX = "full_softmax"
    SAMPLED_SOFTMAX = "sampled_softmax"
    BCE = "bce"


class NegativeSource(StrEnum):
    """``UNIFORM`` over the item ids, or ``IN_BATCH``: the positives of the batch's other rows."""

    UNIFORM = "uniform"
    IN_BATCH = "in_batch"


def _expect(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def _enum(cls: type[StrEnum], name: str, value: Any) -> Any:
    try:
        return cls(value)
    except ValueError:
        raise ValueError(f"{name}: expected one of {', '.join(cls)}, got {value!r}") from None


def _checked_int(name: str, value: object, minimum: int) -> None:
    _expect(
        isinstance(value, int) and not isinstance(value, bool) and value >= minimum, name, f"an int >= {minimum}", value
    )


def _positive(name: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    _expect(number and 0 < value < math.inf, name, "a finite number > 0", value)  # type: ignore[operator]


def _probability(name: str, value: object) -> None:
    _expect(
        isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1,
        name,
        "a number in [0, 1)",
        value,
    )


# Default of fields that follow from others: None when given, a value of the field's own type once the config exists.
_DERIVED: Any = None


@dataclass(frozen=True, kw_only=True)
class HSTUConfig:
    """The transducer: width, depth, attention and bias.

    Attributes:
        embedding_dim: ``D``, width of the tokens.
        num_layers, num_heads: depth and heads ``H``.
        attention_dim: width of Q and K per head; default ``embedding_dim / num_heads``.
        linear_dim: width of U and V per head; default as ``attention_dim``.
        max_seq_len: ``N``, the longest sequence the model is made for; sizes the position tables.
        variant: form of the layer.
        dropout: on the input embedding and before the output projection.
        alpha: multiplies ``q . k``; default by variant.
        attn_scale: multiplies after SiLU, the same in training and in use; default ``1 / max_seq_len``.
        position_bias, time_bias: terms of the relative bias; default on, off for the ultra variant.
        num_time_buckets: buckets of the time term.
        row_time: from which time a row measures.
        position_embedding: learned absolute positions added to the input.
        mask: attention structure.
        truncate_after_layers: ``N1``, the layers that see the whole sequence; those behind them see the contextual
            rows, the latest ``truncate_to`` history rows and the targets (attention truncation of ULTRA-HSTU). 0: none.
        truncate_to: ``L'``, history rows (contextual ones not counted) that go on; 0 without truncation.
        recompute: what a layer rebuilds in the backward to save memory; names of `Recompute`. ``None``: ``UVQK`` where
            the layer runs in Triton kernels, for which it is most of the memory and little of the time; else nothing.
        norm_eps: of the layer norms.
        backend: of the operators.
    """

    embedding_dim: int = 64
    num_layers: int = 2
    num_heads: int = 1
    attention_dim: int = _DERIVED
    linear_dim: int = _DERIVED
    max_seq_len: int = 200
    variant: Variant = Variant.RESEARCH
    dropout: float = 0.2
    alpha: float = _DERIVED
    attn_scale: float = _DERIVED
    position_bias: bool = _DERIVED
    time_bias: bool = _DERIVED
    num_time_buckets: int = 128
    row_time: RowTime = RowTime.REQUEST
    position_embedding: bool = True
    mask: AttentionMask = field(default_factory=AttentionMask)
    truncate_after_layers: int = 0
    truncate_to: int = 0
    recompute: tuple[Recompute, ...] | None = None
    norm_eps: float = 1e-6
    backend: Backend = Backend.AUTO

    def __post_init__(self) -> None:
        for name in ("embedding_dim", "num_layers", "num_heads", "max_seq_len", "num_time_buckets"):
            _checked_int(name, getattr(self, name), 1)
        _set(self, "variant", _enum(Variant, "variant", self.variant))
        _set(self, "row_time", _enum(RowTime, "row_time", self.row_time))
        _set(self, "backend", Backend(self.backend) if resolve_backend(self.backend) else None)
        if vars(self)["attention_dim"] is None:
            _expect(
                self.embedding_dim % self.num_heads == 0,
                "num_heads",
                f"a divisor of embedding_dim ({self.embedding_dim}) as attention_dim is not given",
                self.num_heads,
            )
        _derive(self, "attention_dim", self.embedding_dim // self.num_heads)
        _checked_int("attention_dim", self.attention_dim, 1)
        _derive(self, "linear_dim", self.attention_dim)
        _checked_int("linear_dim", self.linear_dim, 1)
        _probability("dropout", self.dropout)
        width = self.attention_dim
        alphas = {Variant.RESEARCH: 1.0, Variant.PRODUCTION: width**-0.5, Variant.ULTRA: 1.0 / width}
        _derive(self, "alpha", alphas[self.variant])
        _derive(self, "attn_scale", 1.0 / self.max_seq_len)
        for name in ("alpha", "attn_scale", "norm_eps"):
            _positive(name, getattr(self, name))
            _set(self, name, float(getattr(self, name)))
        for name in ("position_bias", "time_bias"):
            _derive(self, name, self.variant is not Variant.ULTRA)
        for name in ("position_bias", "time_bias", "position_embedding"):
            _expect(isinstance(getattr(self, name), bool), name, "a bool", getattr(self, name))
        _expect(isinstance(self.mask, AttentionMask), "mask", "an AttentionMask", self.mask)
        self._check_truncation()
        if self.recompute is not None:
            names = self.recompute
            _expect(isinstance(names, list | tuple), "recompute", f"a list of {', '.join(Recompute)}", names)
            chosen = {_enum(Recompute, "recompute", name) for name in names}
            _set(self, "recompute", tuple(name for name in Recompute if name in chosen))

    def _check_truncation(self) -> None:
        for name in ("truncate_after_layers", "truncate_to"):
            _checked_int(name, getattr(self, name), 0)
        after, kept = self.truncate_after_layers, self.truncate_to
        _expect(
            after < self.num_layers,
            "truncate_after_layers",
            f"a number below num_layers ({self.num_layers}), so that a layer is left behind it",
            after,
        )
        _expect(
            (after > 0) == (kept > 0),
            "truncate_to",
            "a number of history rows > 0 together with truncate_after_layers > 0, or 0 for both",
            kept,
        )

    @property
    def truncates(self) -> bool:
        """Whether layers behind ``truncate_after_layers`` see the latest history rows only."""
        return self.truncate_after_layers > 0


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig:
    """Similarity, loss and negatives of the retrieval head.

    Attributes:
        similarity: dot product, or cosine (L2-normalised user and item vectors).
        temperature: the similarity is divided by it.
        loss: training objective.
        num_negatives: drawn for each position (uniform); in-batch uses this many positives of other rows.
        negatives: where they are drawn from.
        logq_correction: subtract ``log q(item)`` from the logits of in-batch items, whose chance of being drawn follows
            their popularity (sampled softmax only; uniform draws shift all logits alike).
    """

    similarity: Similarity = Similarity.L2
    temperature: float = 0.05
    loss: LossType = LossType.FULL_SOFTMAX
    num_negatives: int = 128
    negatives: NegativeSource = NegativeSource.UNIFORM
    logq_correction: bool = True

    def __post_init__(self) -> None:
        _set(self, "similarity", _enum(Similarity, "similarity", self.similarity))
        _set(self, "loss", _enum(LossType, "loss", self.loss))
        _set(self, "negatives", _enum(NegativeSource, "negatives", self.negatives))
        _checked_int("num_negatives", self.num_negatives, 1)
        _positive("temperature", self.temperature)
        _expect(isinstance(self.logq_correction, bool), "logq_correction", "a bool", self.logq_correction)


def _set(config: object, name: str, value: object) -> None:
    object.__setattr__(config, name, value)


def _derive(config: object, name: str, value: object) -> None:
    if getattr(config, name) is None:
        _set(config, name, value)


def field_names(config: type[Any]) -> Iterable[str]:
    """Names of the fields of a config class, for adapters that translate other spellings."""
    return tuple(f.name for f in fields(config))
