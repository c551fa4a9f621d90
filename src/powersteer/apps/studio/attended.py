"""`powersteer train` in a process that ends when the studio does, even one that was killed.

The studio holds the other end of the standard input and writes nothing: it ends when the studio ends.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path

from powersteer.apps.studio.folders import training_lock

PATIENCE = 10.0
"""Seconds for the best weights to be written, as after Ctrl-C."""


def main() -> None:
    """Train by the configuration file that is the only argument, beside which the studio's locks lie."""
    file = Path(sys.argv[1])
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    sys.argv = ["powersteer", "train", str(file)]
    with training_lock(file.parent):
        runpy.run_module("powersteer.apps.cli", run_name="__main__", alter_sys=True)


def _leave_with_parent() -> None:
    """A parent that was killed cannot stop its training."""
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(1)


if __name__ == "__main__":
    main()
