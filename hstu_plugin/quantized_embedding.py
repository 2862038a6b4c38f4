"""Embedding tables in quantised rows: looked up row by row, scored against in chunks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from hstu_kernels.int4 import PackedRows, gather_rows, unpack_rows

# Elements of the table that are dense at a time while all of it is scored.
_CHUNK_ELEMENTS = 1 << 24


class QuantizedEmbedding(nn.Module):
    """Stands in for an ``nn.Embedding`` in inference; rows become numbers only when they are asked for.

    The result of a lookup has the type that the table had, and follows ``.to(dtype)`` and ``.half()`` of the model.
    On a CPU an id outside the table is refused; on a GPU it gives a row of NaN (`hstu_kernels.int4.gather_rows`).
    """

    packed: Tensor
    _like: Tensor

    def __init__(self, rows: PackedRows, *, dtype: torch.dtype = torch.float32, padding_idx: int | None = None) -> None:
        super().__init__()
        self.format = rows.format
        self.num_embeddings, self.embedding_dim = rows.num_rows, rows.dim
        self.padding_idx = padding_idx
        self.register_buffer("packed", rows.data)
        # Casts of a model change its floating point buffers alone; this one remembers them.
        self.register_buffer("_like", torch.empty(0, dtype=dtype, device=rows.device), persistent=False)
        self.eval()

    @property
    def rows(self) -> PackedRows:
        """The table."""
        return PackedRows(self.packed, self.embedding_dim, self.format)

    @property
    def weight(self) -> Tensor:
        """The whole table as numbers ``[rows, D]``, made at each call: for models that score against it themselves."""
        self._refuse_training()
        return unpack_rows(self.rows, self._like.dtype)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., D]`` for integer ids ``[...]``; the argument is called as that of ``nn.Embedding``."""
        self._refuse_training()
        dtype = self._like.dtype
        direct = torch.float32 if dtype == torch.float64 else dtype
        values = gather_rows(self.rows, input.reshape(-1), dtype=direct).to(dtype)
        return values.view(*input.shape, self.embedding_dim)

    def chunks(self, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """First row and numbers ``[some, D]`` of one part of the table after the other.

        Args:
            rows: of a part; default: some 16 million elements.
        """
        self._refuse_training()
        step = max(1, _CHUNK_ELEMENTS // self.embedding_dim) if rows is None else rows
        for begin in range(0, self.num_embeddings, step):
            part = PackedRows(self.packed[begin : begin + step], self.embedding_dim, self.format)
            yield begin, unpack_rows(part, self._like.dtype)

    def scores(
        self, users: Tensor, prepare: Callable[[Tensor], Tensor] | None = None, *, rows: int | None = None
    ) -> Tensor:
        """``users @ prepare(table).T``, ``[B, rows]``, with one part of the table as numbers at a time.

        Args:
            users: ``[B, D]``.
            prepare: row-wise function of table rows, such as a normalisation.
            rows: of a part, as in `chunks`.
        """
        out = users.new_empty(users.shape[0], self.num_embeddings)
        for begin, part in self.chunks(rows):
            vectors = part if prepare is None else prepare(part)
            out[:, begin : begin + part.shape[0]] = users @ vectors.to(users.dtype).T
        return out

    def extra_repr(self) -> str:
        """Size and format."""
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format}"

    def _refuse_training(self) -> None:
        if self.training:
            raise ValueError(
                "module: expected a model in evaluation mode, got one in training; quantised tables have no gradients: "
                "call .eval(), or train the full-precision model and quantise it again"
            )


class QuantizedLinear(nn.Module):
    """Stands in for an ``nn.Linear`` whose weight is a quantised table: scores over all its rows, in chunks."""

    bias: nn.Parameter | None

    def __init__(self, table: QuantizedEmbedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.table = table
        self.bias = bias
        self.eval()

    @property
    def weight(self) -> Tensor:
        """The table as numbers ``[rows, D]``, made at each call."""
        return self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        """``[..., rows]`` for ``x [..., D]``."""
        scores = self.table.scores(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.table.num_embeddings)
        return scores if self.bias is None else scores + self.bias
