"""How a base is named in settings; torch is not needed to know it."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

EMBEDDED_BASE = "powersteer-tiny"
"""The base that ships in the package."""

Base = Annotated[
    str,
    Field(
        description="Frozen base: ``powersteer-tiny``, a folder in diffusers' layout, a model of the Hub, or one "
        ".safetensors file (Stable Diffusion 1.x, 2.x, XL)."
    ),
]
# Left out of what is written where they are not given, so that what earlier versions wrote stays as it is.
Variant = Annotated[
    str | None,
    Field(
        description="Weights of the base to take before the plain ones, where it has some: ``fp16``.",
        exclude_if=lambda value: value is None,
    ),
]
Revision = Annotated[
    str | None,
    Field(
        description="Branch, tag or commit of a base on the Hub. The newest by default.",
        exclude_if=lambda value: value is None,
    ),
]
BaseConfig = Annotated[
    str | None,
    Field(
        description="For a base in one file: the folder, or model of the Hub, with its configuration, tokenizer and "
        "scheduler. By default the Hub's model of its family.",
        exclude_if=lambda value: value is None,
    ),
]


def base_options(settings: Any) -> dict[str, Any]:
    """What settings with these three fields give `powersteer.backbones.load.load_base` beside the name."""
    return {"variant": settings.variant, "revision": settings.revision, "base_config": settings.base_config}
