"""Configuration of ranking: tasks, the form of the tokens, and what is known about items, actions and users."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise

from hstu_plugin.config import _checked_int, _enum, _expect, _positive, _probability, _set


class TaskKind(StrEnum):
    """``BINARY``: the probability of an event, from a logit. ``REGRESSION``: a number."""

    BINARY = "binary"
    REGRESSION = "regression"


class RegressionLoss(StrEnum):
    """Squared error, or Huber's: squared up to ``huber_delta``, linear beyond."""

    MSE = "mse"
    HUBER = "huber"


class TokenForm(StrEnum):
    """How an event becomes tokens.

    ``SUMMED``: one token, item plus action (ULTRA-HSTU). ``INTERLEAVED``: an item token, then an action token (HSTU).
    """

    SUMMED = "summed"
    INTERLEAVED = "interleaved"


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One thing to predict about a candidate.

    Attributes:
        name: in results; unique among the tasks.
        kind: binary or regression.
        weight: factor of the task's mean loss in the sum over tasks; 0 only measures.
        loss: of a regression. huber_delta: in the label's unit.
    """

    name: str
    kind: TaskKind = TaskKind.BINARY
    weight: float = 1.0
    loss: RegressionLoss = RegressionLoss.MSE
    huber_delta: float = 1.0

    def __post_init__(self) -> None:
        _name("name", self.name)
        _set(self, "kind", _enum(TaskKind, "kind", self.kind))
        _set(self, "loss", _enum(RegressionLoss, "loss", self.loss))
        number = isinstance(self.weight, int | float) and not isinstance(self.weight, bool)
        _expect(number and 0 <= self.weight < math.inf, "weight", "a finite number >= 0", self.weight)
        _positive("huber_delta", self.huber_delta)


@dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """Tasks and head of a ranker.

    Attributes:
        tasks: at least one, with different names; their order is that of the model's columns.
        head_dims: widths of the head's hidden layers; empty for a linear head.
        head_dropout: after each hidden layer.
    """

    tasks: tuple[TaskConfig, ...]
    head_dims: tuple[int, ...] = (128,)
    head_dropout: float = 0.0

    def __post_init__(self) -> None:
        _set(self, "tasks", _tuple_of(TaskConfig, "tasks", self.tasks))
        _expect(len(self.tasks) > 0, "tasks", "at least one task", self.tasks)
        _different("tasks", [task.name for task in self.tasks])
        _set(self, "head_dims", _tuple_of(int, "head_dims", self.head_dims))
        for width in self.head_dims:
            _checked_int("head_dims", width, 1)
        _probability("head_dropout", self.head_dropout)


@dataclass(frozen=True, kw_only=True)
class Categorical:
    """A feature with ids in ``[0, num_ids)``; 0 means unknown.

    Attributes:
        name: in messages. num_ids: rows of its table.
    """

    name: str
    num_ids: int

    def __post_init__(self) -> None:
        _name("name", self.name)
        _checked_int("num_ids", self.num_ids, 1)


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """How strong an action was, a number cut into buckets: a rating, a share of a video watched.

    Attributes:
        name: in messages.
        boundaries: rising; ``x`` falls into the bucket numbered by how many boundaries are ``<= x``.
    """

    name: str
    boundaries: tuple[float, ...]

    def __post_init__(self) -> None:
        _name("name", self.name)
        given = self.boundaries
        numbers = isinstance(given, list | tuple) and all(
            isinstance(b, int | float) and not isinstance(b, bool) and math.isfinite(b) for b in given
        )
        rising = numbers and len(given) > 0 and all(a < b for a, b in pairwise(given))
        _expect(rising, "boundaries", "one or more rising finite numbers", given)
        _set(self, "boundaries", tuple(float(b) for b in given))


@dataclass(frozen=True, kw_only=True)
class RankingFeatures:
    """What an event, its action and its user consist of; the column order of `Events` and of user features.

    Attributes:
        items: known about an item when it is shown (its id, its author, the page it is shown on); summed.
        action_types: names of the bits of an action, at most 62: click, like, ...
        intensities: numbers that belong to an action. action_contexts: ids that belong to an action (where it was
            done); hidden from candidates like the rest of the action.
        users: each becomes one contextual token.
        series: slowly changing ids of a user, known before the event; each run of equal values becomes one token
            among the events, at the time of its first.
        form: of the tokens.
        learned_no_action: a candidate's action is a learned row in place of zero (summed tokens only).
    """

    items: tuple[Categorical, ...]
    action_types: tuple[str, ...] = ()
    intensities: tuple[Intensity, ...] = ()
    action_contexts: tuple[Categorical, ...] = ()
    users: tuple[Categorical, ...] = ()
    series: tuple[Categorical, ...] = ()
    form: TokenForm = TokenForm.SUMMED
    learned_no_action: bool = False

    def __post_init__(self) -> None:
        for name in ("items", "action_contexts", "users", "series"):
            _set(self, name, _tuple_of(Categorical, name, getattr(self, name)))
            _different(name, [feature.name for feature in getattr(self, name)])
        _expect(len(self.items) > 0, "items", "at least one feature, the item's id", self.items)
        _set(self, "intensities", _tuple_of(Intensity, "intensities", self.intensities))
        _different("intensities", [feature.name for feature in self.intensities])
        _set(self, "action_types", _tuple_of(str, "action_types", self.action_types))
        _different("action_types", list(self.action_types))
        _expect(len(self.action_types) <= 62, "action_types", "at most 62 names", len(self.action_types))
        _set(self, "form", _enum(TokenForm, "form", self.form))
        _expect(isinstance(self.learned_no_action, bool), "learned_no_action", "a bool", self.learned_no_action)
        _expect(
            not (self.learned_no_action and self.form is TokenForm.INTERLEAVED),
            "learned_no_action",
            "False with interleaved tokens, whose candidates have no place for an action",
            self.learned_no_action,
        )

    @property
    def tokens_per_event(self) -> int:
        """Rows that one event takes in a sequence, series apart."""
        return 2 if self.form is TokenForm.INTERLEAVED else 1


def _name(name: str, value: object) -> None:
    _expect(isinstance(value, str) and value != "", name, "a non-empty name", value)


def _different(name: str, names: list[str]) -> None:
    _expect(len(set(names)) == len(names), name, "different names", names)


def _tuple_of(kind: type, name: str, values: object) -> tuple[object, ...]:
    whole = isinstance(values, list | tuple) and all(isinstance(value, kind) for value in values)
    _expect(whole, name, f"a sequence of {kind.__name__}", values)
    return tuple(values)  # type: ignore[arg-type]
