"""The only file that imports torch.distributed: ranks, the agreed vector, and small exchanges
between hosts."""

import contextlib
import datetime
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from largescale.errors import DeviceError, LargescaleError, LostRankError, Stopped
from largescale.host.launch import (
    env_local_rank,
    env_rank,
    env_world_size,
    heartbeat,
    local_world_size,
)
from largescale.host.signals import stop_requested

T = TypeVar("T")

# Ranks that start minutes apart are usual on a cluster; one that waits so long prints for whom.
SAID_AFTER_S = 20.0
# What NCCL's errors are called where another rank, or the way to it, is the cause.
NCCL_ERRORS = ("ncclSystemError", "ncclRemoteError", "ncclInternalError", "Duplicate GPU")
# Collectives on CPUs have no time limit of their own: the watchdog ends a run that hangs, and a run
# that the cluster suspends for hours, in the middle of a collective, continues.
NEVER = datetime.timedelta(days=365)


class Ranks:
    """The process group of a run: training collectives over NCCL or gloo, exchanges of plain values
    over gloo."""

    def __init__(self, device: str, timeout_s: float = 600):
        """Collective: ranks wait here until all have started.

        `timeout_s`: how long they wait for each other, and a collective of GPUs for its end. Raises
        LostRankError where not all ranks start.
        """
        self.rank = env_rank()
        self.world_size = env_world_size()
        self.device = local_device(device)

        # DeepSpeed and torch read these variables; srun sets none of them.
        index = env_local_rank() if self.device.index is None else self.device.index
        os.environ["RANK"] = str(self.rank)
        os.environ["WORLD_SIZE"] = str(self.world_size)
        os.environ["LOCAL_RANK"] = str(index)
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29500")
        timeout = datetime.timedelta(seconds=timeout_s)
        self._collective_timeout = timeout if device == "cuda" else NEVER
        if self.world_size > 1:
            stay_on_this_machine(os.environ)
            require_resolvable(os.environ["MASTER_ADDR"])

        # torch prints nothing while it waits.
        waiting = threading.Timer(SAID_AFTER_S, self._print_waiting, (timeout_s,))
        waiting.daemon = True
        waiting.start()
        try:
            self._init_groups("nccl" if device == "cuda" else "gloo", timeout)
        except RuntimeError as error:
            if not is_lost_contact(error):
                raise
            if "Duplicate GPU" in str(error):
                raise shared_gpu() from error
            raise not_met(self.world_size, timeout_s, _first_line(error)) from error
        finally:
            waiting.cancel()
        if device != "cuda":
            self.limit_waiting()

    def _init_groups(self, backend: str, timeout: datetime.timedelta) -> None:
        store = _make_store(self.rank, self.world_size, timeout)
        if store is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, timeout=timeout, store=store, rank=self.rank, world_size=self.world_size
            )
        # Groups of their own: the agreed vector does not queue behind gradients, and plain values
        # need no GPU.
        self._vectors: Any = dist.new_group(timeout=self._collective_timeout)
        self._plain: Any = dist.new_group(backend="gloo", timeout=NEVER)
        self._roll: Any = _connect_to_store() if self.world_size > 1 else None

    def limit_waiting(self, group: Any = None) -> None:
        """Give a process group, by default that of all ranks, this run's time limit for
        collectives. A group that others make, as DeepSpeed does, has torch's own limit until then."""
        if hasattr(dist, "set_timeout"):
            dist.set_timeout(self._collective_timeout, group)
        else:  # torch 2.11 has it under this name
            dist.distributed_c10d._set_pg_timeout(self._collective_timeout, group)

    def on_abort(self, action: Callable[[], None]) -> None:
        """Have `action` called before NCCL's own watchdog ends this process, for a collective that
        failed or outlasted its time limit. Without effect where the backend cannot do it."""
        for number, group in enumerate((dist.group.WORLD, self._vectors)):
            backend = group._get_backend(self.device)
            if getattr(backend, "supports_abort_hooks", False):
                backend.register_abort_hook(number, action)

    def _print_waiting(self, timeout_s: float) -> None:
        # One rank of each machine is enough.
        if env_local_rank() == 0:
            who = "the other ranks" if self.rank == 0 else "rank 0"
            print(
                f"rank {self.rank} of {self.world_size} has waited {SAID_AFTER_S:g} s for {who}, "
                f"to meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, "
                f"MASTER_PORT), and waits for {timeout_s:g} s in all; are all of them started, and "
                "is that rank 0's address?",
                file=sys.stderr,
                flush=True,
            )

    def all_gather_bytes(self, value: bytes) -> list[bytes]:
        """Every rank's `value`, in rank order. Blocks; for start-up and checkpoints, never for a
        step."""
        # frombuffer refuses an empty buffer.
        mine = torch.empty(0, dtype=torch.uint8)
        if value:
            mine = torch.frombuffer(bytearray(value), dtype=torch.uint8)

        # all_gather takes tensors of one size: the sizes first, then the values, padded.
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        dist.all_gather(sizes, torch.tensor([len(mine)]), group=self._plain)
        longest = int(max(sizes))
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in sizes]
        dist.all_gather(parts, F.pad(mine, (0, longest - len(mine))), group=self._plain)
        heartbeat()

        values = []
        for part, size in zip(parts, sizes, strict=True):
            values.append(part[: int(size)].numpy().tobytes())
        return values

    def all_gather_json(self, value: Any) -> list[Any]:
        """Every rank's `value`, plain values, in rank order; tuples become lists."""
        # Not pickled: what another process sends is never run.
        return list(map(json.loads, self.all_gather_bytes(json.dumps(value).encode())))

    def all_gather_flat(self, tensor: Tensor) -> Tensor:
        """Concatenate equal-length 1-D tensors in rank order, on every rank."""
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self._vectors)
        return tensor

    def start_all_reduce(self, vector: Tensor) -> "PendingVector":
        """Start the sum of a small float64 vector over ranks; nobody waits until
        `PendingVector.read`."""
        return PendingVector.start(vector, self._vectors)

    def raise_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Do something, not collective itself, that can fail on one rank alone: if it does, every
        rank raises. Collective.

        Otherwise the others would wait for that rank in their next collective.
        """
        result: Any = None
        problem: Exception | None = None
        try:
            result = action()
        except Exception as error:
            problem = error
        own = None if problem is None else (type(problem).__name__, str(problem))
        failures = list(filter(None, self.all_gather_json(own)))
        if not failures:
            return result  # type: ignore[no-any-return]

        # An error that is not ours keeps its traceback.
        if problem is not None and not isinstance(problem, LargescaleError):
            raise problem

        # This rank's own error, or that of the first rank which has one. What is not one of our
        # errors is printed by its own rank: here it is only the reason to end.
        name, text = own or failures[0]
        kind = errors_by_name().get(name)
        known = kind(text) if kind else LostRankError(f"another rank failed: {name}: {text}")
        known.agreed = True
        raise known

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on one rank at least. Collective, and blocks."""
        return any(self.all_gather_json(flag))

    def roll_call(self, here: str, wait_s: float = 10.0) -> dict[int, str] | None:
        """What each rank that answers is doing, by rank; not collective: for when collectives no
        longer work.

        Writes `here` for this rank to the launcher's key-value store, and waits for what the others
        write. None where the store does not answer: rank 0 kept it.
        """
        if self._roll is None:
            return {0: here}
        # Not a `monitored_barrier`: it reports a rank that has died as a closed connection, and
        # without rank 0 it reports nothing.
        answers: list[dict[int, str]] = []
        # In a thread: a store whose process is stopped keeps the connection and never answers,
        # without a time limit.
        asking = threading.Thread(
            target=lambda: answers.extend(self._ask_all(here, wait_s)), daemon=True
        )
        asking.start()
        asking.join(wait_s + 5)
        return dict(sorted(answers[0].items())) if answers else None

    def _ask_all(self, here: str, wait_s: float) -> Iterator[dict[int, str]]:
        with contextlib.suppress(RuntimeError):
            self._roll.set(f"roll/{self.rank}", here)
            deadline = time.monotonic() + wait_s
            found = {self.rank: here}
            while len(found) < self.world_size and time.monotonic() < deadline:
                for rank in set(range(self.world_size)) - found.keys():
                    if self._roll.check([f"roll/{rank}"]):
                        found[rank] = self._roll.get(f"roll/{rank}").decode()
                time.sleep(0.1)
            yield found

            # The store may be rank 0's, and ends with it: rank 0 waits until all have read it.
            self._roll.set(f"read/{self.rank}", "")
            if self.rank == 0:
                have_read = [f"read/{rank}" for rank in found]
                while not self._roll.check(have_read) and time.monotonic() < deadline + 3:
                    time.sleep(0.1)

    def barrier(self) -> None:
        dist.barrier(group=self._plain)

    def close(self) -> None:
        dist.destroy_process_group()


