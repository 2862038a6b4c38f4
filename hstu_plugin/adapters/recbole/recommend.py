"""Recommendations for a user from a trained model, with titles where the data set has them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from rich.table import Table


class Trained(Protocol):
    """The part of a finished or loaded run that is needed here."""

    @property
    def config(self) -> Any: ...
    @property
    def dataset(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def test_data(self) -> Any: ...


class UnknownUserError(ValueError):
    """A user who is not in the data, or has no held-out interaction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """For one user, as of the held-out last interaction.

    Attributes:
        user: token.
        history: the tokens before it, oldest first, as far back as the model looks.
        held_out: token of that interaction's item.
        held_out_rank: its rank among the candidates, from 1.
        items: tokens with scores, best first.
    """

    user: str
    history: tuple[str, ...]
    held_out: str
    held_out_rank: int
    items: tuple[tuple[str, float], ...]


@torch.no_grad()
def recommend(run: Trained, user: str, k: int = 10, *, include_seen: bool = False) -> Recommendation:
    """The ``k`` best items for a user of the test set.

    Args:
        run: a trained model with its data.
        user: token as in the data.
        k: how many.
        include_seen: keep items of the user's earlier interactions, all of them and not only those the model sees.

    Raises:
        UnknownUserError: nothing is held out for that user.
    """
    config, dataset, model = run.config, run.dataset, run.model
    row = _test_row(run, user)
    model.eval()
    scores = model.full_sort_predict(row.to(config["device"])).view(-1).float().cpu().clone()
    # Id 0 is RecBole's padding.
    scores[0] = -torch.inf
    item_field = config["ITEM_ID_FIELD"]
    target = int(row[item_field][0])
    if not include_seen:
        seen = _seen(run, user)
        seen[dataset.id2token(item_field, target)] -= 1
        ids = dataset.field2token_id[item_field]
        hidden = [ids[token] for token, times in seen.items() if times > 0 and token in ids]
        scores[hidden] = -torch.inf
    length = int(row[config["ITEM_LIST_LENGTH_FIELD"]][0])
    history = row[item_field + config["LIST_SUFFIX"]][0][:length]
    best = torch.topk(scores, min(k, int(torch.isfinite(scores).sum())))
    return Recommendation(
        user=user,
        history=tuple(str(t) for t in dataset.id2token(item_field, history.cpu().numpy())),
        held_out=str(dataset.id2token(item_field, target)),
        held_out_rank=int((scores > scores[target]).sum()) + 1,
        items=tuple(
            (str(dataset.id2token(item_field, i)), s)
            for i, s in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ),
    )


def item_texts(dataset: Any) -> dict[str, tuple[str, str]]:
    """Title and remarks (year, classes) by item token, from the data set's ``.item`` file; empty without one."""
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    fields = [field.partition(":")[0] for field in lines[0].split("\t")]
    title = next((i for i, f in enumerate(fields) if i and ("title" in f or f.endswith("name"))), None)
    if title is None:
        return {}
    others = [
        i for i, f in enumerate(fields) if i and f in ("release_year", "year", "class", "genre", "genres", "categories")
    ]
    texts = {}
    for line in lines[1:]:
        cells = line.split("\t")
        if len(cells) == len(fields):
            texts[cells[0]] = (cells[title], ", ".join(cells[i] for i in others if cells[i]))
    return texts


def as_json(answer: Recommendation, texts: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """The answer in JSON types; titles where there are any."""

    def item(token: str) -> dict[str, Any]:
        return {"item": token, **({"title": texts[token][0]} if token in texts else {})}

    return {
        "user": answer.user,
        "items": [{"rank": r, **item(t), "score": s} for r, (t, s) in enumerate(answer.items, start=1)],
        "held_out": item(answer.held_out),
        "held_out_rank": answer.held_out_rank,
        "history": [item(token) for token in answer.history],
    }


def recommendation_tables(
    answer: Recommendation, texts: Mapping[str, tuple[str, str]], *, last: int = 8
) -> tuple[Table, Table]:
    """What the user had last, and what is recommended; the item that came next in fact is marked."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    def describe(token: str) -> Sequence[str]:
        return texts.get(token, (token, ""))

    shown = answer.history[-last:]
    # A title of the whole width, as a short table would break it.
    style: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "pad_edge": False, "min_width": 50}
    past = Table(title=f"User {answer.user}: the last {len(shown)} items", **style)
    best = Table(title=f"The next {len(answer.items)} recommended", **style)
    for table in (past, best):
        table.add_column("", justify="right", no_wrap=True)
        table.add_column("title" if texts else "item")
        table.add_column("about" if texts else "", style="dim")
    for number, token in enumerate(shown, start=-len(shown)):
        past.add_row(str(number), *describe(token))
    for rank, (token, _) in enumerate(answer.items, start=1):
        hit = token == answer.held_out
        title, about = describe(token)
        best.add_row(
            str(rank), f"{title}  <- came next in fact" if hit else title, about, style="bold green" if hit else None
        )
    return past, best


def _test_row(run: Trained, user: str) -> Any:
    """The user's row of the test set, an Interaction of length 1."""
    field = run.config["USER_ID_FIELD"]
    number = run.dataset.field2token_id[field].get(user)
    if number is None:
        known = [str(token) for token in run.dataset.field2id_token[field][1:4]]
        raise UnknownUserError(f"user: expected one of the data set, such as {', '.join(known)}; got {user!r}")
    rows = run.test_data._dataset.inter_feat
    at = torch.nonzero(rows[field] == number).view(-1)
    if len(at) == 0:
        raise UnknownUserError(f"user: {user!r} has too few interactions for one to be held out")
    return rows[at[-1:]]


def _seen(run: Trained, user: str) -> Counter[str]:
    """How often the user had each item, from the data file: rows in memory may be cut to the model's length."""
    import pandas as pd

    config, dataset = run.config, run.dataset
    separator = config["field_separator"]
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.inter"
    fields = (config["USER_ID_FIELD"], config["ITEM_ID_FIELD"])
    frame = pd.read_csv(path, sep=separator, dtype=str, usecols=lambda name: str(name).partition(":")[0] in fields)
    frame = frame.set_axis([str(name).partition(":")[0] for name in frame.columns], axis=1)
    return Counter(frame.loc[frame[fields[0]] == user, fields[1]].tolist())
