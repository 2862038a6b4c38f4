"""PTX for a thread's whole share of a block ``[M, N]``: sums and look-ups that stay inside a warp.

A product of Hopper leaves 16 rows to each warp. Element ``b + 2 h + 4 j`` of thread ``lane = 4 g + t`` lies at row
``g + 8 h`` and column ``8 j + 2 t + b``: its diagonal, column less row, is ``8 (j - h) + 2 t + b - g``. So the 32
elements of a thread lie on 18 diagonals, and the same eight diagonals modulo 8 meet in every row.

Each text takes its operands as `tl.inline_asm_elementwise` numbers them: results, then all elements of one argument
after another. Those that rely on the places of elements check the indices that they are given, and turn the address
into 0, a fault that cannot be missed, were a compiler to place them otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

_WARP = "0xffffffff"


def constraints(results: str, count: int, *arguments: str, elements: int) -> str:
    """The constraint string: ``count`` registers of results, and a register for each element of each argument."""
    return ",".join([f"={results}"] * count + [kind for kind in arguments for _ in range(elements)])


def _block(lines: Sequence[str]) -> str:
    return "{ " + " ".join(line if line.endswith(":") else f"{line};" for line in lines) + " }"


def _registers(kind: str, names: Sequence[str]) -> str:
    return f".reg .{kind} " + ", ".join(names)


def _place_checks(index: Sequence[str], step: int) -> list[str]:
    """Into ``bad``: whether an element's index differs from what its place says; columns lie ``step`` apart."""
    lines = ["mov.b32 bad, 0"]
    place, distance = 1, step
    while place < len(index):
        offset = -8 * step if place == 2 else distance
        lines += [f"sub.s32 x, ${index[place]}, ${index[0]}", f"xor.b32 x, x, {offset}", "or.b32 bad, bad, x"]
        if place != 2:
            distance = 8 * step if place == 1 else 2 * distance
        place *= 2
    return lines


def _operands(first: int, elements: int) -> list[str]:
    return [str(first + i) for i in range(elements)]


def diagonal_look_up(elements: int, step: int, *, bounded: bool = False) -> str:
    """Entries ``index`` of a float32 table, one load for each diagonal: ``(index, table)``.

    ``step``: what the index grows by from column to column, 1 or -1; it falls by as much from row to row.
    ``bounded``: the last argument is the last entry; beyond 0 and it stand those two.
    """
    index, table, last = _operands(elements, elements), elements * 2, elements * 3
    columns = elements // 4
    diagonals = [(m, b) for m in range(-1, columns) for b in (0, 1)]
    names = {(m, b): f"d{m + 1}_{b}" for m, b in diagonals}
    lines = [_registers("b32", ["x", "bad"]), _registers("b64", ["a", "z"]), ".reg .pred p"]
    lines += [_registers("f32", list(names.values()))]
    lines += _place_checks(index, step)
    lines += ["setp.eq.b32 p, bad, 0", "mov.b64 z, 0"]
    if bounded:
        lines += [f"selp.b64 z, ${table}, z, p"]
        for m, b in diagonals:
            lines += [f"add.s32 x, ${index[0]}, {step * (8 * m + b)}", "max.s32 x, x, 0", f"min.s32 x, x, ${last}"]
            lines += ["mad.wide.s32 a, x, 4, z", f"ld.global.nc.f32 {names[m, b]}, [a]"]
    else:
        lines += [f"mad.wide.s32 a, ${index[0]}, 4, ${table}", "selp.b64 a, a, z, p"]
        lines += [f"ld.global.nc.f32 {names[m, b]}, [a+{4 * step * (8 * m + b)}]" for m, b in diagonals]
    for element in range(elements):
        b, h, j = element & 1, element >> 1 & 1, element >> 2
        lines.append(f"mov.b32 ${element}, {names[j - h, b]}")
    return _block(lines)


