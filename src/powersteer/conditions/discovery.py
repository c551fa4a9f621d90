"""Modules that register what they hold when they are imported: a new one is found without being listed anywhere."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules


@cache
def import_modules(package: str) -> tuple[str, ...]:
    """Import every module of a package, in the order of their names, once; returns the names."""
    names = tuple(found.name for found in iter_modules(import_module(package).__path__))
    for name in names:
        import_module(f"{package}.{name}")
    return names
