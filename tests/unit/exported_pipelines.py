"""Exports for diffusers: their code and their files."""

from pathlib import Path

import pytest

from tests.lazy import Lazy

diffusers = Lazy("diffusers")


@pytest.fixture(autouse=True)
def modules_of_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers copies the code of folders to one of its own, which it adds to sys.path."""
    folder = tmp_path_factory.mktemp("modules")
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))
    diffusers.utils.logging.disable_progress_bar()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
