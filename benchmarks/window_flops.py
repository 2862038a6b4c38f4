"""``python -m benchmarks.window_flops``: operations of models over the real windows of a data set, without training.

A case is a model with settings over the recipe's and the common ones (``--NAME=VALUE`` behind the options):

    python -m benchmarks.window_flops --recipe ml-1m-best --case "HSTU" \\
        --case "ULTRA-HSTU max_attn_len=32 full_attn_tail_len=32" -- --MAX_ITEM_LIST_LENGTH=400

Counted are the encoder's products by exact visible pairs (`hstu_plugin.flops`), over the windows of one pass of
training and over those of one test. Shares are of the first case.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from torch import Tensor

from benchmarks.machine import provenance
from hstu_plugin.config import HSTUConfig
from hstu_plugin.flops import prefill_flops

_PATH = click.Path(path_type=Path, dir_okay=False)


@click.command(help=__doc__, context_settings={"max_content_width": 110, "ignore_unknown_options": True})
@click.option("--recipe", required=True)
@click.option("--case", "cases", multiple=True, default=("HSTU", "ULTRA-HSTU"), metavar="'MODEL [NAME=VALUE]...'")
@click.option("--output", type=_PATH, help="Write the counts to this JSON file.")
@click.option("--commit", help="To record. Default: that of this checkout.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[--NAME=VALUE]...")
def main(recipe: str, cases: tuple[str, ...], output: Path | None, commit: str | None, words: tuple[str, ...]) -> None:
    rows: list[dict[str, Any]] = []
    for case in cases:
        model, *own = case.split()
        config, lengths = load(recipe, model, [*words, *(f"--{word}" for word in own)])
        for split, found in lengths.items():
            row = {"case": case, "split": split, "windows": len(found), "events": int(found.sum())}
            rows.append(row | count(config, found))
            first = next(r for r in rows if r["split"] == split)
            for part in ("attention", "linear", "total"):
                rows[-1][f"{part}_share"] = rows[-1][part] / first[part]
            click.echo(
                f"{split:5} {len(found):7} windows, {int(found.sum()):9} events: attention {rows[-1]['attention']:.4g} "
                f"operations ({rows[-1]['attention_share']:.3f}), all {rows[-1]['total']:.4g} "
                f"({rows[-1]['total_share']:.3f})  {case}"
            )
    if output:
        import torch

        report = provenance(torch.device("cpu"), commit) | {"recipe": recipe, "settings": list(words), "rows": rows}
        output.parent.mkdir(parents=True, exist_ok=True)
        part_file = output.with_suffix(".part")
        part_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        part_file.replace(output)


def load(recipe: str, model: str, words: Sequence[str]) -> tuple[HSTUConfig, dict[str, Tensor]]:
    """The encoder that a run with these settings has, and ``[windows]`` int64 events of its windows by split."""
    from hstu_plugin.adapters.recbole import prepare, settings
    from hstu_plugin.adapters.recbole.options import hstu_config
    from hstu_plugin.adapters.recbole.register import register

    register()
    with prepare.quiet_recbole():
        config = prepare.make_config(model, None, [settings.recipe_path(recipe)], None, words)
        _, (training, _, test) = prepare.make_data(config)
    name = config["ITEM_LIST_LENGTH_FIELD"]
    lengths = {
        split: part.dataset.inter_feat[name].long()
        for split, part in (("train", training), ("test", test))
        if part is not None
    }
    return hstu_config(config.final_config_dict), lengths


def count(config: HSTUConfig, lengths: Tensor) -> dict[str, float]:
    """Operations of one forward pass over windows of these lengths."""
    flops = prefill_flops(config, lengths)
    return {name: float(getattr(flops, name).sum()) for name in ("attention", "linear", "total")}


if __name__ == "__main__":
    main()
