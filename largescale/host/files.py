"""Files that are whole or absent."""

import contextlib
import fcntl
import hashlib
import json
import os
import pwd
import stat
import tempfile
from pathlib import Path
from typing import IO, Any

from largescale.errors import CheckpointError, StorageError
from largescale.host.launch import heartbeat

LOCK = "lock"  # in a run directory, held by the one process that trains it


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while part := file.read(2**20):
            digest.update(part)
            heartbeat()
    return digest.hexdigest()


def from_json(text: str | bytes) -> Any:
    """As json.loads; JSON that is nested too deeply for Python is a ValueError too, like all that
    cannot be read."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold it: not half of a surrogate pair, as which JSON can spell half an
    emoji, and Python bytes of file names and arguments that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def sources_sha256(folder: Path) -> str:
    """Of the names and contents of all Python files in it."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(folder)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def fsync_dir(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(path: Path) -> IO[str] | None:
    """Held until it is closed, or the process dies. None where another process holds it."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError:
        pass  # a file system without locks
    return file


def require_writable(*files: Path, remedy: str) -> None:
    """Proves, before any work, that files can be written, or made with the folders above them;
    makes nothing. Raises CheckpointError that says what is in the way and whose it is, StorageError
    for what may go away."""
    for file in files:
        there = next(path for path in (file, *file.parents) if os.path.lexists(path))
        try:
            if there == file:
                os.close(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK))
            else:
                with tempfile.TemporaryFile(dir=there):
                    pass
        except (PermissionError, NotADirectoryError, IsADirectoryError) as error:
            raise CheckpointError(
                f"cannot write to {file}: {error.strerror}; {_whose(there)}; {remedy}"
            ) from error
        except OSError as error:
            raise StorageError(f"cannot write to {file} at present: {error}") from error


def _whose(path: Path) -> str:
    """Such as 'runs/x/lock belongs to ada (mode 644)'."""
    facts = path.lstat()
    try:
        owner = pwd.getpwuid(facts.st_uid).pw_name
    except KeyError:
        owner = f"user {facts.st_uid}"
    return f"{path} belongs to {owner} (mode {stat.S_IMODE(facts.st_mode):o})"


def located(path: Path, descriptor: int) -> Path:
    """Where a file or folder lies now that was opened as `path`: it, or one above, may have been
    renamed meanwhile. `path` where it was deleted, or nobody can tell."""
    held = os.fstat(descriptor)
    with contextlib.suppress(OSError):
        if os.path.samestat(os.stat(path), held):
            return path
    with contextlib.suppress(OSError):
        if held.st_nlink:
            return Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    return path


def write_atomically(path: Path, content: str | bytes) -> None:
    """The file has its old content or all of the new one, whenever the machine stops."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # the space that it takes, on a full disk
        raise
    temporary.replace(path)
    fsync_dir(path.parent)


def append_line(path: Path, line: str) -> None:
    """Durable; a line that a crash cut short stays by itself."""
    with path.open("a+b") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        cut_short = file.read(1) not in (b"", b"\n")
        file.write(("\n" * cut_short + line + "\n").encode())
        file.flush()
        os.fsync(file.fileno())
