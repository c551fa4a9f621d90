"""Signals that end a run after the update under way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_on_signal() -> Generator[threading.Event]:
    """Ctrl-C, SIGTERM and SIGHUP (the terminal closes) end the loop after the step under way; a second one ends it at
    once. What ``nohup`` has a run ignore, it ignores."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request_stop(*_: Any) -> None:
        stop.set()
        for number, handler in previous.items():
            # A terminal that closes says so twice: itself, and by the shell in it.
            signal.signal(number, signal.SIG_IGN if number == hangup else handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # not on Windows
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    previous = {number: signal.signal(number, request_stop) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
