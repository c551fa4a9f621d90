"""What a data set says of its conditions: ``dataset.json`` beside the pairs, or one folder above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from powersteer.conditions.kind import KINDS
from powersteer.core.errors import PowersteerError
from powersteer.core.files import reason_of
from powersteer.core.text import parse_json

DATASET_FILE = "dataset.json"


class _Said(BaseModel):
    """What must be so of ``conditioning``; the rest is kept as it is."""

    model_config = ConfigDict(extra="allow")
    kind: str | None = None
    channels: int | None = Field(default=None, gt=0, le=65536)
    range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Conditioning:
    """The conditions of a data set."""

    kind: str
    channels: int
    record: Mapping[str, Any]
    """For the adapter's config: all that is known of them."""
    stated: bool
    """By the data or the user; else by default."""


def conditioning_of(source: str | None, channels: int | None = None, kind: str | None = None) -> Conditioning:
    """The conditions of a data set: what its ``dataset.json`` says, else what is given, else grey sketches.

    Args:
        source: A folder of pairs, or of shards, or a pattern of shards; here or at a URL. None for the Hub.
        channels: Given by the user; must agree with what the data says.
        kind: The same.

    Raises:
        PowersteerError: ``dataset.json`` is malformed, or contradicts what is given, or there are no such conditions.
    """
    where, said = _find(source) if source is not None else ("", {})
    for key, given in (("kind", kind), ("channels", channels)):
        if given is not None and said.get(key) not in (None, given):
            raise PowersteerError(
                f"conditioning_{key} is {given}, but {where} says {said[key]}: leave the key out, or mend that file"
            )
    stated = bool(said) or kind is not None
    found = KINDS.find(str(kind or said.get("kind") or "sketch"))
    channels = found.check_channels(channels or said.get("channels"))
    record = found.record() | said | {"kind": found.name, "channels": channels}
    return Conditioning(found.name, channels, record, stated)


def _find(source: str) -> tuple[str, dict[str, Any]]:
    """The file's name, and what it says under ``conditioning``; nothing where there is none."""
    try:
        filesystem, path = fsspec.core.url_to_fs(source)
        folder = path.rstrip("/").rpartition("/")[0] if path.endswith(".tar") else path.rstrip("/")
        for place in (folder, folder.rpartition("/")[0]):
            name = f"{place}/{DATASET_FILE}"
            if filesystem.exists(name):
                said = _parse(name, filesystem.cat_file(name))
                if said is not None:
                    return name, said
    except PowersteerError:
        raise
    except Exception as error:  # fsspec's file systems raise what their clients do
        raise PowersteerError(f"cannot look for {DATASET_FILE} beside {source}: {reason_of(error)}") from None
    return "", {}


def _parse(where: str, content: bytes) -> dict[str, Any] | None:
    """What one says under ``conditioning``; None of one that is another program's."""
    try:
        description = parse_json(content, where)
    except PowersteerError as error:
        raise PowersteerError(f"{error}: mend it, or remove it") from None
    if not isinstance(description, dict) or "conditioning" not in description:
        return None
    try:
        _Said.model_validate(description["conditioning"])
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in ("conditioning", *fault["loc"]))
        raise PowersteerError(f"{where}: '{key}': {fault['msg']}") from None
    return description["conditioning"]
