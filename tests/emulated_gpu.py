"""A GPU emulated on the CPU, for tests: the values are real, and what a GPU would refuse or wait for is noticed.

A tensor belongs to the GPU where its storage says so. Within `EmulatedGpu` such tensors say that they are on cuda:0,
and every operator on them is checked and counted:

- operands on different devices, values of the host in a captured step, and random numbers in it, raise;
- a value that the host reads, and a copy from memory that is not pinned, is a wait; in a capture, and where waits are
  forbidden, it raises;
- a capture is undone when it ends. A replay runs the captured operators on the same memory, without Python between
  them; memory of the graph holds NaN until the replay has written it, and memory freed since the capture raises;
- an access that no stream or wait of the host orders after another stream's raises (by vector clocks, as in Fidge
  1988).

What it cannot show: kernels and their rounding, cuDNN's choice of them, memory, speed, more than one device.
"""

from __future__ import annotations

import contextlib
import math
import unittest.mock
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
DEVICE, PINNED, PAGEABLE = "device", "pinned", "pageable"  # where a storage is
COPIES = ("copy_", "_to_copy", "_foreach_copy_")
WITHOUT_KERNEL = (
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"),
    *("_unsafe_view", "detach", "lift_fresh", "set_", "resize_"),
)
# Positions of the arguments that an operator changes, where its schema does not mark them
CHANGED = {"native_batch_norm": (3, 4), "_fused_sgd_": (0, 2)}
# Limits of one kernel over lists of tensors (PyTorch's MultiTensorApply.cuh): tensors by the number of lists, blocks,
# and the values of a block. Builds for CUDA 13 allow seven times as many.
MOST_TENSORS, MOST_BLOCKS, BLOCK = (110, 64, 48, 36, 30), 320, 65536


class GpuError(AssertionError):
    """What a GPU would refuse, or would quietly do wrong."""


class Stream:
    """A queue of work. `clock` says how much of every stream's work comes before its next."""

    def __init__(self, device: Any = None) -> None:
        self.device = GPU
        self.clock: dict[Stream, int] = {}

    def wait_stream(self, other: Stream) -> None:
        merge(self.clock, other.clock)

    def synchronize(self) -> None:
        current().wait(self)

    def is_capturing(self) -> bool:
        return current().capturing is not None


Uses = dict[tuple[Stream, bool], tuple[int, str]]  # of a storage: (stream, whether it wrote) -> when last, what


