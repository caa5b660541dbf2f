"""Pages on runs, and how they are read."""

from html.parser import HTMLParser
from pathlib import Path

from largescale import status


class Reader(HTMLParser):
    """What a page consists of: balanced, or it raises."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self._open}:
            self.text.append(data)


def page(tmp_path: Path, *runs: Path, code: int = 0) -> str:
    path = tmp_path / "pages/page.html"
    assert status.main([*map(str, runs), "--html", str(path)]) == code
    return path.read_text()
