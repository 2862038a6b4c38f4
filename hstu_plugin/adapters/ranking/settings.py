"""Settings of a ranking run: the recipe file, the model's own section in it, and the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from hstu_kernels import AttentionMask
from hstu_plugin.adapters.ranking.schema import SchemaError, build, read_yaml, with_place
from hstu_plugin.config import HSTUConfig, Variant
from hstu_plugin.ranking_config import TokenForm
from hstu_plugin.ranking_mixture import Channel
from hstu_plugin.schedule import LearningRateSchedule


class ModelName(StrEnum):
    """Models of the command."""

    HSTU = "hstu"
    ULTRA_HSTU = "ultra-hstu"
    DLRM = "dlrm"
    POOLED_ATTENTION = "pooled-attention"
    ITEM_MEAN = "item-mean"


_SECTIONS = ("hstu", "id_dropout", "channels")
_TRANSDUCERS = (ModelName.HSTU, ModelName.ULTRA_HSTU)


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """One run, seed and paths apart.

    Attributes:
        model: which one.
        form: of an event's tokens; by default interleaved for hstu, summed for the others.
        embedding_dim, num_layers, num_heads, dropout: of the model; dlrm takes the first alone.
        hstu: further fields of `HSTUConfig` (``variant``, ``time_bias``, ...), with a mapping for ``mask``.
        without_actions: parts of the actions that histories do not tell, of ``types``, ``intensities``, ``contexts``;
            measures what they are worth.
        channels: of a mixture of transducers (ultra-hstu), by name: ``actions`` and ``max_events`` as `Channel`, and
            ``hstu`` with fields that differ from those of all. Empty: one transducer over all events.
        learned_no_action: as `RankingFeatures`. head_users: as `RankingModel`.
        head_dims, head_dropout: as `RankingConfig`.
        max_history: latest events before a block of candidates that a model sees.
        max_candidates, session_gap: blocks of validation and test (`cut_windows`), the same for all models.
        train_candidates: events of a block in training; by default ``max_candidates``.
        epochs: at most. patience: epochs without a better validation before the training ends.
        batch_size: windows of a training step. eval_batch_size: windows at once in validation and test, by default
            ``batch_size``.
        learning_rate, weight_decay, betas, clip_norm: of AdamW.
        table_learning_rate, table_weight_decay: those of the embedding tables of features, by default the others'.
        warmup_steps: in which the learning rates rise. lr_schedule: their course after that, constant, or cosine down
            to zero at the end of ``epochs``.
        id_dropout: probability with which training takes a feature's id for unknown, by name (`IdDropout`).
        valid_every: epochs between validations.
    """

    model: ModelName = ModelName.HSTU
    form: TokenForm | None = None
    embedding_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    dropout: float = 0.1
    hstu: Mapping[str, Any] = field(default_factory=dict)
    channels: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    without_actions: tuple[str, ...] = ()
    learned_no_action: bool = False
    head_users: bool = False
    head_dims: tuple[int, ...] = (128,)
    head_dropout: float = 0.0
    max_history: int = 100
    max_candidates: int = 8
    session_gap: int | None = None
    train_candidates: int | None = None
    epochs: int = 10
    patience: int = 2
    batch_size: int = 256
    eval_batch_size: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    table_learning_rate: float | None = None
    table_weight_decay: float | None = None
    betas: tuple[float, ...] = (0.9, 0.999)
    warmup_steps: int = 0
    lr_schedule: LearningRateSchedule = LearningRateSchedule.CONSTANT
    id_dropout: Mapping[str, float] = field(default_factory=dict)
    clip_norm: float | None = None
    valid_every: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _one_of(ModelName, "model", self.model))
        if self.form is not None:
            object.__setattr__(self, "form", _one_of(TokenForm, "form", self.form))
        if self.model not in _TRANSDUCERS and self.form is TokenForm.INTERLEAVED:
            raise ValueError(f"form: expected summed for {self.model}, got interleaved")
        for name in (
            "embedding_dim",
            "num_layers",
            "num_heads",
            "max_candidates",
            "epochs",
            "batch_size",
            "valid_every",
        ):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_history", "patience", "warmup_steps"):
            _at_least(name, getattr(self, name), 0)
        for name in ("session_gap", "train_candidates", "eval_batch_size"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 0 if name == "session_gap" else 1)
        for name in ("learning_rate", "table_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < float("inf"):
                raise ValueError(f"{name}: expected a number > 0, got {rate!r}")
        for name in ("weight_decay", "table_weight_decay"):
            decay = getattr(self, name)
            if decay is not None and not 0 <= decay < float("inf"):
                raise ValueError(f"{name}: expected a number >= 0, got {decay!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas: expected two numbers in [0, 1), got {self.betas!r}")
        object.__setattr__(self, "lr_schedule", _one_of(LearningRateSchedule, "lr_schedule", self.lr_schedule))
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm: expected a number > 0 or nothing, got {self.clip_norm!r}")
        for name in ("hstu", "id_dropout", "channels"):
            if not isinstance(getattr(self, name), Mapping):
                raise ValueError(f"{name}: expected `name: value` lines, got {getattr(self, name)!r}")
        self.hstu_config(num_features=0, num_series=0)
        if self.channels and (self.model is not ModelName.ULTRA_HSTU or self.token_form is TokenForm.INTERLEAVED):
            raise ValueError(f"channels: expected none for {self.model} of {self.token_form} tokens, got some")
        if self.channels and self.head_users:
            raise ValueError(
                "head_users: expected False for a mixture of transducers, whose head reads channels alone, got True; "
                "add head_users: false (--set head_users=false)"
            )
        self.mixture(num_features=0, num_series=0)

    @property
    def token_form(self) -> TokenForm:
        """The form in force."""
        if self.form is not None:
            return self.form
        return TokenForm.INTERLEAVED if self.model is ModelName.HSTU else TokenForm.SUMMED

    def max_tokens(self, *, num_features: int, num_series: int) -> int:
        """The longest sequence of a window: contextual tokens, events, series between them, training's candidates."""
        per_event = (2 if self.token_form is TokenForm.INTERLEAVED else 1) + num_series
        candidates = max(self.max_candidates, self.train_candidates or 0)
        return num_features + per_event * (self.max_history + candidates)

    def mixture(self, *, num_features: int, num_series: int) -> dict[str, tuple[Channel, HSTUConfig]]:
        """The channels of `MixtureModel`, by name; empty for a single transducer."""
        channels = {}
        for name, given in self.channels.items():
            if not isinstance(given, Mapping):
                raise ValueError(f"channels, {name}: expected `name: value` lines, got {given!r}")
            values = dict(given)
            own = values.pop("hstu", {})
            if not isinstance(own, Mapping):
                raise ValueError(f"channels, {name}, hstu: expected `name: value` lines, got {own!r}")
            config = replace(self, hstu=merge(self.hstu, own), channels={})
            sizes = config.hstu_config(num_features=num_features, num_series=num_series)
            channels[name] = build(Channel, values, f"channels, {name}"), sizes
        return channels

    def hstu_config(self, *, num_features: int, num_series: int) -> HSTUConfig:
        """The transducer's configuration for a data set with that many user features and slow series."""
        values = dict(self.hstu)
        mask = values.pop("mask", {})
        if not isinstance(mask, Mapping):
            raise ValueError(f"hstu, mask: expected `name: value` lines, got {mask!r}")
        defaults: dict[str, Any] = {
            "embedding_dim": self.embedding_dim,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "dropout": self.dropout,
            "max_seq_len": self.max_tokens(num_features=num_features, num_series=num_series),
            # In use a history is encoded before the request is known; so is it in training.
            "row_time": "event",
            "variant": Variant.ULTRA if self.model is ModelName.ULTRA_HSTU else Variant.RESEARCH,
        }
        attention = build(AttentionMask, mask, "hstu, mask")
        return build(HSTUConfig, {**defaults, **values, "mask": attention}, "hstu", {"mask": lambda given, _: given})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe file: the schema it names, settings for all models, and settings of single ones.

    Attributes:
        name: the file's, without suffix. schema: path. common, models: as in the file.
    """

    name: str
    schema: Path
    common: Mapping[str, Any]
    models: Mapping[str, Mapping[str, Any]]

    def settings(self, model: str | None = None, overrides: Mapping[str, Any] | None = None) -> RankSettings:
        """Settings of one model; ``overrides`` win over the model's section, that over the rest."""
        overrides = dict(overrides or {})
        name = _one_of(ModelName, "model", model or overrides.get("model") or self.common.get("model", "hstu"))
        merged: dict[str, Any] = {}
        for layer in (self.common, self.models.get(name, {}), overrides):
            merged = merge(merged, layer)
        return with_place(self.name, _settings, values={**merged, "model": name})