class EmulatedGpu(contextlib.ExitStack):
    """Use as a context manager. `counts`: launches, waits, copies, replays and captured operators."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.waits: list[str] = []  # of what
        self.forbids_waits = False
        self.capturing: Graph | None = None
        self.default = self.stream = Stream()
        self.host: dict[Stream, int] = {}  # how much of every stream's work the host has seen end

    def __enter__(self) -> EmulatedGpu:
        super().__enter__()
        for owner, names in replacements(self).items():
            for name, value in names.items():
                self.enter_context(unittest.mock.patch.object(owner, name, value))
        self.enter_context(Operators(self))
        self.enter_context(Functions(self))
        global _current
        _current = weakref.ref(self)
        return self

    @contextlib.contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """What is counted within."""
        before, found = Counter(self.counts), Counter[str]()
        yield found
        found.update(self.counts - before)

    @contextlib.contextmanager
    def without_waits(self) -> Iterator[None]:
        """Like `torch.cuda.set_sync_debug_mode("error")`."""
        self.forbids_waits = True
        try:
            yield
        finally:
            self.forbids_waits = False

    def wait(self, stream: Stream, what: str = "synchronize") -> None:
        """The host waits for a stream."""
        if self.capturing or self.forbids_waits:
            raise GpuError(f"the host waits for the device ({what})")
        self.counts["waits"] += 1
        self.waits.append(what)
        merge(self.host, stream.clock)

    def host_reads(self, tensor: Tensor, what: str) -> None:
        """The host reads a value on the device."""
        self.use([tensor], [], what)
        self.wait(self.stream, what)

    def use(self, reads: Sequence[Tensor], writes: Sequence[Tensor], what: str) -> None:
        """An operator on the current stream."""
        stream = self.stream
        merge(stream.clock, self.host)
        now = stream.clock[stream] = stream.clock.get(stream, 0) + 1
        for tensors, changes in ((reads, False), (writes, True)):
            for tensor in tensors:
                uses = self.uses_of(tensor)
                check_order(uses, stream, changes, what)
                if changes:
                    uses.clear()
                uses[stream, changes] = now, what

    def uses_of(self, tensor: Tensor) -> Uses:
        storage = tensor.untyped_storage()
        default, uses = getattr(storage, "uses", (None, {}))
        if default is not self.default:  # of an earlier emulation, whose work has ended
            uses = {}
            storage.uses = self.default, uses  # type: ignore[attr-defined]
        return uses


def check_order(uses: Uses, stream: Stream, changes: bool, what: str) -> None:
    """Raise where an access on `stream` may come before one on another that it must not overtake."""
    for (other, wrote), (when, by) in uses.items():
        if (wrote or changes) and stream.clock.get(other, 0) < when:
            raise GpuError(f"a race: {what} is not ordered after {by} on another stream")


class Graph:
    """A CUDA graph: the operators of a capture."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.pool: dict[int, Tensor] = {}  # by the address of its storage
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # storages outside that the capture has written, and copies
        self.outside: dict[bool, dict[int, Outside]] = {False: {}, True: {}}  # read alone, and written

    def record(self, func: Any, args: Any, kwargs: Any, writes: Sequence[Tensor], run: Callable[[], Any]) -> Any:
        given = tensors_in((args, kwargs))
        for tensor in writes:
            if address(tensor) not in self.pool | self.before:
                self.before[address(tensor)] = whole(tensor), whole(tensor).clone()
        written = {address(tensor) for tensor in writes}
        for tensor in given:
            if address(tensor) not in self.pool:
                self.outside[address(tensor) in written].setdefault(address(tensor), Outside(tensor))
        out = run()
        known = {address(tensor) for tensor in given}
        fresh = [tensor.detach() for tensor in tensors_in(out) if address(tensor) not in known]
        self.pool |= {address(tensor): tensor for tensor in fresh}
        self.calls.append((func, *tree_map(self._reference, (args, kwargs)), fresh))
        return out

    def _reference(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or kind(value) != DEVICE:
            return value
        return value.detach() if address(value) in self.pool else Outside(value)

    def end(self) -> None:
        """Undo what the capture has computed: a GPU would not have run it."""
        for tensor, values in self.before.values():
            tensor.copy_(values)
        self.before.clear()
        self._poison()

    def _poison(self) -> None:
        for tensor in self.pool.values():
            whole(tensor).fill_(0xFF)  # NaN

    @torch.no_grad()
    def replay(self) -> None:
        gpu = current()
        gpu.counts["replays"] += 1
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            self._poison()
            for func, args, kwargs, outputs in self.calls:
                args, kwargs = tree_map(lambda v: v.tensor() if isinstance(v, Outside) else v, (args, kwargs))
                values = func(*args, **kwargs)
                for tensor, value in zip(outputs, tensors_in(values) if outputs else (), strict=True):
                    tensor.copy_(value)
            reads, writes = ([one.tensor() for one in self.outside[wrote].values()] for wrote in (False, True))
            gpu.use(reads, writes, "a replay")


class Outside:
    """A tensor that a graph knows by the address of its memory alone."""

    def __init__(self, tensor: Tensor) -> None:
        self.storage = weakref.ref(tensor.untyped_storage())
        self.dtype = tensor.dtype
        self.view = tensor.storage_offset(), tensor.size(), tensor.stride()

    def tensor(self) -> Tensor:
        storage = self.storage()
        if storage is None:
            raise GpuError("a replay uses memory that was freed after the capture")
        return torch.empty(0, dtype=self.dtype).set_(storage, *self.view)


class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator below autograd."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, gpu, name = kwargs or {}, self.gpu, name_of(func)
        given = tensors_in((args, kwargs))
        on_device = [tensor for tensor in given if kind(tensor) == DEVICE]
        if not on_device and not Functions.making:
            for tensor in given:
                check_copied(gpu, tensor)
            return func(*args, **kwargs)
        if any(tensor.is_meta for tensor in given):
            return func(*args, **kwargs)
        self._check(func, name, args, kwargs, given, on_device)
        writes = [tensor for tensor in changed_by(func, args, kwargs) if kind(tensor) == DEVICE]
        if gpu.capturing and launches_kernel(func):
            out = gpu.capturing.record(func, args, kwargs, writes, lambda: func(*args, **kwargs))
        else:
            out = func(*args, **kwargs)
        known = {address(tensor) for tensor in given}
        fresh = [tensor for tensor in tensors_in(out) if address(tensor) not in known]
        for tensor in fresh:
            place(tensor, DEVICE)
            if gpu.capturing:
                gpu.capturing.pool.setdefault(address(tensor), tensor.detach())
        if launches_kernel(func):
            gpu.counts["captured" if gpu.capturing else "launches"] += kernels(func, args)
            if not gpu.capturing:
                changed = {address(tensor) for tensor in writes}
                gpu.use([t for t in on_device if address(t) not in changed], [*writes, *fresh], name)
        return out

    def _check(
        self, func: Any, name: str, args: Any, kwargs: Any, given: Sequence[Tensor], on_device: Sequence[Tensor]
    ) -> None:
        gpu = self.gpu
        by_values = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        if by_values and (name != "index" or any(tensor.dtype == torch.bool for tensor in given[1:])):
            gpu.host_reads(on_device[0], name)
        if gpu.capturing and torch.Tag.nondeterministic_seeded in func.tags:
            raise GpuError(f"{name} draws from a generator, whose state a graph would have to advance")
        on_host = [tensor for tensor in given if kind(tensor) != DEVICE]
        if not on_host:
            return
        if name in COPIES:
            self._copy(name, args, on_host)
        elif gpu.capturing or any(tensor.ndim for tensor in on_host):
            raise GpuError(f"{name}: operands on the host and on the device")

    def _copy(self, name: str, args: Any, on_host: Sequence[Tensor]) -> None:
        gpu = self.gpu
        if gpu.capturing:
            raise GpuError(f"{name} copies between host and device within a graph")
        gpu.counts["copies"] += 1
        if any(kind(tensor) == PAGEABLE for tensor in on_host):
            gpu.wait(gpu.stream, "a copy of memory that is not pinned")


def name_of(func: Any) -> str:
    """The name of an operator of ATen, for instance add."""
    name: str = func._schema.name
    return name.removeprefix("aten::")


def tensors_in(values: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def launches_kernel(func: Any) -> bool:
    """Whether a call launches a kernel: views, allocations and queries do not."""
    returns = func._schema.returns
    is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return func.namespace == "aten" and not is_view and name_of(func) not in WITHOUT_KERNEL


def changed_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among its arguments that an operator changes."""
    arguments = func._schema.arguments
    written = [place for place, argument in enumerate(arguments) if argument.is_write]
    places = CHANGED.get(name_of(func), written)
    return tensors_in([args[i] if i < len(args) else kwargs.get(arguments[i].name) for i in places])


def kernels(func: Any, args: Sequence[Any]) -> int:
    """The kernels that an operator launches: one, or for lists of tensors as many as their number and sizes need."""
    name = name_of(func)
    if not name.startswith(("_foreach", "_fused")):
        return 1
    lists = [a for a in args if isinstance(a, Sequence) and a and isinstance(a[0], Tensor)]
    alike = all(one.dtype == of[0].dtype and one.device == of[0].device for of in lists for one in of)
    layouts = [[(tensor.shape, tensor.stride()) for tensor in of] for of in lists]
    if not alike or any(of != layouts[0] for of in layouts):
        return len(lists[0])  # one by one
    blocks = sum(math.ceil(tensor.numel() / BLOCK) for tensor in lists[0])
    by_number = math.ceil(len(lists[0]) / MOST_TENSORS[len(lists) - 1])
    least: int = max(by_number, math.ceil(blocks / MOST_BLOCKS))
    return least + (name == "_foreach_norm")  # which adds up its blocks


class Functions(TorchFunctionMode):
    """Sees calls of torch's Python interface: what is said of devices, and what reads values without an operator."""

    making = False  # whether a function that was asked for a tensor on the device is running

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is not None and func == Tensor.device.__get__:
            return GPU if kind(tensor) == DEVICE else func(tensor)
        if tensor is not None and func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return kind(tensor) == DEVICE
        if tensor is not None and func == Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return kind(tensor) != DEVICE
        if tensor is not None and name in ("tolist", "numpy"):
            if kind(tensor) == DEVICE:
                if name == "numpy":
                    raise GpuError("numpy() of a tensor on the device")
                self.gpu.host_reads(tensor, name)
            else:
                check_copied(self.gpu, tensor)
        if tensor is not None and name == "cpu":
            return self._to(tensor, PAGEABLE, False)
        if tensor is not None and name == "__deepcopy__" and type(tensor) is Tensor:
            return args[1].setdefault(id(tensor), tensor.detach().clone())  # by an operator, not by its storage
        if tensor is not None and name == "pin_memory":
            return place(tensor.clone(), PINNED)
        if tensor is not None and name == "to":
            return self._convert(func, *args, **kwargs)
        if name == "where" and tensor is not None and kind(tensor) == DEVICE and len(args) == 3:
            args = tensor, *self._filled(*args[1:])
        if is_cuda(kwargs.get("device")):
            return self._made(func, *args, **{**kwargs, "device": "cpu"})
        return func(*args, **kwargs)

    def _made(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """A tensor that a function is asked to make on the device."""
        Functions.making = True
        try:
            return func(*args, **kwargs)
        finally:
            Functions.making = False

    def _filled(self, one: Any, other: Any) -> list[Tensor]:
        """The operands of `where`: torch fills a tensor on the device with one that is a number."""
        dtype = torch.result_type(one, other)
        return [
            value if isinstance(value, Tensor) else self._made(torch.scalar_tensor, value, dtype=dtype)
            for value in (one, other)
        ]

    def _convert(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args and isinstance(args[0], Tensor):
            target, dtype, non_blocking, layout = kind(args[0]), args[0].dtype, False, None
        else:
            copy = kwargs.pop("copy", False)
            device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
            target = kind(tensor) if device is None else DEVICE if is_cuda(device) else PAGEABLE
            if tensor.is_meta or (device is not None and device.type == "meta"):
                return func(tensor, *args, **kwargs)  # type: ignore[no-any-return]
            if copy:
                tensor = tensor.clone()
        if dtype is not None or layout is not None:
            tensor = func(tensor, dtype=dtype or tensor.dtype, memory_format=layout or torch.preserve_format)
        return self._to(tensor, target, non_blocking)

    def _to(self, tensor: Tensor, target: str, non_blocking: bool) -> Tensor:
        if (target == DEVICE) == (kind(tensor) == DEVICE):
            return tensor
        gpu = self.gpu
        if gpu.capturing:
            raise GpuError("a copy between host and device within a graph")
        gpu.counts["copies"] += 1
        if target == DEVICE:
            if kind(tensor) == PAGEABLE or not non_blocking:
                gpu.wait(gpu.stream, "a copy of memory that is not pinned")
            copied = place(tensor.clone(), DEVICE)
            gpu.use([], [copied], "a copy to the device")
            return copied
        gpu.use([tensor], [], "a copy to the host")
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            copied = tensor.clone()
        if non_blocking:
            place(copied, PINNED).untyped_storage().ends = gpu.stream, gpu.stream.clock[gpu.stream]  # type: ignore[attr-defined]
        else:
            gpu.wait(gpu.stream, "a copy to the host")
        return copied


def replacements(gpu: EmulatedGpu) -> dict[Any, dict[str, Any]]:
    """What stands in for torch's interface to CUDA."""
    from fedsim import device
    from fedsim.federation import in_process

    autocast = torch.autocast
    by_device = torch.optim.Optimizer._group_tensors_by_device_and_dtype

    @contextlib.contextmanager
    def stream(chosen: Stream | None) -> Iterator[None]:
        before = gpu.stream
        gpu.stream = chosen or before
        yield
        gpu.stream = before

    @contextlib.contextmanager
    def capture(graph: Graph, pool: Any = None, stream: Stream | None = None) -> Iterator[None]:
        gpu.capturing, before = graph, gpu.stream
        gpu.stream = stream or Stream()
        try:
            yield
        finally:
            gpu.capturing, gpu.stream = None, before
            with _disable_current_modes(), torch._C.DisableTorchFunction(), torch.no_grad():
                graph.end()

    def grouped(*args: Any, **kwargs: Any) -> Any:
        groups = by_device(*args, **kwargs)
        gpus = (any(kind(t) == DEVICE for t in tensors_in(values)) for values in groups.values())
        return {
            (GPU if on_gpu else device, dtype): values
            for on_gpu, ((device, dtype), values) in zip(gpus, groups.items(), strict=True)
        }

    def synchronize(device: Any = None) -> None:
        everything = Stream()
        for uses in (gpu.stream, gpu.default):
            merge(everything.clock, uses.clock)
        gpu.wait(everything)

    class InThisThread:
        """In place of a thread, in which torch would not be emulated."""

        def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
            done: Future[Any] = Future()
            try:
                done.set_result(call(*arguments))
            except Exception as error:
                done.set_exception(error)
            return done

        def shutdown(self, **options: Any) -> None:
            pass

    return {
        torch.cuda: {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "graph": capture,
            "stream": stream,
            "synchronize": synchronize,
            "current_stream": lambda device=None: gpu.stream,
            "is_current_stream_capturing": lambda: gpu.capturing is not None,
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "get_device_name": lambda device=None: "an emulated GPU",
            "mem_get_info": lambda device=None: (2**40, 2**40),
        },
        torch.accelerator: {"current_stream": lambda device=None: gpu.stream},
        torch: {"autocast": lambda device_type, *args, **kwargs: autocast("cpu", *args, **kwargs)},
        torch.optim.Optimizer: {"_group_tensors_by_device_and_dtype": staticmethod(grouped)},
        in_process: {
            "thread_pool": lambda place, threads: (
                InThisThread() if is_cuda(place) else device.thread_pool(place, threads)
            )
        },
    }


def current() -> EmulatedGpu:
    gpu = _current()
    assert gpu is not None
    return gpu


_current: Callable[[], EmulatedGpu | None] = lambda: None  # noqa: E731


def address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def whole(tensor: Tensor) -> Tensor:
    """The bytes of the storage of a tensor."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def kind(tensor: Tensor) -> str:
    return getattr(tensor.untyped_storage(), "place", PAGEABLE)


def place(tensor: Tensor, where: str) -> Tensor:
    tensor.untyped_storage().place = where  # type: ignore[attr-defined]
    return tensor


def check_copied(gpu: EmulatedGpu, tensor: Tensor) -> None:
    """Raise where the host uses a copy that it has not waited for."""
    if ends := getattr(tensor.untyped_storage(), "ends", None):
        stream, when = ends
        if gpu.host.get(stream, 0) < when:
            raise GpuError("a race: the host uses a copy that may not have ended")


def merge(clock: dict[Stream, int], other: dict[Stream, int]) -> None:
    for stream, when in other.items():
        clock[stream] = max(clock.get(stream, 0), when)


def is_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"
