"""A lease on a folder: the right to write there, by a file that its owner renews.

A lock does not protect a folder where the file system honours it on one machine only (NFS mounted
`nolock`, Lustre mounted `localflock`) or refuses it. A lease needs no more than a file that can be
made exclusively and renamed. Its owner renews it, by changing the file's content; who waits for it
takes it over after it has seen the same content for `LASTS_S`, by its own clock, so that the
machines' clocks need not agree. An owner that was suspended finds its lease gone, and stops. The
file stays when a lease is given back: where there is none, somebody has deleted it.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from pathlib import Path
from typing import Any

from largescale.errors import TakenOverError
from largescale.host.files import from_json, located
from largescale.host.launch import env_int

LEASE = "lease"
# How long a lease lasts that is not renewed, and how often its owner renews it.
LASTS_S = 60.0
RENEW_EVERY_S = 10.0
# An older renewal is repeated before its owner writes: what it writes takes time too.
FRESH_S = 30.0
# How long the main thread waits for a renewal in progress, before what is logged.
WAIT_FOR_RENEWAL_S = 1.0
# Who looks less often could miss a renewal because the file system did not answer.
LOOK_AT_LEAST_EVERY_S = 10.0

_PROC = Path("/proc")


def clock() -> float:
    """Seconds that also count while the machine is suspended, and that nobody sets."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


