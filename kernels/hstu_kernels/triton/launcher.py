"""Kernels that are launched directly once they are compiled.

Triton's own way to a launch (bind arguments, describe each of them and all options, look the kernel up, call hooks)
costs the host more than a small kernel costs the GPU. A `Variant` takes that way the first time it meets a kind of
arguments and keeps the compiled kernel; the next launch of the kind goes to Triton's launcher with raw pointers.

What is kept serves arguments in which the compiler would see the same: constants and options (those of the variant),
device, dtypes, presence and 16-byte alignment of pointers, blocks of descriptors, and the values of the integers,
unless the kernel declares them ``do_not_specialize``. Where somebody watches launches (hooks, debugging), in the
interpreter, and in a Triton whose launches look different, every launch takes Triton's own way.

Who knows that only addresses change from call to call keeps a `Ready` launch, which looks at nothing else.
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
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
# How `CudaLauncher` of Triton 3.6 calls the launcher that it compiled for a kernel, and what it makes of descriptors.
_CALL = """self.launch(gridX, gridY, gridZ, stream, function, self.launch_cooperative_grid, self.launch_pdl,
    global_scratch, profile_scratch, *args)"""
_DESCRIBE = """final_args.extend(make_tensordesc_arg(arg, tensordesc_meta[tensordesc_idx]))"""
_FINALLY = """return launcher(*final_args)"""
_WATCHERS = ("launch_enter_hook", "launch_exit_hook", "add_stages_inspection_hook", "debug")
_ALIGNMENT = 16
_LARGEST_INT32 = 2**31 - 1
# Kinds of arguments that a variant remembers; beyond, it forgets them all. Strides of odd views come and go.
_MOST_KINDS = 256
# Encoded descriptors of a kernel that are remembered, by what they describe and by address.
_MOST_EXTENTS, _MOST_ADDRESSES = 64, 256


class Panel(TensorDescriptor):  # type: ignore[misc]
    """Rows of ``base`` for the copy engine: a `TensorDescriptor` whose fitness the caller has checked.

    Args:
        base: the tensor. shape, strides: of its rows and columns. block_shape: of one copy.
        layout: of a copy in shared memory, where a Gluon kernel has to be told.
    """

    def __init__(
        self, base: Tensor, shape: list[int], strides: list[int], block_shape: list[int], layout: Any = None
    ) -> None:
        # The dataclass's own checks cost as much as the rest of a launch; its defaults are attributes of the class.
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape
        self.layout = layout

    def checked(self) -> Any:
        """The descriptor as Triton makes it, or Gluon."""
        if self.layout is not None:
            from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

            return GluonDescriptor(self.base, self.shape, self.strides, self.block_shape, self.layout)
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
        if not is_current(device):
            with torch.cuda.device(device):
                self(programs, arrays, numbers)
            return
        if not self._direct or _watched(self._function):
            self._launch(programs, arrays, numbers)
            return
        key, raw = self._kind(device, arrays, numbers)
        if key is None:
            # Another type of argument, too rare to remember.
            self._launch(programs, arrays, numbers)
            return
        found = self._compiled.get(key)
        if found is None:
            self._remember(key, self._launch(programs, arrays, numbers))
            return
        run, function, metadata, _, _ = found
        stream = _current_stream(device)
        run(programs, 1, 1, stream, function, metadata, None, None, None, *raw, *numbers, *self._constants)

    def ready(self, programs: int, arrays: Sequence[Argument], numbers: tuple[float, ...] = ()) -> Ready | None:
        """The launch of these arguments for other addresses; ``None`` if nothing is compiled for them, or to be kept.

        Fits arguments that differ from these in the addresses alone, multiples of 16 wherever these are.
        """
        if not self._direct:
            return None
        device = _device_of(arrays)
        key, _ = self._kind(device, arrays, numbers)
        found = None if key is None else self._compiled.get(key)
        if found is None:
            return None
        panels = [(place, array) for place, array in enumerate(arrays) if isinstance(array, Panel)]
        return Ready(self._function, found, device, programs, panels, (*numbers, *self._constants))

    def _kind(self, device: int, arrays: Sequence[Argument], numbers: tuple[float, ...]) -> tuple[Any, list[Any]]:
        """What the compiler sees of arguments, ``None`` if that is not to be remembered, and their addresses."""
        for number in self._others(numbers):
            if number > _LARGEST_INT32:
                return None, []
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
        return (device, *self._specialized(numbers), *kinds), raw

    def _launch(self, programs: int, arrays: Sequence[Argument], numbers: tuple[float, ...]) -> Any:
        """Triton's own way; returns what it compiled."""
        checked = (array.checked() if isinstance(array, Panel) else array for array in arrays)
        return self._function[(programs,)](*checked, *numbers, **self._settings)

    def _remember(self, key: Any, kernel: Any) -> None:
        if len(self._compiled) >= _MOST_KINDS:
            self._compiled.clear()
        self._compiled[key] = (kernel.run, kernel.function, kernel.packed_metadata, _innermost(kernel.run), {})