def add_diagonals(elements: int, *, exact: bool = False) -> str:
    """Add the sum of each diagonal to its float32 entry: ``(grad, index, sums, last)``; results say nothing.

    ``exact``: to int64 entries, times a float32 factor that is the last argument: sums that know no order.

    ``index``: entries of the elements, growing from column to column; beyond 0 and ``last`` stand those two.
    Eight rows of a warp are added up in three exchanges; each lane is left with a few diagonals that lie 8 apart.
    """
    columns = elements // 4
    results = elements // 4
    grad = _operands(results, elements)
    index = _operands(results + elements, elements)
    sums, last, factor = (results + place * elements for place in (2, 3, 4))
    span = columns + 2
    half = (span + 1) // 2
    quarter = (half + 1) // 2
    wide = [f"{kind}{n}" for kind in ("e", "o") for n in range(columns + 1)]
    wide += [f"{kind}{n}" for kind in ("w", "u", "v") for n in range(span)]
    lines = [
        _registers("b32", ["lane", "g", "t", "x", "y", "bad", "base", "at", "r1", "r2", "r3"]),
        _registers("b64", ["table", "z", "a", "whole"]),
        _registers("pred", ["p", "q", "late", "upper"]),
        _registers("f32", [*wide, "s", "r"]),
        "mov.u32 lane, %laneid",
        "shr.u32 g, lane, 2",
        "and.b32 t, lane, 3",
    ]
    # Rows 8 apart, columns 8 apart: the same diagonal in the same thread. e: even columns, o: odd ones.
    for b, kind in enumerate("eo"):
        lines.append(f"mov.b32 {kind}0, ${grad[b + 2]}")
        for m in range(columns - 1):
            lines.append(f"add.f32 {kind}{m + 1}, ${grad[b + 4 * m]}, ${grad[b + 2 + 4 * (m + 1)]}")
        lines.append(f"mov.b32 {kind}{columns}, ${grad[b + 4 * (columns - 1)]}")
    # Now w, u: diagonal r + 8 (n - 2) with r = (2 t + b - g) modulo 8, the same n in all lanes.
    lines += ["shl.b32 x, t, 1", "sub.s32 x, x, g", "setp.ge.s32 p, x, 0", "setp.ge.s32 q, x, -1"]
    for n in range(span):
        for kind, found, flag in (("w", "e", "p"), ("u", "o", "q")):
            later = f"{found}{n - 1}" if n else "0f00000000"
            now = f"{found}{n}" if n <= columns else "0f00000000"
            lines.append(f"selp.f32 {kind}{n}, {later}, {now}, {flag}")
    # The other row of a pair holds this lane's diagonals at its odd columns: 2 t + 1 one row on, 2 t - 1 one back.
    lines += ["and.b32 y, g, 1", "setp.eq.b32 p, y, 0"]
    lines += ["sub.s32 y, t, 1", "and.b32 y, y, 3", "selp.b32 y, t, y, p"]
    lines += ["and.b32 x, lane, 28", "xor.b32 r1, x, 4", "or.b32 r1, r1, y"]
    # Two rows on, 2 t + 2; two back, 2 t - 2.
    lines += ["and.b32 y, g, 2", "setp.ne.b32 late, y, 0", "selp.b32 y, 3, 1, late", "add.s32 y, y, t"]
    lines += ["and.b32 y, y, 3", "xor.b32 r2, x, 8", "or.b32 r2, r2, y"]
    lines += ["and.b32 y, g, 4", "setp.ne.b32 upper, y, 0", "xor.b32 r3, lane, 18"]
    for n in range(span):
        lines += [f"shfl.sync.idx.b32 r, u{n}, r1, 31, {_WARP}", f"add.f32 v{n}, w{n}, r"]
    lines += _exchange("v", span, half, "w", "late", "r2") + _exchange("w", half, quarter, "v", "upper", "r3")
    # The warp's entry of row 0 and column 0, as each lane knows it.
    lines += _place_checks(index, 1)
    lines += ["shl.b32 x, t, 1", f"sub.s32 base, ${index[0]}, x", "add.s32 base, base, g"]
    lines += [f"shfl.sync.idx.b32 y, base, 0, 31, {_WARP}", "xor.b32 y, y, base", "or.b32 bad, bad, y"]
    lines += ["setp.eq.b32 p, bad, 0", "mov.b64 z, 0", f"selp.b64 table, ${sums}, z, p"]
    lines += ["sub.s32 x, x, g", "and.b32 x, x, 7", "add.s32 at, base, x", "sub.s32 at, at, 16"]
    lines += [f"selp.b32 x, {8 * half}, 0, late", "add.s32 at, at, x"]
    lines += [f"selp.b32 x, {8 * quarter}, 0, upper", "add.s32 at, at, x"]
    for k in range(quarter):
        lines += [f"add.s32 x, at, {8 * k}", "max.s32 x, x, 0", f"min.s32 x, x, ${last}"]
        lines += [f"mad.wide.s32 a, x, {8 if exact else 4}, table", f"setp.neu.f32 q, v{k}, 0f00000000"]
        if exact:
            lines += [f"mul.f32 s, v{k}, ${factor}", "cvt.rni.s64.f32 whole, s", "@q red.global.add.u64 [a], whole"]
        else:
            lines += [f"@q red.global.add.f32 [a], v{k}"]
    lines += [f"mov.b32 ${n}, 0" for n in range(results)]
    return _block(lines)