def stay_on_this_machine(env: MutableMapping[str, str]) -> None:
    """Have gloo use the loopback interface where the ranks' address is a loopback one, unless the
    user has chosen an interface."""
    # All ranks are on this machine then. Else gloo would look for the address of the machine's own
    # name, which may not resolve.
    loopback = env["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1")
    if loopback and "lo" in dict(socket.if_nameindex()).values():
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")


def require_resolvable(address: str, patience_s: float = 40.0) -> None:
    """Raise LostRankError for a name without an address, after waiting for it."""
    # A machine that is just starting may get its name late.
    end = time.monotonic() + patience_s
    while True:
        try:
            socket.getaddrinfo(address, None)
            return
        except OSError as error:
            if time.monotonic() > end:
                raise LostRankError(
                    f"MASTER_ADDR={address} has no address that this machine knows ({error}); set "
                    "it to rank 0's IP address, or on one machine to 127.0.0.1 (torchrun: "
                    "--local-addr 127.0.0.1)"
                ) from error
            time.sleep(1)


def not_met(world_size: int, timeout_s: float, why: str = "") -> LostRankError:
    """The error of ranks that have not all started in time."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    reason = f": {why}" if why else ""
    return LostRankError(
        f"the {world_size} ranks did not find each other at {where} (MASTER_ADDR, MASTER_PORT) "
        f"within {timeout_s:g} s{reason}"
    )


def errors_by_name(
    base: type[LargescaleError] = LargescaleError,
) -> dict[str, type[LargescaleError]]:
    found = {base.__name__: base}
    for error in base.__subclasses__():
        found |= errors_by_name(error)
    return found


def _make_store(rank: int, world_size: int, timeout: datetime.timedelta) -> Any:
    """The key-value store at which ranks find each other. None under torchrun, whose agent keeps
    it."""
    # torch's stubs leave the stores out.
    module: Any = dist
    if world_size == 1:
        return module.HashStore()
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None

    # By itself torch would listen on every address of the machine, to anybody.
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    end = time.monotonic() + timeout.total_seconds()
    late = not_met(world_size, timeout.total_seconds())
    listener = None
    if rank == 0:
        listener = _listen(address, port).detach()
    else:
        _wait_until(lambda: _answers(address, port), end, late)
    store = module.TCPStore(
        address,
        port,
        world_size,
        rank == 0,
        timeout,
        wait_for_workers=False,
        master_listen_fd=listener,
    )
    store.add("started", 1)
    _wait_until(lambda: store.add("started", 0) >= world_size, end, late)
    return store


def _wait_until(done: Callable[[], bool], end: float, late: LostRankError) -> None:
    """Wait until `done`. Raises `late` at `end` of the monotonic clock, and Stopped for a signal,
    which torch's own waiting would leave unanswered."""
    while not done():
        if stop_requested():
            raise Stopped
        if time.monotonic() > end:
            raise late
        time.sleep(0.1)


