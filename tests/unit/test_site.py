"""The site of `make docs`: no page is left out, no link leads nowhere."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def build(root: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=900)


def test_the_site(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="python install.py docs brings it")
    done = build(ROOT, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    for page in (ROOT / "docs").glob("*.md"):
        assert (tmp_path / "site" / page.stem / "index.html").exists(), page
    assert "PatiencePacing" in (tmp_path / "site/curriculum/index.html").read_text()
    start = (tmp_path / "site/index.html").read_text()
    assert 'href="train/"' in start and 'src="curriculum.png"' in start


def test_a_dead_link_fails(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="python install.py docs brings it")
    for name in ("docs", "ds_configs", "largescale"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.md"), ROOT / "mkdocs.yml"):
        shutil.copy(path, tmp_path)
    (tmp_path / "docs/glossary.md").write_text("[gone](nowhere.md)")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and re.search(r"nowhere\.md", done.stderr + done.stdout)