def read_recipe(path: Path) -> Recipe:
    """A recipe file.

    Raises:
        SchemaError: it cannot be read, or lacks the schema.
    """
    content = dict(read_yaml(path))
    schema = content.pop("schema", None)
    if not isinstance(schema, str):
        raise SchemaError(f"{path}, schema: expected the path of a schema file, got {schema!r}")
    models = content.pop("models", None) or {}
    if not isinstance(models, Mapping) or not all(isinstance(own, Mapping) for own in models.values()):
        raise SchemaError(f"{path}, models: expected settings below the names of models, got {models!r}")
    for name in models:
        with_place(f"{path}, models", _one_of, cls=ModelName, name="model", value=name)
    return Recipe(name=path.stem, schema=path.parent / schema, common=content, models=models)


def recipes() -> dict[str, Path]:
    """The package's recipes, by name."""
    folder = Path(str(files("ranking_configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml")) if not path.name.endswith(".schema.yaml")}


def find_recipe(name: str) -> Path:
    """A recipe of the package, or a file."""
    known = recipes()
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    raise SchemaError(f"RECIPE: expected a YAML file or one of {', '.join(known)}, got {name!r}")


def parse_overrides(words: Sequence[str]) -> dict[str, Any]:
    """``name=value`` words, ``hstu.mask.max_attn_len=64`` below a section; values are YAML."""
    merged: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise SchemaError(f"--set: expected name=value, got {word!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise SchemaError(f"--set: {name}: not a YAML value: {text!r}") from None
        for part in reversed(name.split(".")):
            value = {part: value}
        merged = merge(merged, value)
    return merged


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both, ``above`` winning; sections are merged in turn."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        merged[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return merged


def plain_settings(settings: RankSettings) -> dict[str, Any]:
    """As a mapping of plain values that `RankSettings` takes back."""
    values = {f.name: getattr(settings, f.name) for f in fields(settings)}
    values |= {name: merge({}, values[name]) for name in _SECTIONS}
    return {key: str(value) if isinstance(value, StrEnum) else value for key, value in values.items()}


def from_plain(values: Mapping[str, Any]) -> RankSettings:
    """The settings behind `plain_settings`."""
    return _settings(values)


def _settings(values: Mapping[str, Any]) -> RankSettings:
    given = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    keep = {name: (lambda value, _: value) for name in ("model", "form", "lr_schedule", *_SECTIONS)}
    assert {f.name for f in fields(RankSettings)} >= keep.keys()
    return build(RankSettings, given, "settings", keep)


def _one_of(cls: type[StrEnum], name: str, value: Any) -> Any:
    try:
        return cls(value)
    except ValueError:
        raise ValueError(f"{name}: expected one of {', '.join(cls)}, got {value!r}") from None


def _at_least(name: str, value: Any, minimum: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name}: expected an int >= {minimum}, got {value!r}")
