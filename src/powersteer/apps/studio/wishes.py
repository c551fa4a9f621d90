"""What the page asks for. All that comes from a browser may be anything, so it is checked here before it is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError

from powersteer.core.config import StrictConfig
from powersteer.core.errors import PowersteerError
from powersteer.denoising.settings import GUIDANCE_SCALE, Scheduler, Share

CONDITIONS = 3
"""How many canvases the page has."""
MAX_IMAGES, MAX_STEPS = 8, 100
"""The most pictures, and the most denoising steps, that one wish may ask for."""
MAX_SEED = 2**32 - 1
LIVE_STEPS, LIVE_SCHEDULER = 6, "unipc"
"""The denoising steps and the scheduler of pictures made while someone draws."""
_MAX_WORDS = 4000
"""The most characters of a text."""

_Text = Annotated[str, Field(max_length=_MAX_WORDS)]


@dataclass(frozen=True)
class Wanted:
    """What one condition is to do."""

    adapter: _Text
    drawing: str | None
    """A PNG as a data URL."""
    scale: Annotated[float, Field(ge=0, le=2)] = 1.0
    start: Share = 0.0
    end: Share = 1.0


@dataclass(frozen=True)
class Wish:
    """What a person asked for; see `checked`."""

    prompt: _Text
    conditions: Annotated[Sequence[Wanted], Field(max_length=CONDITIONS)]
    negative_prompt: _Text = ""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    num_images: Annotated[int, Field(ge=1)] = 1
    num_inference_steps: Annotated[int, Field(ge=1)] = LIVE_STEPS
    guidance_scale: Annotated[float, Field(ge=1, le=100)] = GUIDANCE_SCALE
    scheduler: Scheduler | None = LIVE_SCHEDULER
    compare: bool = False
    """Whether the prior's pictures, from the same noise, are made too."""


class Extraction(StrictConfig):
    """A picture that is to become a condition."""

    adapter: _Text
    extractor: _Text


class Seed(StrictConfig):
    """The seed of a picture."""

    seed: int = Field(ge=0, le=MAX_SEED)


class TrainingWish(StrictConfig):
    """A training that is to begin."""

    name: str = Field(max_length=100)
    max_train_steps: int = Field(ge=10, le=3000)
    default_prompt: _Text = ""


_WISH = TypeAdapter(Wish)


def checked(wish: Wish) -> Wish:
    """A wish whose every value is of its kind and in its range.

    Raises:
        PowersteerError: One is not; it is named.
    """
    try:
        wish = _WISH.validate_python(asdict(wish))
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        raise PowersteerError(f"'{'.'.join(map(str, fault['loc']))}': {fault['msg']}") from None
    if wish.num_images > MAX_IMAGES or wish.num_inference_steps > MAX_STEPS:
        raise PowersteerError(f"that is too much at once: at most {MAX_IMAGES} pictures of {MAX_STEPS} steps")
    return wish
