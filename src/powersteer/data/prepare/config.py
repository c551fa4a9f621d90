"""What `powersteer prepare` can be asked: settings, their ranges and defaults, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from PIL import ImageColor
from pydantic import Field, field_validator, model_validator

from powersteer.core.config import StrictConfig

Captions = Literal["first", "all", "random"]


class PrepareConfig(StrictConfig):
    """What is made of what."""

    task: str
    """Kind of condition to make, such as sketch or segmentation. --list prints them all."""
    source: str
    """Source: a folder of pictures, a COCO 2017 or ADE20K root, or openmoji."""
    out_dir: Path
    """New folder for the pairs."""
    extractor: str | None = None
    """Extractor that makes the conditions. Chosen by task and source by default; --list prints them all."""
    settings: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Settings of the extractor."""
    captions: Captions = "all"
    """Captions to keep of a picture with several."""
    resolution: int | None = Field(default=None, ge=8, le=8192)
    """Pixels of the shorter side. By default pictures keep their size, and files are copied where possible."""
    background: str = "white"
    """Colour to put behind transparent parts."""
    shards: bool = False
    """Write WebDataset shards instead of an ImageFolder."""
    num_shards: int = Field(default=1, ge=1, le=99_999)
    """Number of parts to split the work into, one per machine."""
    shard_index: int = Field(default=0, ge=0)
    """Part to do on this machine."""
    workers: int | None = Field(default=None, ge=1, le=1024)
    """Number of processes. One per core by default."""

    @field_validator("background")
    @classmethod
    def _colour(cls, background: str) -> str:
        ImageColor.getrgb(background)
        return background

    @model_validator(mode="after")
    def _part(self) -> PrepareConfig:
        if "shard_index" in self.model_fields_set and "num_shards" not in self.model_fields_set:
            raise ValueError("shard_index is the part of how many? Give num_shards too")
        if self.shard_index >= self.num_shards:
            raise ValueError(f"shard_index must be below num_shards, {self.num_shards}, not {self.shard_index}")
        return self
