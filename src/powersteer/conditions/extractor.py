"""Picture → condition: what an extractor is given, what it returns, and where one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from powersteer.core.config import ConfigT, StrictConfig, build_config
from powersteer.core.errors import PowersteerError

Task = str
"""The kind of condition that an extractor makes, by name."""


@dataclass(frozen=True)
class Box:
    """A named rectangle, in pixels of the picture."""

    label: str
    left: float
    top: float
    right: float
    bottom: float

    @property
    def area(self) -> float:
        """Square pixels."""
        return (self.right - self.left) * (self.bottom - self.top)


@dataclass(frozen=True)
class Subject:
    """A picture and whatever its source knows of it, all upright and of one size."""

    picture: Image.Image
    """RGB."""
    drawing: Image.Image | None = None
    """What an artist drew: mode L, ink 255 on 0."""
    labels: npt.NDArray[np.int64] | None = None
    """(H, W): indices of classes in the palette; -1 where there is none."""
    boxes: tuple[Box, ...] | None = None
    features: npt.NDArray[np.float32] | None = None
    """(C, h, w), at the latents' size."""


class Extractor(Protocol):
    """Makes one kind of condition of pictures. Built once a process, called for each picture."""

    def __call__(self, subject: Subject) -> Image.Image | npt.NDArray[np.float32]:
        """The condition: mode L, RGB or RGBA (colour, and structure in alpha), or features (C, h, w).

        Raises:
            PowersteerError: The subject lacks what it needs.
        """
        ...

    def record(self) -> Mapping[str, Any]:
        """What it is: extractor, version, settings; and channels, range, polarity, palette of its conditions."""
        ...


Factory = TypeVar("Factory", bound=Callable[..., Extractor])


@dataclass(frozen=True)
class Registered:
    """An extractor that can be asked for by name."""

    task: Task
    name: str
    needs: str
    """What must be there: packages, weights, or what the source must know; for people to read."""
    build: Callable[..., Extractor]
    """Takes the settings as keywords."""
    rank: int = 1
    """Place among the task's extractors: the lowest comes first."""


@dataclass
class Registry:
    """The extractors of each task, by rank and in order of registration: the first is the task's default."""

    known: dict[tuple[Task, str], Registered] = field(default_factory=dict[tuple[Task, str], Registered])

    def add(self, task: Task, name: str, needs: str = "", *, rank: int = 1) -> Callable[[Factory], Factory]:
        """Register a class, or a function that builds an extractor.

        A `StrictConfig` has its settings as fields: what it does not know, or of the wrong kind, is refused in words.

        Args:
            task: The kind of condition that it makes.
            name: What users call it.
            needs: See `Registered`.
            rank: See `Registered`; 0 makes it the task's default.
        """

        def register(build: Factory) -> Factory:
            kind: Any = build
            checked = isinstance(kind, type) and issubclass(kind, StrictConfig)
            make: Any = partial(from_settings, kind, f"{task} {name}") if checked else kind
            self.known[task, name] = Registered(task, name, needs, make, rank)
            self._sort()
            return build

        return register

    def _sort(self) -> None:
        """Together what is of one task; the tasks by their lowest rank, then by name."""
        lowest: dict[Task, int] = {}
        for one in self.known.values():
            lowest[one.task] = min(one.rank, lowest.get(one.task, one.rank))
        ordered = sorted(self.known.values(), key=lambda one: (lowest[one.task], one.task, one.rank))
        self.known = {(one.task, one.name): one for one in ordered}

    def find(self, task: Task, name: str | None = None) -> Registered:
        """An extractor by name; the task's default without one.

        Raises:
            PowersteerError: There is no such task, or no extractor of this name; the error lists those there are.
        """
        of_task = [registered for registered in self.known.values() if registered.task == task]
        if not of_task:
            tasks = ", ".join(dict.fromkeys(registered.task for registered in self.known.values()))
            raise PowersteerError(f"there is no task '{task}': give one of {tasks}")
        found = next((registered for registered in of_task if name in (None, registered.name)), None)
        if found is None:
            names = ", ".join(registered.name for registered in of_task)
            raise PowersteerError(f"there is no extractor '{name}' for {task}: give one of {names}")
        return found


EXTRACTORS = Registry()
"""Filled by `powersteer.conditions.extractors.catalogue`."""


def from_settings(kind: type[ConfigT], where: str, /, **settings: Any) -> ConfigT:
    """An extractor whose settings are the fields of its class.

    Raises:
        PowersteerError: A setting is unknown, or of the wrong kind.
    """
    return build_config(settings, kind, where=where)


def optional_module(name: str, wanted_by: str, install: str) -> Any:
    """A package that only some need.

    Raises:
        PowersteerError: It is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise PowersteerError(f"{wanted_by} needs {name}: {install}") from None
