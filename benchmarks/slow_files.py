"""A FUSE file system over a folder in which each read waits, and all of them share a bandwidth; see
slow_storage.py. It imports nothing of ours, and runs in the environment of the loader's peers.

    slow_files.py FOLDER MOUNT MS MB_PER_S
"""

import os
import sys
import threading
import time
from typing import Any

import mfusepy


class SlowFiles(mfusepy.Operations):
    """The files of a folder, to be read only."""

    use_ns = True

    def __init__(self, folder: str, ms: float, mb_per_s: float) -> None:
        self.folder, self.seconds, self.bytes_per_s = folder, ms / 1000, mb_per_s * 1e6
        self._lock = threading.Lock()
        # When the line that all reads share is free again.
        self._free = 0.0

    def init_with_config(self, conn_info: Any, config_3: Any) -> None:
        # A network file system has many reads under way.
        conn_info.max_background = 128

    def getattr(self, path: str, fh: int | None = None) -> dict[str, Any]:
        facts = os.lstat(self.folder + path)
        return {name: getattr(facts, name) for name in ("st_mode", "st_size", "st_nlink")}

    def readdir(self, path: str, fh: int) -> list[str]:
        return [".", "..", *os.listdir(self.folder + path)]

    def open(self, path: str, flags: int) -> int:
        return os.open(self.folder + path, os.O_RDONLY)

    def release(self, path: str, fh: int) -> int:
        os.close(fh)
        return 0

    def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
        begin = time.monotonic()
        content = os.pread(fh, size, offset)
        with self._lock:
            self._free = max(self._free, begin) + len(content) / self.bytes_per_s
            ready = max(self._free, begin + self.seconds)
        time.sleep(max(0.0, ready - time.monotonic()))
        return content


def main() -> None:
    folder, mount, ms, mb_per_s = sys.argv[1:]
    files = SlowFiles(folder, float(ms), float(mb_per_s))
    mfusepy.FUSE(files, mount, foreground=True, ro=True, max_threads=128)


if __name__ == "__main__":
    main()
