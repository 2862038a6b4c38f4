"""Where a run's settings come from: recipes of the package, files of the user, the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

# The plugin's defaults for a model, not a data set's recipe.
DEFAULTS_FILES = {"HSTU": "hstu", "ULTRAHSTU": "ultra_hstu", "ULTRA-HSTU": "ultra_hstu"}


class SettingsError(ValueError):
    """A setting, recipe or file that cannot be used."""


def recipes() -> dict[str, Path]:
    """The package's data set recipes, by name."""
    return {path.stem: path for path in sorted(_package().glob("*.yaml")) if path.stem not in DEFAULTS_FILES.values()}


def recipe_path(name: str) -> Path:
    """File of a recipe.

    Raises:
        SettingsError: there is none of that name; the message lists those there are.
    """
    known = recipes()
    if name not in known:
        raise SettingsError(f"--recipe: expected one of {', '.join(known)}, got {name!r}")
    return known[name]


def describe_recipe(path: Path) -> str:
    """First sentence of a recipe's opening comment."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#") or line.strip() == "#":
            break
        lines.append(line.lstrip("# ").rstrip())
    # "et al. 2015" would not end a sentence; no recipe has one.
    return " ".join(lines).split(". ")[0].rstrip(".")


def model_defaults(model: str) -> dict[str, Any]:
    """The plugin's defaults for one of its models; nothing for RecBole's own."""
    name = DEFAULTS_FILES.get(model.upper())
    return {} if name is None else read_settings([_package() / f"{name}.yaml"])


def recorded_results(dataset: str) -> Path | None:
    """Results that come with the package, written by ``hstu-recbole compare``; None where there are none."""
    path = _package() / "results" / f"{dataset}.json"
    return path if path.is_file() else None


def read_settings(paths: Iterable[Path]) -> dict[str, Any]:
    """Merge YAML files, later ones over earlier ones.

    Raises:
        SettingsError: a file that cannot be read or holds no mapping.
    """
    merged: dict[str, Any] = {}
    for path in paths:
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(f"{path}: cannot be read ({error.strerror})") from None
        except (yaml.YAMLError, UnicodeError) as error:
            raise SettingsError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        if content is None:
            continue
        if not isinstance(content, Mapping):
            raise SettingsError(f"{path}: expected settings as `name: value`, got {type(content).__name__}")
        merged.update(content)
    return merged


def parse_tokens(tokens: Sequence[str]) -> dict[str, str]:
    """``--name=value`` words as RecBole takes them.

    Raises:
        SettingsError: a word of another form, which RecBole would ignore, a name with two values, or YAML's words for
            nothing, which RecBole would take as text.
    """
    parsed: dict[str, str] = {}
    for token in tokens:
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not equals or not name:
            raise SettingsError(f"expected --name=value, got {token!r}")
        if "=" in value:
            raise SettingsError(f"{token}: RecBole takes no value with an equals sign here; put it in a YAML file")
        if value in ("~", "null"):
            raise SettingsError(
                f"{token}: expected None for nothing on the command line, got {value!r}; write --{name}=None"
            )
        if parsed.setdefault(name, value) != value:
            raise SettingsError(f"--{name} is given twice, as {parsed[name]!r} and {value!r}")
    return parsed


def _package() -> Path:
    # Both an editable install and a wheel unpack to files; only a zip import would not.
    return Path(str(files("recbole_configs")))
