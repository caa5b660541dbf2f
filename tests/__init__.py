"""A package, as some distributions on PyPI install one of that name, which would otherwise come first."""
