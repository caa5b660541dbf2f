"""Sizes of files and of memory, for people."""


def size_text(count: float) -> str:
    """A number of bytes to three digits, in the unit that fits: 812 B, 47.9 KB, 1.25 GB. A KB is
    1,000 bytes."""
    value = float(count)
    for unit in ("B", "KB", "MB", "GB"):
        # As it is printed: 999,999 bytes are 1 MB.
        if float(f"{value:.3g}") < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB" if value < 99.95 else f"{value:,.0f} TB"
