"""Parts of HTML: everything that comes from files is escaped here."""

import html
from collections.abc import Iterable, Sequence

from largescale.host.launch import printable_lines

# A cell with more characters than this may have several lines.
_LONG = 36


class Markup(str):
    """HTML of ours, which is not escaped again."""


def text(value: object) -> str:
    """A value as text of a page."""
    return html.escape(printable_lines(value))


def paragraphs(*lines: object) -> str:
    """Lines of words, one below the other."""
    return "".join(f"<p>{text(line)}</p>" for line in lines)


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that scrolls by itself where it is too wide, by keyboard too; nothing where there are
    no rows."""
    lines = []
    for row in rows:
        lines.append(f"<tr>{''.join(map(_cell, row))}</tr>")
    if not lines:
        return ""
    head = "".join(f'<th scope="col">{text(name)}</th>' for name in header)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(title)}"><table>'
        f"<caption>{text(title)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(value: object) -> str:
    if isinstance(value, Markup):
        return f"<td>{value}</td>"
    content = text(value)
    return f"<td{' class=long' * (len(content) > _LONG)}>{content}</td>"


def folded(summary: str, content: str, *, spoken: str = "", printed: bool = False) -> str:
    """What is shown only where it is asked for, and on paper if it is `printed`; nothing where
    there is no content. `spoken`: the summary for who does not see what it stands below."""
    if not content:
        return ""
    name = ' class="printed"' if printed else ""
    label = f' aria-label="{text(spoken)}"' if spoken else ""
    return f"<details{name}><summary{label}>{text(summary)}</summary>{content}</details>"


def figure(title: str, picture: str, numbers: str = "", note: str = "") -> str:
    """A picture with its title above it, and its numbers below for who cannot see it."""
    below = f'<p class="note">{text(note)}</p>' if note else ""
    return (
        f"<figure><figcaption>{text(title)}</figcaption>{picture}{below}"
        f"{folded('numbers', numbers, spoken=f'numbers of {title}')}</figure>"
    )


def section(title: str, *parts: str, grid: bool = False) -> str:
    """A part of the page under a heading; nothing where it has no parts."""
    content = "".join(parts)
    if not content:
        return ""
    if grid:
        content = f'<div class="grid">{content}</div>'
    return f"<section><h3>{text(title)}</h3>{content}</section>"
