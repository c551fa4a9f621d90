"""Imported, it registers every extractor; none imports what only it needs before it is built or called."""

from __future__ import annotations

from importlib import import_module

MODULES = ("hed", "edges", "labels", "boxes", "style", "features", "annotators")
"""In order: a task's first extractor is its default."""

for _module in MODULES:
    import_module(f"powersteer.conditions.extractors.{_module}")
