"""Text from files of others as Markdown, in which nothing of it has a meaning of its own."""

from collections.abc import Iterable, Sequence


def one_line(value: object) -> str:
    """Text without line breaks."""
    # What is no text, such as a file's name in another encoding, must not end the writing.
    return " ".join(str(value).encode("utf-8", "replace").decode().split())


def code(value: object) -> str:
    """Text as code, in which nothing but a backtick has a meaning: those are left out."""
    return f"`{one_line(value).replace('`', '')}`"


def plain(value: object) -> str:
    """Text in one line of Markdown, also in a cell of a table."""
    text = one_line(value)
    for character in "\\`|<>[]*_":
        text = text.replace(character, f"\\{character}")
    return text


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table of Markdown; the cells are made plain, the head is taken as it is."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for row in rows:
        lines.append(f"| {' | '.join(map(plain, row))} |")
    return "\n".join(lines)