class Ready:
    """A launch of a compiled kernel for which addresses are all that is missing; made by `Variant.ready`."""

    __slots__ = ("_after", "_before", "_device", "_end", "_function", "_launch", "_maps")

    def __init__(
        self,
        function: Any,
        compiled: tuple[Any, ...],
        device: int,
        programs: int,
        panels: Iterable[tuple[int, Panel]],
        rest: tuple[Any, ...],
    ) -> None:
        run, handle, metadata, inner, extents = compiled
        self._function, self._device = function, device
        self._before, self._end = (programs, 1, 1), rest
        self._launch: Any = run if inner is None else inner.launch
        options = () if inner is None else (run.launch_cooperative_grid, run.launch_pdl, None, None)
        self._after = (handle, *options, metadata, None, None, None)
        if len(extents) > _MOST_EXTENTS:
            extents.clear()
        self._maps = []
        # From the last to the first: what a descriptor becomes may take several places.
        for order, (place, panel) in reversed(list(enumerate(panels))):
            known = extents.setdefault((order, *panel.shape, *panel.strides), {})
            encode = _as_it_is if inner is None else inner.encoder(order)
            self._maps.append((place, known, functools.partial(_described, panel, encode)))

    def watched(self) -> bool:
        """Whether somebody wants Triton to launch."""
        return _watched(self._function)

    def __call__(self, addresses: list[Any]) -> None:
        """Launch.

        Args:
            addresses: of the arrays, ``None`` for ``None``; used up.
        """
        for place, known, describe in self._maps:
            address = addresses[place]
            found = known.get(address)
            if found is None:
                if len(known) >= _MOST_ADDRESSES:
                    known.clear()
                known[address] = found = describe(address)
            addresses[place : place + 1] = found
        self._launch(*self._before, _current_stream(self._device), *self._after, *addresses, *self._end)


class _Address:
    """Stands for a tensor in a descriptor: all that is asked of it is where it lies."""

    def __init__(self, address: int) -> None:
        self._address = address

    def data_ptr(self) -> int:
        return self._address


def _described(panel: Panel, encode: Callable[[Panel], Sequence[Any]], address: int) -> tuple[Any, ...]:
    """The arguments of a launch for what ``panel`` describes, at another address."""
    place: Any = _Address(address)
    return tuple(encode(Panel(place, panel.shape, panel.strides, panel.block_shape)))


def _as_it_is(panel: Panel) -> tuple[Panel]:
    return (panel,)


class _Innermost:
    """The compiled launcher of a kernel beneath the Python around it, and how descriptors are encoded for it."""

    def __init__(self, launch: Any, encode: Any, metas: Sequence[Any]) -> None:
        self.launch, self._encode, self._metas = launch, encode, metas

    def encoder(self, order: int) -> Callable[[Panel], Sequence[Any]]:
        encode, meta = self._encode, self._metas[order]
        return lambda panel: encode(panel, meta)


def _innermost(run: Any) -> _Innermost | None:
    """``None`` in a Triton that is not known, and for kernels that need memory of their own."""
    kind: Any = type(run)
    if not _calls_as_known(kind):
        return None
    if run.global_scratch_size or run.profile_scratch_size:
        return None
    # Around the launcher of a kernel with descriptors there is a function that encodes them.
    around = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(run.launch) else {}
    if "tensordesc_meta" not in around:
        return _Innermost(run.launch, None, ())
    encode = sys.modules[kind.__module__].make_tensordesc_arg
    return _Innermost(around["launcher"], encode, around["tensordesc_meta"])


@functools.lru_cache(maxsize=8)
def _calls_as_known(kind: Any) -> bool:
    """Whether launchers of this kind call the compiled one as `Ready` does."""
    if (kind.__module__, kind.__name__) != ("triton.backends.nvidia.driver", "CudaLauncher"):
        return False
    try:
        module: Any = sys.modules[kind.__module__]
        call, wrap = inspect.getsource(kind.__call__), inspect.getsource(module.wrap_handle_tensordesc)
    except (AttributeError, OSError, TypeError):
        return False
    return _contains(call, _CALL) and _contains(wrap, _DESCRIBE) and _contains(wrap, _FINALLY)


def _contains(source: str, code: str) -> bool:
    """Whether ``code`` stands in ``source``, however either is laid out."""
    return "".join(code.split()) in "".join(source.split())


@functools.lru_cache(maxsize=1)
def launches_as_known() -> bool:
    """Whether this Triton launches compiled kernels by the call that a variant makes."""
    try:
        source = inspect.getsource(JITFunction.run)
    except (OSError, TypeError):
        return False
    known = all(hasattr(knobs.runtime, name) for name in _WATCHERS)
    return known and _contains(source, _LAUNCH)


def _watched(function: Any) -> bool:
    """Whether somebody asked Triton to be told of launches, or to compile in another way from now on."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(
        # A chain without calls is none.
        getattr(enter, "calls", enter)
        or getattr(leave, "calls", leave)
        or runtime.debug
        or function.pre_run_hooks
        or runtime.add_stages_inspection_hook is not None
    )


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


# Whoever asks has a tensor on a GPU: nothing is left to initialise.
_current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


def is_current(device: int) -> bool:
    """Whether launches go to the device of this index without a switch; -1 stands for the CPU."""
    return device < 0 or device == _current_device()


def _current_stream(device: int) -> Any:
    return driver.active.get_current_stream(device)
