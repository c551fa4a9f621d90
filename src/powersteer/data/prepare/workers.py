"""Work spread over processes, a bounded number of items under way."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context, parent_process
from typing import Any, TypeVar

from powersteer.core.errors import PowersteerError

WAITING = 4
"""Items for each process that are under way: so many results may wait to be taken."""

Given = TypeVar("Given")
Made = TypeVar("Made")

_work: Callable[[Any], Any]
"""What this process does with each item."""


def in_processes(
    build: Callable[[], Callable[[Given], Made]], given: Iterable[Given], processes: int
) -> Iterator[Made]:
    """What the work makes of each item, in the order in which they are done.

    Args:
        build: Makes the work, once in each process; can be pickled, as can all that goes in and out.
        given: The items.
        processes: How many; with one, it is this one.

    Raises:
        PowersteerError: The work raised it, or a process died.
    """
    return map(build(), given) if processes == 1 else pooled(build, given, processes)


def pooled(build: Callable[[], Callable[[Given], Made]], given: Iterable[Given], processes: int) -> Generator[Made]:
    """As `in_processes`, in processes of their own even where it is one; closed, it ends them."""
    queue = iter(given)
    pool = ProcessPoolExecutor(processes, get_context("spawn"), _start, (build,))
    try:
        waiting: set[Future[Any]] = {pool.submit(_call, one) for one in islice(queue, WAITING * processes)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(_call, one) for one in islice(queue, len(done))}
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise PowersteerError(
            "a process died, perhaps for want of memory: give the same command again with fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def available() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(build: Callable[[], Callable[[Any], Any]]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent stops, and stops its processes
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    os.environ["OPENCV_FOR_THREADS_NUM"] = "1"  # a process a core is enough
    _work = build()
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _leave_with_parent() -> None:
    """A parent that was killed cannot stop its processes."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(one: Any) -> Any:
    return _work(one)
