"""A warp of 32 lanes that runs the PTX of `hstu_kernels.attention.triton.assembly`: registers are arrays of 32."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

Lanes = NDArray[np.generic]
LANE = np.arange(32)
# Where memory begins; every access has to lie inside it.
ORIGIN = 1 << 20

_TWO = {
    "add": np.add,
    "sub": np.subtract,
    "shr": np.right_shift,
    "shl": np.left_shift,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
}
_COMPARE = {"le": np.less_equal, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal, "neu": np.not_equal}


class Fault(Exception):
    """An access outside memory."""


def share(tile: Lanes, warp: int) -> list[Lanes]:
    """The elements of each lane, in order, of ``tile [M, N]`` as a product of Hopper leaves it."""
    group, pair = LANE >> 2, LANE & 3
    return [
        tile[16 * warp + group + 8 * (e >> 1 & 1), 8 * (e >> 2) + 2 * pair + (e & 1)] for e in range(tile.shape[1] // 2)
    ]


class Warp:
    """Warp ``warp`` of four. ``run`` returns the registers by name."""

    def __init__(self, memory: Lanes, warp: int) -> None:
        self.memory = memory
        self.registers: dict[str, Lanes] = {"%laneid": LANE, "%tid.x": LANE + 32 * warp, "%ntid.x": np.full(32, 128)}

    def run(self, text: str, first: int, *arguments: list[Lanes]) -> dict[str, Lanes]:
        """``arguments``: for each the values of each element; their operands begin at number ``first``."""
        for number, value in enumerate((x for argument in arguments for x in argument), first):
            self.registers[f"${number}"] = value
        lines = [line.strip() for line in text.strip("{} ").replace(":", ":;").split(";")]
        at = 0
        while at < len(lines):
            line = lines[at]
            at += 1
            if jump := re.match(r"@(\w+) bra.uni (\w+)", line):
                taken = self._value(jump[1])
                assert taken.all() or not taken.any(), "lanes part"
                at = lines.index(f"{jump[2]}:") if taken.all() else at
            elif line and not line.startswith(".reg") and not line.endswith(":"):
                self._step(line)
        return self.registers

    def _value(self, name: str) -> Lanes:
        if name in self.registers:
            return self.registers[name]
        return np.zeros(32) if name == "0f00000000" else np.full(32, int(name, 0))

    def _place(self, address: str, active: Lanes, size: int = 4) -> Lanes:
        name, _, offset = address.strip("[]").partition("+")
        place = (self._value(name)[active] + int(offset or 0) - ORIGIN) // size
        if (place < 0).any() or (place >= len(self.memory)).any():
            raise Fault(address)
        return place

    def _step(self, line: str) -> None:
        active = np.ones(32, bool)
        if guarded := re.match(r"@(!?)(\w+) (.*)", line):
            active = self._value(guarded[2]) ^ bool(guarded[1])
            line = guarded[3]
        name, rest = line.split(" ", 1)
        names = [x.strip() for x in rest.split(",")]
        kind, *parts = name.split(".")
        if kind == "red":
            size = 8 if parts[-1] == "u64" else 4
            np.add.at(self.memory, self._place(names[0], active, size), self._value(names[1])[active])
        elif kind == "setp":
            also = self._value(names[3]) if "and" in parts else np.ones(32, bool)
            found = _COMPARE[parts[0]](self._value(names[1]), self._value(names[2]))
            first, _, other = names[0].partition("|")
            self.registers[first] = found & also
            if other:
                self.registers[other] = ~found & also
        else:
            result = self._result(kind, parts, names)
            if active.all():
                self.registers[names[0]] = result
            else:
                self.registers[names[0]] = np.where(active, result, self._value(names[0]))

    def _result(self, kind: str, parts: list[str], names: list[str]) -> Lanes:
        if kind == "ld":
            return self.memory[self._place(names[1], np.ones(32, bool))]
        values = [self._value(x) for x in names[1:]]
        if kind == "mov":
            return values[0]
        if kind == "cvt":
            return np.rint(values[0]).astype(np.int64)
        if kind == "redux":
            return np.full(32, _TWO[parts[1]].reduce(values[0]))
        if kind == "shf":
            # Two registers side by side, turned by the low five bits of the third.
            both, by = (values[1].astype(np.uint64) << np.uint64(32)) | values[0].astype(np.uint64), values[2] & 31
            whole = both << by.astype(np.uint64) >> np.uint64(32) if parts[0] == "l" else both >> by.astype(np.uint64)
            return (whole & np.uint64(0xFFFFFFFF)).astype(np.int64)
        if kind == "brev":
            return np.array([int(f"{int(x):032b}"[::-1], 2) for x in values[0]])
        if kind == "bfind":
            assert parts == ["shiftamt", "u32"]
            return np.array([32 - int(x).bit_length() for x in values[0]])
        if kind == "mad":
            return values[0] * values[1] + values[2]
        if kind == "selp":
            return np.where(values[2], values[0], values[1])
        if kind == "shfl":
            assert "sync" in parts
            return values[0][values[1] if "idx" in parts else LANE ^ values[1]]
        return np.asarray(_TWO[kind](values[0], values[1]))
