"""Long work, watched and ended from outside."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from PIL import Image

from powersteer.backbones.protocol import base_of
from powersteer.core.pictures import to_pil

Done = TypeVar("Done")


class Stopped(Exception):
    """Asked for by the person."""


@dataclass(frozen=True)
class Progress:
    """How far a wish under way has come."""

    share: float
    preview: Image.Image | None = None
    """The first picture, as it is now."""


class Watch:
    """A pipeline's ``callback_on_step_end``: reports each step, with a preview where that costs little.

    Args:
        report: Where to; may raise to end the run.
        begun: The share of the whole work that was done before this run.
        share: This run's.
        previewed: Whether its first picture is shown.
    """

    PAUSE = 0.5
    """Seconds after a preview without another: browser and denoising may share the processor,"""
    COSTS_LITTLE = 4.0
    """and at least so many times as long as it took to make."""

    def __init__(self, report: Callable[[Progress], None], begun: float, share: float, *, previewed: bool) -> None:
        self.report, self.begun, self.share, self.previewed = report, begun, share, previewed
        self.not_before = 0.0

    def __call__(self, pipe: Any, step: int, _: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """Called by the pipeline after each denoising step."""
        preview, now = None, time.perf_counter()
        if self.previewed and now >= self.not_before:
            # What the scheduler takes for the picture, where it keeps that; else the noisy one.
            guesses: list[Any] = getattr(pipe.scheduler, "model_outputs", None) or [None]
            latents: torch.Tensor = tensors["latents"] if guesses[-1] is None else guesses[-1]
            with torch.no_grad():
                preview = to_pil(base_of(pipe).pictures(latents[:1])[0])
            took = time.perf_counter() - now
            self.not_before = now + took + max(self.PAUSE, self.COSTS_LITTLE * took)
        done = min(1.0, (step + 1) / max(1, pipe.num_timesteps))
        self.report(Progress(self.begun + self.share * done, preview))
        return tensors


def reported(work: Callable[[Callable[[Progress], None]], Done], stop: threading.Event) -> Iterator[Progress | Done]:
    """Run ``work`` in a thread and pass on what it reports; whoever leaves early, or sets ``stop``, ends it."""
    said: queue.SimpleQueue[Progress | Done | BaseException] = queue.SimpleQueue()

    def report(progress: Progress) -> None:
        if stop.is_set():
            raise Stopped
        said.put(progress)

    def run() -> None:
        try:
            said.put(work(report))
        except BaseException as error:
            said.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            one = said.get()
            with suppress(queue.Empty):
                while isinstance(one, Progress):
                    newer = said.get_nowait()
                    if isinstance(newer, Progress):  # of what waits, the newest is enough, and the newest preview
                        one = replace(newer, preview=newer.preview or one.preview)
                    else:
                        yield one
                        one = newer
            if isinstance(one, BaseException):
                raise one
            yield one
            if not isinstance(one, Progress):
                return
    finally:
        stop.set()
        thread.join()