def _exchange(source: str, count: int, kept: int, target: str, flag: str, partner: str) -> list[str]:
    """``target[0..kept)``: half of ``source[0..count)``, the latter where ``flag``, plus the partner's same half."""
    lines = []
    for k in range(kept):
        second = f"{source}{kept + k}" if kept + k < count else "0f00000000"
        lines += [f"selp.f32 s, {source}{k}, {second}, {flag}", f"shfl.sync.idx.b32 r, s, {partner}, 31, {_WARP}"]
        lines += [f"selp.f32 s, {second}, {source}{k}, {flag}", f"add.f32 {target}{k}, s, r"]
    return lines


def add_by_threshold(elements: int, more: int) -> str:
    """Add sums by class to ``sums[class * warps + warp]``: ``(grad, row, key, bounds..., sums)`` with ``more`` bounds.

    An element's class is the number of int32 ``bounds``, which ascend, that ``row - key`` reaches. Results say
    nothing.
    """
    results = elements // 4
    grad = _operands(results, elements)
    row, key = _operands(results + elements, elements), _operands(results + 2 * elements, elements)
    bounds = [results + (3 + i) * elements for i in range(more)]
    sums = results + (3 + more) * elements
    if not more:
        # Without a threshold there is nothing to compare.
        sums = results + elements
    predicates = [f"p{i}" for i in range(more)] + [f"q{i}" for i in range(more)]
    lines = [_registers("b32", ["x"]), _registers("pred", ["p", *predicates])]
    lines += [_registers("f32", [f"s{i}_{part}" for i in range(more + 1) for part in range(4)] + ["r"])]
    lines += [f"mov.b32 s{i}_{part}, 0f00000000" for i in range(more + 1) for part in range(4)]
    for element in range(elements):
        # Four sums each: an addition waits four cycles for the one before.
        part, value = element & 3, grad[element]
        if not more:
            lines.append(f"add.f32 s0_{part}, s0_{part}, ${value}")
            continue
        lines.append(f"sub.s32 x, ${row[element]}, ${key[element]}")
        for i in range(more):
            if i == 0:
                lines.append(f"setp.ge.s32 p{i}|q{i}, x, ${bounds[i]}")
            else:
                lines.append(f"setp.ge.and.s32 p{i}|q{i}, x, ${bounds[i]}, p{i - 1}")
            lines.append(f"@q{i} add.f32 s{i}_{part}, s{i}_{part}, ${value}")
        lines.append(f"@p{more - 1} add.f32 s{more}_{part}, s{more}_{part}, ${value}")
    return _block(lines + _add_over_warp(more + 1, sums) + [f"mov.b32 ${n}, 0" for n in range(results)])