class Lease:
    """A lease that this process holds. A thread renews it until it is released."""

    def __init__(self, path: Path, token: str, file: int):
        """`path`: the lease's file, which is new and empty; `file`: its open descriptor; `token`:
        distinguishes this owner from every other. Raises OSError."""
        self.path = path
        self.token = token
        # Why this process does not hold the lease any more.
        self.lost: str | None = None
        self._file = file
        self._identity = identity()
        self._renewals = 0
        self._renewed = clock()
        # The thread renews it, and so does the main thread before it writes.
        self._renewing = threading.Lock()
        self._released = threading.Event()
        self._write()
        self._thread = threading.Thread(target=self._keep_renewing, name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def create(cls, path: Path, token: str) -> "Lease | None":
        """The lease; None where its file exists. Raises OSError."""
        file = _create(path)
        if file is None:
            return None
        try:
            return cls(path, token, file)
        # A file that says nothing would have to be waited for.
        except OSError:
            path.unlink()
            os.close(file)
            raise

    def require(self) -> None:
        """Before something is written: raise TakenOverError where the lease is another process's,
        OSError where that cannot be found out. Touches no file while the last renewal is fresh."""
        if self.lost or self._age() > FRESH_S:
            self.renew(wait_s=WAIT_FOR_RENEWAL_S)

    def renew(self, wait_s: float = -1) -> None:
        """Renew the lease, and prove that it is still this process's; raises as `require`.

        `wait_s`: how long to wait for the thread, which may hang where the file system does; for
        ever where it is negative."""
        if not self._renewing.acquire(timeout=wait_s):
            raise TimeoutError(f"{self.path} is not renewed yet: the file system does not answer")
        try:
            self._renew()
        finally:
            self._renewing.release()

    def _renew(self) -> None:
        if self.lost:
            raise TakenOverError(self.lost)
        start = clock()
        problem = None
        try:
            self._write()
        # Also where another machine has replaced the file: NFS calls it stale.
        except OSError as error:
            problem = error
        self._require_own_file()
        if problem:
            raise problem
        # Since before it was written: who waits has seen the new content later than that.
        self._renewed = start

    def _age(self) -> float:
        """Seconds since the last renewal."""
        return clock() - self._renewed

    def _write(self, state: str = "held") -> None:
        # In place: the file of a process that has taken over has another inode, and is not harmed.
        # Always as long as before, so that nobody reads the rest of an older content.
        self._renewals += 1
        content = {
            "token": self.token,
            **self._identity,
            "state": f"{state:8}",
            "renewals": f"{self._renewals:012}",
        }
        os.pwrite(self._file, json.dumps(content).encode(), 0)
        # On NFS nobody else sees it before. fsync would wait for other files too.
        getattr(os, "fdatasync", os.fsync)(self._file)

    def _require_own_file(self) -> None:
        """Find the file at its path, or where the folder was renamed to; make it again where it was
        deleted. Raises TakenOverError where another's is there, or may have been."""
        place = located(self.path, self._file)
        # Another name is that of a file which somebody takes away at this moment.
        if place.name == self.path.name:
            self.path = place
        owner = read_owner(self.path)
        if owner is None:
            # Raises OSError where the folder was deleted too, so that nobody trains there.
            self.path.parent.stat()
        if owner is None and self._age() < LASTS_S:
            file = _create(self.path)
            if file is not None:
                os.close(self._file)
                self._file = file
                try:
                    self._write()
                # On a full disk. An empty file would be taken for another owner's.
                except OSError:
                    self.path.unlink()
                    raise
                return
            owner = read_owner(self.path)
        if owner is None or owner.get("token") != self.token:
            self.lost = taken_over(self.path.parent, owner or {})
            raise TakenOverError(self.lost)

    def move(self, path: Path) -> None:
        """Hold the lease at this path, in a folder that this process has just made again, from the
        next renewal on."""
        with self._renewing:
            self.path = path
            self._renewed = clock()

    def _keep_renewing(self) -> None:
        while not self._released.wait(RENEW_EVERY_S):
            # A file system that fails may answer the next time.
            with contextlib.suppress(OSError, TakenOverError):
                self.renew()

    def release(self) -> None:
        """Give the lease back: the next process need not wait."""
        self._released.set()
        self._thread.join()
        # Into a file that nobody sees any more, where it was taken over.
        with contextlib.suppress(OSError):
            self._write("released")
        os.close(self._file)


class LeaseRequest:
    """A process that wants a lease, and observes its owner meanwhile."""

    def __init__(self, path: Path):
        self.path = path
        self.token = secrets.token_hex(16)
        self._seen: bytes | None = None
        # Since when the file had this content, and when it was last looked at.
        self._since = 0.0
        self._looked = 0.0

    @property
    def owner(self) -> str:
        """Who was seen to hold the lease, for a message; empty where that is not known."""
        return owner_name(_parse(self._seen or b""))

    def try_take(self) -> Lease | None:
        """The lease, where it is free, or its owner is gone or has not renewed it for `LASTS_S`.
        To be called about every second. Raises OSError."""
        lease = Lease.create(self.path, self.token)
        if lease is not None:
            return lease
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            # Taken away a moment ago, by another process that waits.
            return None

        now = clock()
        if content != self._seen or now - self._looked > LOOK_AT_LEAST_EVERY_S:
            self._seen = content
            self._since = now
        self._looked = now
        expired = now - self._since >= LASTS_S
        return self._take_over(content) if expired or is_gone(_parse(content)) else None

    def _take_over(self, content: bytes) -> Lease | None:
        """The lease of an owner that is gone, whose file had this content; None where the file has
        changed, or another process was faster."""
        # Of several processes only one can rename it.
        aside = self.path.with_name(f".{self.path.name}.{self.token}")
        try:
            self.path.rename(aside)
        except FileNotFoundError:
            return None
        try:
            if aside.read_bytes() == content:
                return Lease.create(self.path, self.token)
            # Renewed at the last moment, or taken over by another process: given back, unless its
            # owner has made it again already.
            with contextlib.suppress(OSError):
                self.path.hardlink_to(aside)
            return None
        finally:
            aside.unlink()


def require_owner(folder: Path, token: str) -> None:
    """Raise TakenOverError where the lease of the folder is not that of `token`; for processes that
    write for its owner."""
    owner = read_owner(folder / LEASE) or {}
    if owner.get("token") != token:
        raise TakenOverError(taken_over(folder, owner))


def taken_over(folder: Path, owner: dict[str, Any]) -> str:
    """The message for a process that has lost the lease of `folder` to `owner`."""
    name = owner_name(owner)
    who = f"another process ({name})" if name else "another process"
    return (
        f"{who} has taken over {folder} from this one, which was suspended or cut off and now ends; "
        "stop that one, or start another run with --output DIR"
    )


def read_owner(path: Path) -> dict[str, Any] | None:
    """What a lease's file says of its owner: nothing where it is half written, None where there is
    no file. Raises OSError."""
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None


def owner_name(owner: dict[str, Any]) -> str:
    """Such as 'process 77 on node5, job 1234'."""
    if "pid" not in owner:
        return ""
    job = f", job {owner['job']}" if owner.get("job") else ""
    return f"process {owner['pid']} on {owner.get('host')}{job}"


def is_gone(owner: dict[str, Any]) -> bool:
    """Whether an owner has given its lease back, or is known not to run any more: it was a process
    of this machine, or an earlier start of this batch job."""
    if owner.get("state") == "released":
        return True
    own = identity()
    try:
        if own["job"] and owner["job"] == own["job"] and owner["restart"] < own["restart"]:
            return True
        # Process numbers are those of one boot, and of one container.
        for key in ("host", "boot", "pid_namespace"):
            if not own[key] or owner[key] != own[key]:
                return False
        return not _is_running(owner["pid"], owner["started"])
    except (LookupError, TypeError, OverflowError):
        return False


def _is_running(pid: int, started: str) -> bool:
    """Whether the process runs, and not another one that has its number since."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    # Killed, and nobody has asked for its status yet.
    if _fields(pid)[:1] == ["Z"]:
        return False
    # Another user's may be hidden.
    now = _started(pid)
    return not now or now == started


def _started(pid: int) -> str:
    """When a process started, in the kernel's ticks; empty where that is not known."""
    fields = _fields(pid)
    return fields[19] if len(fields) > 19 else ""


def _fields(pid: int) -> list[str]:
    """Of /proc/PID/stat, from the state on; empty where that is not known."""
    # Before it stands the program's name, which can contain anything.
    return _text(_PROC / f"{pid}/stat").rpartition(")")[2].split()


def identity() -> dict[str, Any]:
    """What other processes are told of this one, by which `is_gone` knows it."""
    job = os.environ.get("SLURM_JOB_ID", "")
    # In another namespace the same number is another process.
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = os.readlink(_PROC / "self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": _text(_PROC / "sys/kernel/random/boot_id").strip(),
        "pid_namespace": namespace,
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": job and f"{job} of {os.environ.get('SLURM_CLUSTER_NAME', 'Slurm')}",
        "restart": env_int("SLURM_RESTART_COUNT", default=0),
    }


def _create(path: Path) -> int | None:
    """Make the file, exclusively: its descriptor, or None where it exists. Raises OSError."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return None


def _parse(content: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        owner = from_json(content)
        if isinstance(owner, dict):
            return owner
    return {}


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(errors="replace")
    return ""
