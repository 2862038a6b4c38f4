"""The kernels of a copy in the compiler's first form: what it makes of their source, without a GPU and in a second."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.stages.patching import Copy
from benchmarks.stages.studies import BACKWARD, CACHED, Study
from hstu_kernels.attention.triton.hopper_launch import shared_layout
from hstu_kernels.attention.triton.tiles import KernelShape, padded_width, tile_set
from hstu_kernels.testing import BiasKind

_TABLES = ("pos_ptr", "time_ptr", "bounds_ptr", "row_times_ptr", "key_times_ptr", "key_spans_ptr", "row_spans_ptr")
_SUMS = ("pos_sums_ptr", "pos_factor_ptr", "time_sums_ptr")
_INT64 = ("work_ptr", "bounds_ptr", "row_times_ptr", "key_times_ptr", "key_spans_ptr", "row_spans_ptr")


def lowered(study: Study, copy: Copy, dtype: torch.dtype) -> Iterator[str]:
    """Text of each kernel that a call of ``study`` may take."""
    case = study.chosen()
    width = case.qk_dim
    if study.direction == CACHED:
        kernel = copy.module("hopper_target").hopper_target_kernel
        yield _gluon(kernel, 128, {"HEADS": 4, "D": width, "BLOCK_N": 128, "STAGES": 2, "SPLIT_BLOCKS": 16}, dtype)
    elif study.direction == BACKWARD:
        yield _plain(copy.module("backward_queries").hstu_bwd_dq_kernel, "dq", study, dtype)
        yield _plain(copy.module("backward_keys").hstu_bwd_dkdv_kernel, "dkdv", study, dtype)
    else:
        if case.bias is BiasKind.NONE and width == 128:
            slots = {"BLOCK_N": 64, "STAGES": 3 if case.length >= 4096 else 4}
            yield _gluon(copy.module("hopper_forward").hopper_fwd_kernel, 64, {"HEADS": 4, "D": width, **slots}, dtype)
        else:
            yield _plain(copy.module("forward").hstu_fwd_kernel, "forward", study, dtype)


def _gluon(kernel: Any, keys: int, constants: dict[str, Any], dtype: torch.dtype) -> str:
    from triton.experimental.gluon._runtime import GluonASTSource

    signature = {}
    for name in kernel.arg_names:
        rows = 64 if name in ("q_desc", "out_desc") else keys
        signature[name] = _type_of(name, constants)
        if name.endswith("_desc"):
            width = constants["D"]
            signature[name] = f"tensordesc<bf16[{rows}, {width}],{shared_layout(rows, width, dtype)!r}>"
    return _text(GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={}), 4)


def _plain(kernel: Any, role: str, study: Study, dtype: torch.dtype) -> str:
    from triton.compiler import ASTSource

    case = study.chosen()
    biased, width = case.bias is not BiasKind.NONE, case.qk_dim
    tiles = tile_set(width, width, dtype, biased=biased, windowed=case.mask.max_attn_len > 0, longest=case.length)
    tile = getattr(tiles, role)
    shape = KernelShape(
        heads=4,
        qk_dim=width,
        v_dim=width,
        block_qk=padded_width(width),
        block_v=padded_width(width),
        block_m=tile.block_m,
        block_n=tile.block_n,
        contextual=0,
        reach=case.length - 1 if biased else -1,
        buckets=128 if biased else -1,
        exact=False,
        descriptors=True,
        precision="ieee",
        assembly=True,
        own_in_registers=tile.own_in_registers,
        warps=tile.num_warps,
    )
    constants: dict[str, Any] = {"SHAPE": shape, "MASK": case.mask, "pos_factor_ptr": None}
    constants |= {"ENTRIES": 129 if biased else 0, "COPIES": 32}
    if not biased:
        constants |= dict.fromkeys((*_TABLES, *_SUMS))
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: _type_of(name, constants) for name in kernel.arg_names}
    for name in kernel.arg_names:
        if name.endswith("_desc"):
            rows = tile.block_n if name in ("k_desc", "v_desc") else tile.block_m
            signature[name] = f"tensordesc<bf16[{rows}, {width}]>"
    return _text(ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={}), tile.num_warps)


def _type_of(name: str, constants: dict[str, Any]) -> str:
    if name in constants:
        return "constexpr"
    if name in _INT64:
        return "*i64"
    if name.endswith("_ptr"):
        return "*fp32" if "partial" in name or name in (*_TABLES, *_SUMS) else "*bf16"
    return "fp32" if name in ("alpha", "scale") else "i32"


def _text(source: Any, warps: int) -> str:
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    options = backend.parse_options({"num_warps": warps})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen, modules = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source.make_ir(target, options, codegen, modules, context))
