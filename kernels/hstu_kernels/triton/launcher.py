"""Kernels that are launched directly once they are compiled.

Triton's own way to a launch (bind arguments, describe each of them and all options, look the kernel up, call hooks)
costs the host more than a small kernel costs the GPU. A `Variant` takes that way the first time it meets a kind of
arguments and keeps the compiled kernel; the next launch of the kind goes to Triton's launcher with raw pointers.

What is kept serves arguments in which the compiler would see the same: constants and options (those of the variant),
device, dtypes, presence and 16-byte alignment of pointers, blocks of descriptors, and the values of the integers,
unless the kernel declares them ``do_not_specialize``. Where somebody watches launches (hooks, debugging), in the
interpreter, and in a Triton whose launches look different, every launch takes Triton's own way.
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

# How `JITFunction.run` of Triton 3.6 and 3.7 launches what it compiled, and how a variant does.
_LAUNCH = """kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,
    knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"""
_WATCHERS = ("launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook", "debug")
_ALIGNMENT = 16
_LARGEST_INT32 = 2**31 - 1
# Kinds of arguments that a variant remembers; beyond, it forgets them all. Strides of odd views come and go.
_MOST_KINDS = 256


class Panel(TensorDescriptor):  # type: ignore[misc]
    """Rows of ``base`` for the copy engine: a `TensorDescriptor` whose fitness the caller has checked.

    Args:
        base: the tensor. shape, strides: of its rows and columns. block_shape: of one copy.
    """

    def __init__(self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> None:
        # The dataclass's own checks cost as much as the rest of a launch; its defaults are attributes of the class.
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape

    def checked(self) -> TensorDescriptor:
        """The descriptor as Triton makes it."""
        return TensorDescriptor(self.base, self.shape, self.strides, self.block_shape)


Argument = Tensor | Panel | None


class Variant:
    """A kernel with its constants and options.

    Args:
        function: the ``@triton.jit`` function. Its parameters are pointers and descriptors (named ``*_ptr`` and
            ``*_desc``), then numbers, then constants.
        settings: the constants by name, and options of the compiler such as ``num_warps``.
    """

    def __init__(self, function: Any, **settings: Any) -> None:
        self._function, self._settings = function, settings
        self._compiled: dict[Any, tuple[Any, ...]] = {}
        self._direct = isinstance(function, JITFunction) and launches_as_known()
        if self._direct:
            given = [p for p in function.params if not p.is_constexpr]
            self._constants = tuple(settings[p.name] for p in function.params if p.is_constexpr)
            numbers = [p for p in given if not p.name.endswith(("_ptr", "_desc"))]
            if function.params[len(given) - len(numbers) : len(given)] != numbers:
                raise TypeError(f"{function.__name__}: expected pointers and descriptors, then numbers, then constants")
            self._specialized = _pick([i for i, p in enumerate(numbers) if not p.do_not_specialize])
            self._others = _pick([i for i, p in enumerate(numbers) if p.do_not_specialize])

    def __call__(self, programs: int, arrays: Sequence[Argument], numbers: tuple[float, ...] = ()) -> None:
        """Launch ``programs`` programs.

        Args:
            arrays: arguments for pointers and descriptors; the first is a tensor on the device to run on.
            numbers: the other ones, floats as floats.
        """
        device = _device_of(arrays)
        if device >= 0 and device != _current_device():
            with torch.cuda.device(device):
                self(programs, arrays, numbers)
            return
        if not self._direct or _watched(self._function):
            self._launch(programs, arrays, numbers)
            return
        for number in self._others(numbers):
            if number > _LARGEST_INT32:
                # Another type of argument, too rare to remember.
                self._launch(programs, arrays, numbers)
                return
        raw: list[Any] = []
        kinds: list[Any] = []
        bits = 0
        for array in arrays:
            if array is None:
                raw.append(None)
                kinds.append(None)
            elif type(array) is Panel:
                raw.append(array)
                kinds.append((array.base.dtype, *array.block_shape))
            else:
                pointer = array.data_ptr()
                bits |= pointer
                raw.append(pointer)
                kinds.append(array.dtype)
        if bits % _ALIGNMENT:
            kinds.extend(type(pointer) is int and pointer % _ALIGNMENT == 0 for pointer in raw)
        key = (device, *self._specialized(numbers), *kinds)
        found = self._compiled.get(key)
        if found is None:
            self._remember(key, self._launch(programs, arrays, numbers))
            return
        run, function, metadata = found
        stream = _current_stream(device)
        run(programs, 1, 1, stream, function, metadata, None, None, None, *raw, *numbers, *self._constants)

    def _launch(self, programs: int, arrays: Sequence[Argument], numbers: tuple[float, ...]) -> Any:
        """Triton's own way; returns what it compiled."""
        checked = (array.checked() if isinstance(array, Panel) else array for array in arrays)
        return self._function[(programs,)](*checked, *numbers, **self._settings)

    def _remember(self, key: Any, kernel: Any) -> None:
        if len(self._compiled) >= _MOST_KINDS:
            self._compiled.clear()
        self._compiled[key] = (kernel.run, kernel.function, kernel.packed_metadata)


@functools.lru_cache(maxsize=1)
def launches_as_known() -> bool:
    """Whether this Triton launches compiled kernels by the call that a variant makes."""
    try:
        source = inspect.getsource(JITFunction.run)
    except (OSError, TypeError):
        return False
    known = all(hasattr(knobs.runtime, name) for name in _WATCHERS)
    return known and "".join(_LAUNCH.split()) in "".join(source.split())


def _watched(function: Any) -> bool:
    """Whether somebody asked Triton to be told of launches, or to compile in another way from now on."""
    runtime = knobs.runtime
    return bool(
        _called(runtime.launch_enter_hook)
        or _called(runtime.launch_exit_hook)
        or runtime.debug
        or function.pre_run_hooks
        or runtime.add_stages_inspection_hook is not None
    )


def _called(hook: Any) -> bool:
    """A chain without calls is none."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _pick(places: list[int]) -> Callable[[tuple[float, ...]], tuple[Any, ...]]:
    """A function that takes these entries of a tuple."""
    if not places:
        return lambda numbers: ()
    if len(places) > 1:
        return operator.itemgetter(*places)
    only = places[0]
    return lambda numbers: (numbers[only],)


def _device_of(arrays: Sequence[Argument]) -> int:
    first = arrays[0]
    assert isinstance(first, Tensor)
    return first.get_device()


def _current_device() -> int:
    return torch.cuda.current_device()


def _current_stream(device: int) -> Any:
    return driver.active.get_current_stream(device)
