"""Score a file of requests with a trained ranker.

``python -m hstu_plugin.adapters.torchrec.score --config c.yaml --requests in.parquet --output out.parquet``

The ranker is that of a training's newest checkpoint. A request is a row of the training's schema without labels; each
history is encoded once and its candidates are scored in micro-batches (M-FALCON). The output has the request's
candidates and, under each task's name, a list of scores in their order: probabilities of binary tasks, values of
regressions.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor

from hstu_plugin.adapters.torchrec.batch import SequenceBatch
from hstu_plugin.adapters.torchrec.checkpoint import CheckpointError, Checkpoints
from hstu_plugin.adapters.torchrec.data import to_batch
from hstu_plugin.adapters.torchrec.options import TaskName, TrainOptions
from hstu_plugin.adapters.torchrec.options_file import load_options
from hstu_plugin.adapters.torchrec.parquet import Column, CorruptFile, FileColumns, RowGroup, read_table
from hstu_plugin.adapters.torchrec.ranking import HSTURankingModel
from hstu_plugin.adapters.torchrec.train import join_group
from hstu_plugin.mfalcon import MFalconRanker

_REQUESTS_AT_ONCE = 64


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="hstu_plugin.adapters.torchrec.score", description=__doc__)
    parser.add_argument("--config", required=True, help="YAML file of the training")
    parser.add_argument("--requests", required=True, type=Path, help=".parquet or .jsonl, columns of the schema")
    parser.add_argument("--output", required=True, type=Path, help=".parquet or .jsonl")
    parser.add_argument("--micro-batch-size", type=int, default=256, help="candidates scored at once")
    parsed = parser.parse_args(arguments)
    try:
        options = load_options(parsed.config)
        model = load_ranker(options)
        score_file(model, options, parsed.requests, parsed.output, micro_batch_size=parsed.micro_batch_size)
    except (ValueError, FileNotFoundError, CheckpointError, CorruptFile) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def load_ranker(options: TrainOptions) -> HSTURankingModel:
    """The ranker of the newest checkpoint, whole on this process, in evaluation mode.

    Raises:
        ValueError: the configuration is that of a retrieval. CheckpointError: there is no usable checkpoint.
    """
    if options.task is not TaskName.RANKING or options.ranking is None:
        raise ValueError(f"task: expected ranking, got {options.task}; scoring needs a ranker")
    device, _ = join_group(options.run.timeout_s)
    folder = Path(options.run.output_dir) / "checkpoints"
    kept = Checkpoints(folder, keep=options.run.keep_checkpoints, group=dist.new_group(backend="gloo"))
    path = kept.newest()
    if path is None:
        raise CheckpointError(f"{folder}: no usable checkpoint")
    model = HSTURankingModel(
        options.model,
        options.schema,
        options.ranking,
        mixture=options.mixture,
        head_users=options.head_users,
        device=torch.device("cpu"),
    )
    kept.load(path, {f"model.{name}": value for name, value in model.state_dict().items()})
    kept.close()
    dist.destroy_process_group()
    return model.to(device).eval()


def score_file(
    model: HSTURankingModel, options: TrainOptions, requests: Path, output: Path, *, micro_batch_size: int
) -> None:
    """Score every request of a file; the output is written whole or not at all, in the order of the requests.

    Raises:
        ValueError: a file's ending is unknown, or a request does not fit the schema; names file, row and key.
    """
    writers = {".parquet": pq.write_table, ".jsonl": _write_lines}
    if output.suffix not in writers:
        raise ValueError(f"output: expected a name that ends with .parquet or .jsonl, got {output}")
    schema, ranking = options.schema, options.ranking
    assert ranking is not None and schema.candidate is not None
    columns = FileColumns(
        schema=schema,
        ids=(*schema.history, *schema.series, *schema.contextual, *schema.candidates),
        numbers=tuple(key for key in (*schema.along_history, *schema.along_candidates) if key in schema.number_keys),
        measures=tuple(key for key in schema.along_history if key in schema.measure_keys),
    )
    falcon = MFalconRanker(model.head.core, micro_batch_size=micro_batch_size)
    found: dict[str, list[Any]] = {name: [] for name in (schema.candidate, *(task.name for task in ranking.tasks))}
    for part in _read(requests, columns):
        history = {key: part[key].last(options.data.max_history) for key in schema.along_history}
        batch = to_batch({**part, **history}, schema)
        scores = score_batch(model, falcon, batch).cpu()
        lengths = part[schema.candidate].lengths.tolist()
        ids = torch.from_numpy(part[schema.candidate].values)
        found[schema.candidate] += [some.tolist() for some in torch.split(ids, lengths)]
        for k, task in enumerate(ranking.tasks):
            found[task.name] += [some.tolist() for some in torch.split(scores[:, k], lengths)]
    output.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=output.parent, prefix=f".{output.name}.")
    os.close(handle)
    try:
        writers[output.suffix](pa.table(found), temporary)
        os.replace(temporary, output)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@torch.no_grad()
def score_batch(model: HSTURankingModel, falcon: MFalconRanker, batch: SequenceBatch) -> Tensor:
    """``[total_candidates, num_tasks]`` probabilities and values; histories are encoded once."""
    moved = batch.to(next(model.parameters()).device)
    history, candidates = model.head.tokens(model.embeddings(moved.features), moved)
    scores = falcon.score(history, candidates)
    return model.head.core.head.predictions(scores)


def _read(path: Path, columns: FileColumns) -> Iterator[dict[str, Column]]:
    """Checked columns of a few requests at a time."""
    if path.suffix == ".jsonl":
        try:
            table = pyarrow.json.read_json(path)
        except pa.ArrowException as error:
            raise CorruptFile(f"{path}: not readable as JSON lines: {error}") from error
    elif path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise CorruptFile(f"{path}: not a readable parquet file: {error}") from error
    else:
        raise ValueError(f"requests: expected a name that ends with .parquet or .jsonl, got {path}")
    for first in range(0, table.num_rows, _REQUESTS_AT_ONCE):
        part = table.slice(first, _REQUESTS_AT_ONCE)
        yield read_table(part, RowGroup(str(path), 0, first, part.num_rows), columns)


def _write_lines(table: pa.Table, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for row in table.to_pylist():
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    sys.exit(main())
