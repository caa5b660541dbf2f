"""For mkdocs (mkdocs.yml): pages that lie outside docs/ in the clone, and links between them."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # in the clone: in the site
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "ds_configs/README.md": "ds_configs.md",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, target in PAGES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, target, content=relink(text, Path(source).parent)))
    return files


def on_page_markdown(markdown: str, page: object, **_: object) -> str:
    """The pages of docs/ link to the clone's files as ../NAME."""
    return relink(markdown, Path("docs"))


def relink(text: str, folder: Path) -> str:
    """Links of a page that lies in `folder` of the clone, as they are in the site. A file that is
    no page of it keeps its text and loses its link."""

    def target(match: re.Match[str]) -> str:
        label, link = match[1], match[2]
        if link.startswith(("http://", "https://", "#")):
            return match[0]
        name, hash_, anchor = link.partition("#")
        path = Path(*_normal(folder / name))
        if str(path) in PAGES:
            return f"[{label}]({PAGES[str(path)]}{hash_}{anchor})"
        if path.parts[:1] == ("docs",):
            return f"[{label}]({'/'.join(path.parts[1:])}{hash_}{anchor})"
        if str(path) in PAGES.values() or (ROOT / "docs" / path).exists():
            return match[0]  # relinked before
        return label

    return re.sub(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)", target, _images(text))


def _images(text: str) -> str:
    return re.sub(r"!\[([^\]]*)\]\(docs/([^)\s]+)\)", r"![\1](\2)", text)


def _normal(path: Path) -> list[str]:
    parts: list[str] = []
    for part in path.parts:
        if part == "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return parts
