"""Picture → condition: what an extractor is given, what it returns, and where one is found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from powersteer.core.config import ConfigT, StrictConfig, build_config
from powersteer.core.errors import PowersteerError

Task = Literal["sketch", "segmentation", "layout", "style", "feature", "depth", "normal", "pose"]


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


@dataclass
class Registry:
    """The extractors of each task, in order of registration: the first is the task's own choice."""

    known: dict[tuple[Task, str], Registered] = field(default_factory=dict[tuple[Task, str], Registered])

    def add(self, task: Task, name: str, needs: str = "") -> Callable[[Factory], Factory]:
        """Register a class, or a function that builds an extractor.

        A `StrictConfig` has its settings as fields: what it does not know, or of the wrong kind, is refused in words.
        """

        def register(build: Factory) -> Factory:
            kind: Any = build
            checked = isinstance(kind, type) and issubclass(kind, StrictConfig)
            make: Any = partial(from_settings, kind, f"{task} {name}") if checked else kind
            self.known[task, name] = Registered(task, name, needs, make)
            return build

        return register

    def find(self, task: Task, name: str | None = None) -> Registered:
        """An extractor by name; a task's first without one.

        Raises:
            PowersteerError: There is none of this name; the names there are are listed.
        """
        of_task = [registered for registered in self.known.values() if registered.task == task]
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
