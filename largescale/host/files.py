"""Files: written atomically, locked, checked, and found again where they were moved."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pwd
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from largescale.errors import CheckpointError, StorageError
from largescale.host.launch import heartbeat

# Errors that another try does not change, unlike those of a full or a remote disk.
PERMANENT = (
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EINVAL,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)
# In a run directory, held by the one process that trains it.
LOCK = "lock"


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    # A file of many GB takes longer than the watchdog's limit.
    with path.open("rb", buffering=0) as file:
        while part := file.read(2**20):
            digest.update(part)
            heartbeat()
    return digest.hexdigest()


def from_json(text: str | bytes) -> Any:
    """json.loads, but everything that cannot be read is a ValueError."""
    # JSON that is nested too deeply for Python otherwise raises RecursionError.
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def system_reason(error: OSError) -> str:
    """What an error of the system says, without its number and path: those of libraries have them
    several times."""
    return os.strerror(error.errno) if error.errno else str(error)


def is_unicode(text: str) -> bool:
    """Whether the text can be encoded in UTF-8."""
    # Half of a surrogate pair cannot. JSON can spell half an emoji so, and Python the bytes of file
    # names and arguments that are not UTF-8.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sources_sha256(folder: Path) -> str:
    """The SHA-256 of the names and contents of all Python files in a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        # With its length, so that two files cannot look like one.
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def fsync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> IO[str] | None:
    """Lock a file until it is closed or the process dies. None where another process holds it."""
    # Never truncated: a file of this name may be another program's.
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    # A file system without locks: nothing protects the file there.
    except OSError:
        pass
    return file


def try_lock_byte(file: IO[str], number: int) -> bool:
    """Lock one byte of a file, which need not exist, until the file is closed or the process dies.
    False where another process holds it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
    except (BlockingIOError, PermissionError):
        return False
    # A file system without locks: nothing protects the byte there.
    except OSError:
        pass
    return True


def lock_shared(path: Path) -> IO[str] | None:
    """Lock a file, together with others who do so, until it is closed or the process dies; waits
    for one who holds it alone. None on a file system without locks."""
    # To be read too: NFS locks only so what others may lock as well.
    file = path.open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_SH)
    except OSError:
        file.close()
        return None
    return file


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to the folder until the block ends, where they ask so too.
    Raises CheckpointError where one does so now."""
    # The folder itself, so that no file is left in it.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another process is writing to {folder}; wait until it ends, or choose another --out"
            ) from error
        # A file system without locks: nothing protects the folder there.
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def unchanged(file: Path) -> Iterator[None]:
    """Raise CheckpointError where the file is written anew, or removed, while the block reads what
    belongs to it."""
    before = _version(file)
    yield
    if _version(file) != before:
        raise CheckpointError(
            f"{file.parent} was written anew while it was read; run again once that has ended"
        )


def _version(file: Path) -> tuple[int, ...] | None:
    """What differs once a file was replaced; None where there is none."""
    with contextlib.suppress(OSError):
        facts = file.stat()
        return facts.st_dev, facts.st_ino, facts.st_mtime_ns, facts.st_size
    return None


def require_writable(*files: Path, remedy: str) -> None:
    """Prove, before any work, that files can be written, or made with the folders above them; makes
    nothing.

    Raises CheckpointError that names the obstacle and its owner, StorageError for what may go away.
    """
    for file in files:
        existing = _nearest_existing(file)
        # Opened, since permissions alone do not show a read-only file system.
        try:
            if existing == file:
                os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
            else:
                _require_names(file, existing)
                # Hidden: some file systems cannot make one without a name.
                with tempfile.TemporaryFile(dir=existing, prefix="."):
                    pass
        except OSError as error:
            # A folder that is there, and in which nothing can be made, such as /proc.
            no_new_names = error.errno == errno.ENOENT and existing.is_dir()
            if error.errno in PERMANENT or no_new_names:
                if existing != file and existing.is_file():
                    raise CheckpointError(
                        f"cannot write to {file}: {existing} is a file; {remedy}"
                    ) from error
                raise CheckpointError(
                    f"cannot write to {file}: {error.strerror}; {_whose(existing)}; {remedy}"
                ) from error
            raise StorageError(
                f"cannot write to {file} at present: {system_reason(error)}; {remedy}, or run again later"
            ) from error


def _require_names(file: Path, existing: Path) -> None:
    """Raise OSError where a name of the path, below the folder that exists, can be no file's."""
    for name in file.relative_to(existing).parts:
        with contextlib.suppress(FileNotFoundError):
            os.lstat(existing / name)


def visible(folder: Path) -> list[Path]:
    """What the folder holds, in order, but for hidden files; nothing where there is no folder."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return []


def names_of(paths: list[Path]) -> str:
    """The names of the first of these files, for a message."""
    names = [path.name for path in paths[:3]]
    more = len(paths) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "")


def _nearest_existing(path: Path) -> Path:
    """The path itself where it exists, else the innermost of the folders above it that does."""
    # A link that leads nowhere exists too: it is what is in the way.
    while not os.path.lexists(path):
        path = path.parent
    return path


def _whose(path: Path) -> str:
    """Whose file this is, such as 'runs/x/lock belongs to ada (mode 644)'."""
    facts = path.lstat()
    try:
        owner = pwd.getpwuid(facts.st_uid).pw_name
    # A user of another machine, as in a container.
    except KeyError:
        owner = f"user {facts.st_uid}"
    return f"{path} belongs to {owner} (mode {stat.S_IMODE(facts.st_mode):o})"


def located(path: Path, descriptor: int) -> Path:
    """The present path of a file or folder that was opened as `path`: it, or a folder above, may
    have been renamed since. `path` where it was deleted, or where it cannot be found."""
    held = os.fstat(descriptor)
    # Mostly it is where it was; Linux knows its path otherwise.
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), held):
            return path
    with contextlib.suppress(OSError):
        if held.st_nlink:
            return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    return path


def write_atomically(path: Path, content: str | bytes | Iterable[str]) -> None:
    """Write a file that has its old content or all of the new one, whenever the machine stops. A
    long text can be given in parts."""
    temporary = path.with_name(path.name + ".tmp")
    # On disk before the name is: else a power cut could leave an empty file under it.
    try:
        with temporary.open("wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                for part in [content] if isinstance(content, str) else content:
                    file.write(part.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # On a full disk it would only take space.
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    fsync_dir(path.parent)


@contextlib.contextmanager
def safetensors_disk_errors(path: Path) -> Iterator[None]:
    """While safetensors writes `path`: its error for a full disk, which is no OSError, becomes one."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from error


def append_line(path: Path, line: str) -> None:
    """Append a line to a file, and wait until it is on disk."""
    with path.open("a+b") as file:
        # A line that a crash cut short stays by itself.
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        cut_short = file.read(1) not in (b"", b"\n")
        file.write(("\n" * cut_short + line + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
