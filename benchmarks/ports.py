"""A port for the ranks of a benchmark to meet at."""

import socket


def free_port() -> int:
    """Any free port: several benchmarks and tests may run on one machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
