"""What both tabs of the page are made with."""

from __future__ import annotations

import html
from importlib.resources import files
from typing import Any

COMPUTE: dict[str, Any] = {"concurrency_id": "compute", "concurrency_limit": 1, "api_visibility": "private"}
"""Events that use the base: one at a time."""
RAW: dict[str, Any] = {"preprocess": False}
"""Values as the browser sent them: `wishes` checks them, with better words than Gradio's."""
LIGHT: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
"""Events that are answered at once."""
WIDE: dict[str, Any] = {"min_width": 280}
"""A column."""


def status(words: str, share: float | None = None, *, wait: bool = False) -> str:
    """A line of HTML that says what happens.

    Args:
        words: What.
        share: How much of it is done, in [0, 1], shown as a bar.
        wait: Show a bar that has no share.
    """
    bar = "<progress></progress>" if wait else ""
    if share is not None:
        bar = f'<progress max="1" value="{share:.3f}"></progress>'
    return f'<div class="status" role="status">{html.escape(words)}{bar}</div>'


def asset(name: str) -> str:
    """The text of a file beside this one."""
    return (files("powersteer.apps.studio") / name).read_text(encoding="utf-8")
