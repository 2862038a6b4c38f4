"""10,000 rows that are hard to quantise, and what FBGEMM makes of them: ``python tests/golden/int4_rows.py`` writes it.

The rows come from the bytes of Python's own generator and from exact operations, so they are the same on every machine.
The file holds a digest of FBGEMM's bytes for each case, and the bytes of one row in full. Making it needs fbgemm-gpu
(`make install-torchrec`); comparing with it does not.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

FILE = Path(__file__).with_suffix(".json")
# FBGEMM's operators take widths that give whole pairs of bytes.
WIDTHS = (4, 20, 64, 132)
ROWS = 250
EXAMPLE = 7


def _bits(generator: random.Random, rows: int, width: int) -> Tensor:
    """int32 ``[rows, width]`` of random bits."""
    return torch.frombuffer(bytearray(generator.randbytes(4 * rows * width)), dtype=torch.int32).view(rows, width)


def _uniform(generator: random.Random, rows: int, width: int) -> Tensor:
    """float32 in [-1, 1), multiples of 2^-23."""
    return (_bits(generator, rows, width) >> 8).float() * 2.0**-23


def cases() -> Iterator[tuple[str, Tensor]]:
    """Name and float32 rows of each case; all can be held in the formats."""
    for width in WIDTHS:
        generator = random.Random(width)
        base = _uniform(generator, ROWS, width)
        yield f"uniform-{width}", base
        yield f"two-grids-{width}", base * base * base * 3
        yield f"constant-{width}", base[:, :1].expand(-1, width).contiguous()
        # Here the rounded minimum may lie above the maximum: FBGEMM's scale is negative then.
        yield f"nearly-constant-{width}", base[:, :1] + base * 2.0**-12
        yield f"far-from-zero-{width}", base * 2.0**-4 + 1000
        yield f"huge-range-{width}", base * 65000
        outliers = base * 2.0**-6
        outliers[:, 0], outliers[:, -1] = -65504.0, 900_000.0
        yield f"outliers-{width}", outliers
        # Halves of the grid: rounding goes to the even code.
        yield f"halves-{width}", (_bits(generator, ROWS, width) & 31).float() * 0.5
        # Denormal numbers of float32, then of the float16 that scale and bias become.
        yield f"denormal-{width}", (_bits(generator, ROWS, width) & 0x007FFFFF).view(torch.float32)
        yield f"denormal-half-{width}", base * 2.0**-18


def digest(data: Tensor) -> str:
    """SHA-256 of the bytes of a table."""
    return hashlib.sha256(data.contiguous().numpy().tobytes()).hexdigest()


def fbgemm_rows(values: Tensor, bits: int) -> Tensor:
    """FBGEMM's rows ``[rows, bytes]``."""
    import fbgemm_gpu  # noqa: F401  # registers the operators

    packed: Tensor = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(values, bits)
    return packed


def main() -> None:
    """Write the file."""
    found = {}
    for name, values in cases():
        entry: dict[str, str] = {}
        for bits in (4, 8):
            rows = fbgemm_rows(values, bits)
            entry[f"int{bits}_sha256"] = digest(rows)
            entry[f"int{bits}_row_{EXAMPLE}"] = bytes(rows[EXAMPLE].tolist()).hex()
        found[name] = {"rows": values.shape[0], "input_sha256": digest(values), **entry}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "fbgemm-gpu", "fbgemm-gpu-cpu")}
    FILE.write_text(json.dumps({"made_with": versions, "cases": found}, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {FILE}: {sum(entry['rows'] for entry in found.values()):,} rows")


if __name__ == "__main__":
    main()