def add_by_bucket(elements: int) -> str:
    """Add sums by bucket to ``sums[bucket * warps + warp]``: ``(grad, bucket, sums)``; results say nothing.

    Each warp goes through the buckets that it meets, four at a time, and adds up in one order. Which it meets, modulo
    32, is a set of bits: most warps that span many buckets meet half of them.
    """
    results = elements // 4
    grad, bucket = _operands(results, elements), _operands(results + elements, elements)
    sums = results + 2 * elements
    names = ["low", "high", "lane", "warp", "warps", "x", "y", "met", "c0", "c1", "c2", "c3"]
    lines = [_registers("b32", names), _registers("pred", ["p0", "p1", "p2", "p3", "late", "upper", "writes", "more"])]
    lines += [_registers("f32", ["s0", "s1", "s2", "s3", "r", "s", "t"]), _registers("b64", ["a"])]
    lines += [f"min.s32 low, ${bucket[0]}, ${bucket[1]}", f"max.s32 high, ${bucket[0]}, ${bucket[1]}", "mov.b32 met, 0"]
    for index in bucket[2:]:
        lines += [f"min.s32 low, low, ${index}", f"max.s32 high, high, ${index}"]
    for index in bucket:
        lines += [f"shf.l.wrap.b32 x, 0, 1, ${index}", "or.b32 met, met, x"]
    lines += [f"redux.sync.min.s32 low, low, {_WARP}", f"redux.sync.max.s32 high, high, {_WARP}"]
    lines += [f"redux.sync.or.b32 met, met, {_WARP}"]
    lines += ["mov.u32 lane, %laneid", "mov.u32 warp, %tid.x", "shr.u32 warp, warp, 5", "mov.u32 warps, %ntid.x"]
    lines += ["shr.u32 warps, warps, 5", "and.b32 x, lane, 16", "setp.ne.b32 late, x, 0"]
    lines += ["and.b32 x, lane, 8", "setp.ne.b32 upper, x, 0", "and.b32 x, lane, 7", "setp.eq.b32 writes, x, 0"]
    lines += ["mov.b32 c0, low"]
    lines += ["AGAIN:"]
    for i in range(1, 4):
        lines += _next_met(f"c{i - 1}", f"c{i}")
    lines += [f"mov.b32 s{i}, 0f00000000" for i in range(4)]
    for element in range(elements):
        lines += [f"setp.eq.s32 p{i}, ${bucket[element]}, c{i}" for i in range(4)]
        lines += [f"@p{i} add.f32 s{i}, s{i}, ${grad[element]}" for i in range(4)]
    # Each lane is left with one of the four.
    for kept, sent in (("s0", "s2"), ("s1", "s3")):
        lines += [f"selp.f32 s, {kept}, {sent}, late", f"shfl.sync.bfly.b32 r, s, 16, 31, {_WARP}"]
        lines += [f"selp.f32 s, {sent}, {kept}, late", f"add.f32 {kept}, s, r"]
    lines += ["selp.f32 s, s0, s1, upper", f"shfl.sync.bfly.b32 r, s, 8, 31, {_WARP}"]
    lines += ["selp.f32 s, s1, s0, upper", "add.f32 t, s, r"]
    for distance in (4, 2, 1):
        lines += [f"shfl.sync.bfly.b32 r, t, {distance}, 31, {_WARP}", "add.f32 t, t, r"]
    lines += ["selp.b32 x, c1, c0, upper", "selp.b32 y, c3, c2, upper", "selp.b32 x, y, x, late"]
    lines += ["mad.lo.s32 x, x, warps, warp", f"mad.wide.s32 a, x, 4, ${sums}"]
    lines += ["setp.neu.and.f32 p0, t, 0f00000000, writes", "@p0 red.global.add.f32 [a], t"]
    lines += [*_next_met("c3", "c0"), "setp.le.s32 more, c0, high", "@more bra.uni AGAIN"]
    return _block(lines + [f"mov.b32 ${n}, 0" for n in range(results)])


def _next_met(last: str, following: str) -> list[str]:
    """``following``: the least number above ``last`` whose bit modulo 32 is in ``met``, which is not 0."""
    lines = [f"add.s32 x, {last}, 1", "shf.r.wrap.b32 y, met, met, x", "brev.b32 y, y"]
    return [*lines, "bfind.shiftamt.u32 y, y", f"add.s32 {following}, x, y"]


def _add_over_warp(count: int, sums: int) -> list[str]:
    """Add ``s{i}_{0..3}`` of all lanes to entry ``i * warps + warp`` at operand ``sums``, by the first lane."""
    lines = [_registers("b32", ["lane", "warp", "warps"]), _registers("b64", ["a"]), ".reg .pred first, some"]
    for i in range(count):
        lines += [f"add.f32 s{i}_0, s{i}_0, s{i}_1", f"add.f32 s{i}_2, s{i}_2, s{i}_3"]
        lines += [f"add.f32 s{i}_0, s{i}_0, s{i}_2"]
    for distance in (16, 8, 4, 2, 1):
        for i in range(count):
            lines += [f"shfl.sync.bfly.b32 r, s{i}_0, {distance}, 31, {_WARP}", f"add.f32 s{i}_0, s{i}_0, r"]
    lines += ["mov.u32 lane, %laneid", "mov.u32 warp, %tid.x", "shr.u32 warp, warp, 5", "mov.u32 warps, %ntid.x"]
    lines += ["shr.u32 warps, warps, 5", "setp.eq.u32 first, lane, 0"]
    for i in range(count):
        lines += [f"setp.neu.and.f32 some, s{i}_0, 0f00000000, first", f"mad.wide.u32 a, warp, 4, ${sums}"]
        lines += [f"@some red.global.add.f32 [a], s{i}_0", "add.u32 warp, warp, warps"]
    return lines
