"""Libraries that take seconds to load: each of pytest's workers reads all test files, and few of them need these."""

import importlib
from importlib.util import find_spec
from typing import Any

import pytest


class Lazy:
    """A library that is loaded when a test first asks for something in it. Where it is not installed, the tests of the
    module that names it are skipped."""

    def __init__(self, name: str):
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed", allow_module_level=True)
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        # pytest asks all that is in a test module whether it is a test or a fixture, by such attributes.
        if attribute.startswith("_"):
            raise AttributeError(attribute)
        return getattr(importlib.import_module(self._name), attribute)
