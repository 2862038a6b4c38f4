"""Rows out of pinned host memory, read by the device itself, each distinct one once. SHAPE is a `shape.ReadShape`.

A copy of scattered rows needs a host that gathers them first. Here few programs stay on the device and walk over the
units of all rows: enough reads under way to fill the bus, and most of the device free for what else runs.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["total_rows", "tiles"])
def distinct_rows_kernel(out_ptr, data_ptr, ids_ptr, chosen_ptr, count_ptr, total_rows, tiles, SHAPE: tl.constexpr):
    """Row ``i`` of ``out [L, row_units]`` is ``data[ids[i]]`` where ``chosen[i] == i``, and not written elsewhere.

    ``tiles`` is ``ceil(L * row_units / block_units)``; the number of written rows is added to ``count``.
    """
    BLOCK: tl.constexpr = SHAPE.block_units
    UNITS: tl.constexpr = SHAPE.row_units
    place = tl.arange(0, BLOCK)
    written = tl.zeros([BLOCK], dtype=tl.int32)
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    for _ in range(tl.program_id(0), tiles, tl.num_programs(0)):
        # One division of 64 bits for the tile, small ones for its threads.
        first_row = begin // UNITS
        inner = place + (begin - first_row * UNITS).to(tl.int32)
        rows = first_row + inner // UNITS
        units = inner % UNITS
        in_batch = rows < total_rows
        chosen = tl.load(chosen_ptr + rows, mask=in_batch, other=-1)
        mine = in_batch & (chosen == rows)
        ids = tl.load(ids_ptr + rows, mask=mine, other=0).to(tl.int64)
        words = tl.load(data_ptr + ids * UNITS + units, mask=mine, other=0)
        tl.store(out_ptr + rows * UNITS + units, words, mask=mine)
        written += (mine & (units == 0)).to(tl.int32)
        begin += tl.num_programs(0).to(tl.int64) * BLOCK
    tl.atomic_add(count_ptr, tl.sum(written).to(tl.int64))
