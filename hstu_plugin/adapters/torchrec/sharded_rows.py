"""Reading the tables of collections, sharded or not: names, settings, and rows as blocks that every rank has whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection

_BLOCK_ELEMENTS = 1 << 24
Collection: TypeAlias = EmbeddingCollection | ShardedEmbeddingCollection


def table_weights(collection: Collection) -> dict[str, Tensor]:
    """Weight of each table by its name: a ``ShardedTensor`` where ranks hold parts of it.

    Raises:
        ValueError: a table is sharded in a way that is not served.
    """
    found: dict[str, Tensor] = {}
    for key, weight in collection.state_dict().items():
        name = key.removeprefix("embeddings.").removesuffix(".weight")
        if not isinstance(weight, ShardedTensor) and type(weight) not in (Tensor, torch.nn.Parameter):
            raise ValueError(
                f"table {name!r}: expected a tensor or a ShardedTensor, got a {type(weight).__name__}; shard it over "
                "the default process group"
            )
        found[name] = weight
    return found


def settings_of(collection: Collection) -> tuple[list[EmbeddingConfig], bool]:
    """A copy of the tables' settings, and whether lookups return the ids as well."""
    if isinstance(collection, EmbeddingCollection):
        return copy.deepcopy(collection.embedding_configs()), collection.need_indices()
    # TorchRec's sharded collections keep both to themselves.
    return copy.deepcopy(collection._embedding_configs), collection._need_indices


def row_blocks(weight: Tensor, block_elements: int = _BLOCK_ELEMENTS) -> Iterator[tuple[int, Tensor]]:
    """The rows of a table in order, as (first row, ``[n, D]``); at least one block.

    Those of a ``ShardedTensor`` are sent to all ranks of the default process group, which all iterate alike.
    """
    total, width = weight.size(0), weight.size(1)
    step = max(1, block_elements // width)
    for begin in range(0, max(total, 1), step):
        end = min(total, begin + step)
        yield begin, _gathered(weight, begin, end) if isinstance(weight, ShardedTensor) else weight[begin:end].detach()


def _gathered(weight: ShardedTensor, begin: int, end: int) -> Tensor:
    metadata = weight.metadata()
    local = {tuple(shard.metadata.shard_offsets): shard.tensor for shard in weight.local_shards()}
    device = _device_of(weight)
    block = torch.empty(end - begin, metadata.size[1], dtype=metadata.tensor_properties.dtype, device=device)
    for shard in metadata.shards_metadata:
        (row, column), (rows, columns) = shard.shard_offsets, shard.shard_sizes
        first, last = max(begin, row), min(end, row + rows)
        if first >= last or not columns:
            continue
        assert shard.placement is not None
        owner = shard.placement.rank()
        piece = torch.empty(last - first, columns, dtype=block.dtype, device=device)
        if owner == dist.get_rank():
            piece.copy_(local[row, column][first - row : last - row])
        dist.broadcast(piece, src=owner)
        block[first - begin : last - begin, column : column + columns] = piece
    return block


def _device_of(weight: ShardedTensor) -> torch.device:
    """Where this rank's parts lie, or would lie."""
    place = weight.metadata().shards_metadata[0].placement
    assert place is not None
    on_cuda = place.device().type == "cuda"
    return torch.device("cuda", torch.cuda.current_device()) if on_cuda else torch.device("cpu")