def _answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True


def _listen(address: str, port: int) -> socket.socket:
    """A socket that listens where MASTER_ADDR is reached. Raises LostRankError for a port in
    use."""
    family, *_, place = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    # Debian resolves a machine's own name to 127.0.1.1, which no other machine does.
    own = "" if place[0] == "127.0.1.1" else place[0]
    # Every address, which is "", where MASTER_ADDR is none of this machine's own.
    for host in (own, ""):
        try:
            return socket.create_server((host, port), family=family, backlog=4096)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL or not host:
                why = os.strerror(error.errno or 0)
                raise LostRankError(
                    f"rank 0 cannot listen at {address}:{port} ({why}); set MASTER_PORT to a free "
                    "one, the same for all ranks"
                ) from error
    raise AssertionError


def is_lost_contact(error: BaseException) -> bool:
    """Whether the error is that another rank could not be reached, or did not answer in time."""
    if isinstance(error, dist.DistError):
        return True
    # Neither gloo nor the new NCCL backend has an error class of its own.
    text = str(error) if isinstance(error, RuntimeError) else ""
    return "gloo/transport" in text or any(name in text for name in NCCL_ERRORS)


def shared_gpu() -> DeviceError:
    """The error for two ranks that found the same GPU."""
    return DeviceError(
        f"two ranks share a GPU: {local_world_size(os.environ)} ranks run on "
        f"{socket.gethostname()}, where rank {env_rank()} sees {torch.cuda.device_count()} of its "
        "GPUs; start one rank a GPU, or let each see its own"
    )


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _connect_to_store() -> Any:
    """A connection to the store for the roll call alone."""
    # The process group's own may be held by a collective that hangs.
    module: Any = dist
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    store = module.TCPStore(address, port, timeout=datetime.timedelta(seconds=30))
    return module.PrefixStore("largescale", store)


