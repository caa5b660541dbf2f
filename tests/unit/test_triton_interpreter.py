"""The kernels themselves, in Triton's interpreter: their tests, in a process that has it in place of the compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="torch brings Triton on x86-64 and arm64 Linux only")


def test_in_tritons_interpreter() -> None:
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", here / "test_fused_norm.py", here / "test_fused_products.py",
         here / "test_fused_adamw.py"],
        capture_output=True, text=True, cwd=here.parents[1], env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and re.search(r"\b22 passed", done.stdout), done.stdout
