"""stream_races.py all|streams|none PRESET ARGS: trains on CPU ranks with streams that only keep clocks, and rank 0 prints as JSON
the accesses that no wait puts in order.

DeepSpeed's engine works on several CUDA streams. Here its accelerator hands out fake ones with vector clocks, every
operation belongs to the stream that is current, and a read or write of memory that is not ordered after the last write
of it (a write also after the last reads) is a race. `streams`: streams wait for each other, and nobody for the whole
device, though DeepSpeed asks. `none`: nor do streams wait.
"""

import contextlib
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from largescale import train
from largescale.host.launch import leave
from largescale.training.step import TrainStep

Clock = Counter[str]
HOST: Clock = Counter()


def catch_up(clock: Clock, other: Clock) -> None:
    for name, tick in other.items():
        clock[name] = max(clock[name], tick)


class Event:
    def __init__(self, *_: Any, **__: Any):
        self.clock: Clock = Counter()

    def record(self, stream: "Stream | None" = None) -> None:
        self.clock = Counter((stream or CURRENT[-1]).clock)

    def synchronize(self) -> None:
        catch_up(HOST, self.clock)

    def wait(self, stream: "Stream | None" = None) -> None:
        catch_up((stream or CURRENT[-1]).clock, self.clock)


class Stream:
    def __init__(self, *_: Any, **__: Any):
        self.name = f"stream {len(STREAMS)}"
        self.clock: Clock = Counter()
        STREAMS.append(self)

    def wait_stream(self, other: "Stream") -> None:
        catch_up(self.clock, HOST)
        if waits != "none":
            catch_up(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        catch_up(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        catch_up(HOST, self.clock)


STREAMS: list[Stream] = []
CURRENT = [Stream()]


@contextlib.contextmanager
def current(stream: Stream) -> Iterator[None]:
    CURRENT.append(stream)
    try:
        yield
    finally:
        CURRENT.pop()


class Races(TorchDispatchMode):
    """Notes every operation's reads and writes as ranges of bytes of a storage."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.streams: Counter[str] = Counter()
        self._writes: dict[int, list[Any]] = defaultdict(list)
        self._reads: dict[int, list[Any]] = defaultdict(list)
        self._alive: list[Any] = []  # a freed storage's address would be another one's

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, schema = str(func), func._schema
        writes_argument = any(a.alias_info and a.alias_info.is_write for a in schema.arguments)
        is_view = bool(schema.returns) and all(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        if (is_view and not writes_argument) or name.startswith("aten.empty"):
            return out
        stream = CURRENT[-1]
        if name == "aten._local_scalar_dense.default":  # the host waits for a value
            catch_up(HOST, stream.clock)
        catch_up(stream.clock, HOST)
        stream.clock[stream.name] += 1
        self.streams[stream.name] += 1
        self._note(name, stream, *self._read_and_written(name, schema, args, kwargs, out))
        return out

    def _read_and_written(self, name: str, schema: Any, args: Any, kwargs: Any, out: Any) -> tuple[list[Any], list[Any]]:
        read, written = [], [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        for i, argument in enumerate(schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            tensors = [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]
            if (argument.alias_info and argument.alias_info.is_write) or name.startswith("c10d."):
                written += tensors
            if i or not name.endswith("copy_.default"):
                read += tensors
        return read, written

    def _note(self, name: str, stream: Stream, read: list[Any], written: list[Any]) -> None:
        here = (stream.name, stream.clock[stream.name], name)
        for tensor in read:
            storage, low, high = self._range(tensor)
            self._check(f"{name} reads", stream, low, high, self._writes[storage])
            self._reads[storage].append((low, high, *here))
        for tensor in written:
            storage, low, high = self._range(tensor)
            self._check(f"{name} writes", stream, low, high, self._writes[storage] + self._reads[storage])
            for accesses in (self._writes, self._reads):
                accesses[storage] = [a for a in accesses[storage] if not (low <= a[0] and a[1] <= high)]
            self._writes[storage].append((low, high, *here))

    def _check(self, what: str, stream: Stream, low: int, high: int, earlier: list[Any]) -> None:
        for start, end, other, tick, name in earlier:
            if start < high and low < end and stream.clock[other] < tick:
                self.found[f"{what} on {stream.name} what {name} uses on {other}: {place()}"] += 1

    def _range(self, tensor: torch.Tensor) -> tuple[int, int, int]:
        storage, size = tensor.untyped_storage(), tensor.element_size()
        self._alive.append(storage)
        low = tensor.storage_offset() * size
        last = sum((n - 1) * abs(step) for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        return storage._cdata, low, low + (last + 1) * size if tensor.numel() else low


def place() -> str:
    frame: Any = sys._getframe(3)
    found: list[str] = []
    while frame and len(found) < 3:
        path = frame.f_code.co_filename
        if "deepspeed/" in path or "largescale/" in path:
            found.append(f"{path.rsplit('/', 1)[-1]}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found)


def wait_for_device(*_: Any) -> None:
    if waits == "all":
        for stream in STREAMS:
            catch_up(HOST, stream.clock)


waits, *arguments = sys.argv[1:]
accelerator: Any = type(get_accelerator())
accelerator.is_synchronized_device = lambda self: False
accelerator.resolves_data_dependency = lambda self: False
accelerator.Stream = property(lambda self: Stream)
accelerator.Event = property(lambda self: Event)
accelerator.stream = lambda self, stream: current(stream)
accelerator.current_stream = lambda self, *_: CURRENT[-1]
accelerator.default_stream = lambda self, *_: STREAMS[0]
accelerator.synchronize = wait_for_device
torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign,assignment]

races = Races()
step = TrainStep.forward_backward


def watched(*args: Any, **kwargs: Any) -> Any:
    with races:
        return step(*args, **kwargs)


TrainStep.forward_backward = watched  # type: ignore[method-assign]
code = train.main(arguments)
if os.environ["RANK"] == "0":
    print(json.dumps({"races": races.found, "operations": races.streams}))
leave(code)
