"""The recipe ml-1m-ratings on files in the form of MovieLens-1M's atomic files, made up here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from hstu_plugin.adapters.ranking import launch, settings
from hstu_plugin.adapters.ranking.dataset import TEST, TRAIN, VALID, load
from hstu_plugin.adapters.ranking.schema import parse_schema, read_schema
from hstu_plugin.adapters.ranking.tables import DataError

RECIPE = "ml-1m-ratings"
USERS, FILMS, RATED = 40, 24, 20


def ratings() -> pd.DataFrame:
    """A user likes films with even or with odd ids; users one after the other, int32, as the atomic file has it."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(1, USERS + 1):
        films = rng.permutation(FILMS)[:RATED] + 1
        times = 956_703_932 + np.sort(rng.integers(0, 90_000_000, RATED))
        for film, time in zip(films, times, strict=True):
            liked = (film + user) % 2 == 0
            rows.append((user, film, rng.integers(4, 6) if liked else rng.integers(1, 4), time, 0))
    names = ["user_id:token", "item_id:token", "rating:float", "timestamp:float", "ts_err:float"]
    return pd.DataFrame(rows, columns=names).astype(np.int32)


def write(folder: Path) -> Path:
    folder.mkdir()
    ratings().to_parquet(folder / "ml-1m.inter.parquet")
    # A film that nobody rated and one without a genre; titles with quotes and commas.
    films = ["item_id:token\tmovie_title:token_seq\trelease_year:token\tgenre:token_seq"]
    films += [
        f'{film}\tFilm "{film}", The\t{1990 + film % 9}\t{"" if film == 3 else "Comedy Drama"}'
        for film in range(1, FILMS + 2)
    ]
    (folder / "ml-1m.item").write_text("\n".join(films) + "\n", encoding="utf-8")
    users = ["user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token"]
    users += [
        f"{user}\t{(1, 18, 25)[user % 3]}\t{'FM'[user % 2]}\t{user % 20}\t0{user:04}" for user in range(1, USERS + 1)
    ]
    (folder / "ml-1m.user").write_text("\n".join(users) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("movielens") / "ml-1m")


def test_what_is_read(data: Path) -> None:
    found = load(read_schema(settings.read_recipe(settings.find_recipe(RECIPE)).schema), data)
    log = found.log
    assert [task.name for task in found.tasks] == ["liked", "rating"]
    assert [f.name for f in found.features.items] == ["item", "release_year", "genre"]
    assert [f.name for f in found.features.users] == ["user", "age", "gender", "occupation"]
    table = ratings()
    assert found.facts["users"] == USERS and found.facts["items"] == FILMS
    # Rows stand user by user in order of time: labels are the ratings, unrounded, and whether they are 4 or 5.
    order = np.lexsort((table["timestamp:float"], table["user_id:token"].astype(str)))
    rated = table["rating:float"].to_numpy()[order]
    labels = np.asarray(log.labels)
    assert labels[:, 1].tolist() == rated.tolist() and labels[:, 0].tolist() == (rated >= 4).tolist()
    assert log.events.timestamps is not None
    assert log.events.timestamps.tolist() == table["timestamp:float"].to_numpy()[order].tolist()
    # A tenth tests, a tenth validates, cut over all users at one time each.
    times, roles = log.events.timestamps, log.roles
    assert (roles == TEST).sum().item() == (roles == VALID).sum().item() == USERS * RATED // 10
    assert times[roles == TRAIN].max() < times[roles == VALID].min()
    assert times[roles == VALID].max() < times[roles == TEST].min()


def test_text_gives_the_same_log(data: Path, tmp_path: Path) -> None:
    schema = settings.read_recipe(settings.find_recipe(RECIPE)).schema
    plain: dict[str, Any] = yaml.safe_load(Path(schema).read_text(encoding="utf-8"))
    plain["events"]["file"] = "ml-1m.inter"
    folder = write(tmp_path / "text")
    ratings().to_csv(folder / "ml-1m.inter", sep="\t", index=False)
    as_text = load(parse_schema(plain, "schema"), folder)
    as_table = load(read_schema(schema), data)
    assert as_text.facts == as_table.facts
    assert np.array_equal(np.asarray(as_text.log.labels), np.asarray(as_table.log.labels))
    assert as_text.log.events.items.tolist() == as_table.log.events.items.tolist()
    (folder / "ml-1m.item").unlink()
    with pytest.raises(DataError, match=r"ml-1m\.item: no such file"):
        load(parse_schema(plain, "schema"), folder)


@pytest.mark.parametrize("model", ["hstu", "ultra-hstu", "dlrm"])
def test_the_recipe_learns_from_it(model: str, data: Path, tmp_path: Path) -> None:
    small = {"embedding_dim": 16, "num_layers": 1, "head_dims": [16], "dropout": 0.0, "head_dropout": 0.0}
    small |= {"batch_size": 16, "learning_rate": 0.01, "warmup_steps": 5, "epochs": 6, "weight_decay": 0.0}
    if model == "hstu":  # one window of a user would be two steps an epoch
        small |= {"train_candidates": 4, "batch_size": 8, "epochs": 12}
    request = launch.Request(
        recipe=RECIPE, data=data, output_dir=tmp_path, models=[model, "item-mean"], device="cpu", overrides=small
    )
    learned, floor = launch.execute(request, lambda _line: None)
    # Whether a user likes even or odd films stands in the ratings of the history alone.
    assert learned["test"]["liked"]["auc"] > 0.7 > 0.65 > floor["test"]["liked"]["auc"]
    assert learned["test"]["rating"]["rmse"] < floor["test"]["rating"]["rmse"]
    assert {"auc", "gauc", "ne", "log_loss"} <= learned["test"]["liked"].keys()
