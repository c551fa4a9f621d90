"""What a person is told when something goes wrong."""

from __future__ import annotations

import functools
import html
import inspect
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from powersteer.apps.studio.folders import without_place
from powersteer.core.errors import PowersteerError

Handler = Callable[..., Any]


def told(work_dir: Path) -> Callable[[Handler], Handler]:
    """A decorator of handlers, whose errors become messages: what the person can mend in full, but for the place where
    the server keeps things; anything else in the server's log.

    Args:
        work_dir: That place.
    """
    return lambda handler: _told(handler, work_dir)


def _told(handler: Handler, work_dir: Path) -> Handler:
    def message(error: Exception) -> gr.Error:
        if isinstance(error, PowersteerError):
            return gr.Error(html.escape(without_place(str(error), work_dir)), print_exception=False)
        logging.getLogger(__name__).exception("in %s", handler.__name__, exc_info=error)
        return gr.Error("Something went wrong; the terminal that runs the studio says what.", print_exception=False)

    if inspect.isgeneratorfunction(handler):

        @functools.wraps(handler)
        def told_in_parts(*values: Any, **more: Any) -> Iterator[Any]:
            try:
                yield from handler(*values, **more)
            except Exception as error:
                raise message(error) from None

        return told_in_parts

    @functools.wraps(handler)
    def told(*values: Any, **more: Any) -> Any:
        try:
            return handler(*values, **more)
        except Exception as error:
            raise message(error) from None

    return told