def check_cuda(device: str, remedy: str = "--device cpu") -> None:
    """Raise DeviceError for "cuda" where torch sees no GPU."""
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError(
            f"device=cuda, but torch sees no CUDA device; to run on the CPU: {remedy}"
        )


def local_device(device: str) -> torch.device:
    """This rank's device; a GPU becomes torch's current one. Raises DeviceError where there is no
    GPU for this rank."""
    if device != "cuda":
        return torch.device(device)
    check_cuda(device, "--train.device cpu")
    local_rank = env_local_rank()
    visible = torch.cuda.device_count()
    if visible > 1 and local_rank >= visible:
        raise DeviceError(
            f"local rank {local_rank} has no GPU of its own, {visible} are visible; start "
            f"{visible} here"
        )

    # The GPU of the rank's own number, or the only one where the launcher shows it no other.
    index = 0 if visible == 1 else local_rank
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@dataclass
class PendingVector:
    """A vector whose sum over ranks is being computed."""

    work: Any
    vector: Tensor
    event: Any = None

    @classmethod
    def start(cls, vector: Tensor, group: Any) -> "PendingVector":
        if vector.device.type == "cpu":
            return cls(dist.all_reduce(vector, group=group, async_op=True), vector)
        # On a GPU the sum and its copy to pinned memory run on a side stream: reading waits for
        # these two only, where `.item()` would wait for everything queued since.
        side = _side_stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            dist.all_reduce(vector, group=group, async_op=True).wait()
            host = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            host.copy_(vector, non_blocking=True)
            # The allocator must not give its memory away before the copy.
            vector.record_stream(side)
            event = torch.cuda.Event()
            event.record(side)
        return cls(None, host, event)

    def read(self) -> list[float]:
        """Wait for the sum."""
        if self.event is not None:
            self.event.synchronize()
        elif self.work is not None:
            self.work.wait()
        values: list[float] = self.vector.tolist()
        return values


_stream: Any = None


def _side_stream() -> Any:
    global _stream
    if _stream is None:
        _stream = torch.cuda.Stream()
    return _stream
