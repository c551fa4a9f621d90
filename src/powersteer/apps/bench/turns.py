"""How ways are timed: each in turns with the baseline, one row finished before the next begins."""

from __future__ import annotations

import gc
import re
import statistics
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from powersteer.apps.bench.shapes import ISOLATES
from powersteer.core.errors import PowersteerError

Step = Callable[[], Any]
OUT_OF_MEMORY = "out of memory"
"""The error of a row whose way did not fit."""
SYNCHRONIZING = "called a synchronizing CUDA operation"
"""What torch warns of whenever the CPU waits for the GPU."""


@dataclass(frozen=True)
class Turns:
    """What the rounds showed."""

    seconds: float
    """Median of the way's turns."""
    ratio: float
    """To the baseline's turn of the same round, median; 1 for the baseline itself."""


def chosen(names: Sequence[str], only: Sequence[str], *, baseline: bool = True) -> list[str]:
    """The names that are to be measured, in their order: those asked for, and the baseline, which is the first.

    Args:
        names: As the table has them.
        only: Names in any case, or in short: ``bps-paper-warm-plan``, or its beginning up to a hyphen, which may mean
            several (``bps-paper``); a whole name (``controlnet``) means itself alone. Empty for all.
        baseline: Whether the first name is one.

    Raises:
        PowersteerError: Nothing has such a name.
    """
    slugs = {_slug(name): name for name in names}
    found = {names[0]} if baseline else set[str]()
    for wanted in only:
        slug = _slug(wanted)
        meant = [slug] if slug in slugs else [one for one in slugs if slug and one.startswith(f"{slug}-")]
        if not meant:
            raise PowersteerError(f"there is no '{wanted}' to measure: --only takes {', '.join(slugs)}")
        found.update(slugs[one] for one in meant)
    return [name for name in names if not only or name in found]


def take_turns(step: Step, baseline: Step | None, rounds: int, device: str) -> Turns:
    """Time a way beside the baseline, so that a machine's moods hit both alike; both have run before.

    Args:
        step: The way's.
        baseline: The baseline's, which has the first turn of each round; None where the way is the baseline.
        rounds: One turn each.
        device: Where they run.
    """
    mine: list[float] = []
    others: list[float] = []
    for _ in range(rounds):
        if baseline is not None:
            others.append(timed(baseline, device))
        mine.append(timed(step, device))
    return Turns(
        seconds=statistics.median(mine),
        ratio=statistics.median(a / b for a, b in zip(mine, others or mine, strict=True)),
    )


def timed(step: Step, device: str) -> float:
    """Seconds that a step takes, from when the device is idle to when it is again."""
    wait(device)
    since = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - since


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if is_cuda(device):
        torch.cuda.synchronize()


def device_waits(step: Step, device: str) -> int | None:
    """How many times a step makes the CPU wait for the GPU, of the ways that torch knows; None on the CPU."""
    if not is_cuda(device):
        return None
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum(SYNCHRONIZING in str(one.message) for one in told)


def release(device: str, *, compiled: bool = False) -> None:
    """Free what a finished row has left; compiled code goes where torch cannot keep modules apart."""
    gc.collect()
    if compiled and not ISOLATES:
        torch.compiler.reset()
    if is_cuda(device):
        torch.cuda.empty_cache()


@contextmanager
def must_fit(shape: str, device: str) -> Generator[None]:
    """Within it the baseline is built, without which nothing can be measured.

    Raises:
        PowersteerError: The device has not the memory for it.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise PowersteerError(
            f"the networks of --shape {shape} do not fit into the memory of {device}: take a smaller shape, or "
            "--dtype bfloat16"
        ) from None


def is_cuda(device: str) -> bool:
    """Whether it is a GPU of torch's CUDA."""
    return torch.device(device).type == "cuda"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
