"""Configuration files: strict YAML into frozen pydantic models, with `key=value` overrides."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from powersteer.core.errors import PowersteerError
from powersteer.core.files import write_whole
from powersteer.core.text import parse_yaml, read_text


class StrictConfig(BaseModel):
    """A frozen configuration section that refuses keys it does not know, and numbers that are not finite.

    A string below a field is its description.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


ConfigT = TypeVar("ConfigT", bound=StrictConfig)


def load_config(path: Path, kind: type[ConfigT], overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML file into ``kind``.

    Args:
        path: The YAML file.
        kind: The configuration class.
        overrides: ``key=value`` strings; a dot reaches into sections (``unet.learning_rate=1e-4``), and the
            value is read as YAML.

    Returns:
        The validated configuration.

    Raises:
        PowersteerError: The file is missing or not a YAML mapping, an override is malformed, a key is unknown
            (the nearest valid name is suggested) or a value is of the wrong kind.
    """
    values = parse_yaml(read_text(path), str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise PowersteerError(f"{path} must hold `key: value` pairs, not a {type(values).__name__}")
    return build_config(values, kind, overrides, where=str(path))


def build_config(
    values: dict[str, Any],
    kind: type[ConfigT],
    overrides: Sequence[str] = (),
    *,
    where: str = "configuration",
    names: Mapping[str, str] | None = None,
) -> ConfigT:
    """Validate ``values`` with ``overrides`` applied; see `load_config`.

    Args:
        values: The values by field.
        kind: The configuration class.
        overrides: ``key=value`` strings.
        where: What the values come from; errors begin with it.
        names: What errors call a field that the user knows by another name.

    Raises:
        PowersteerError: See `load_config`.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise PowersteerError(f"override '{override}' is not of the form key=value")
        section = values
        *parents, leaf = key.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise PowersteerError(f"override '{override}': '{parent}' is not a section")
        section[leaf] = _parse_scalar(text)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise PowersteerError(f"{where}: {_first_fault(error, kind, names or {})}") from None
    except (OverflowError, TypeError) as error:  # of a validator that was given what no number's type holds
        raise PowersteerError(f"{where}: {_one_line(error)}") from None


def save_config(config: StrictConfig, path: Path) -> None:
    """Write the resolved configuration as YAML.

    Raises:
        PowersteerError: It cannot be written.
    """
    write_whole(path, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).encode())


def _parse_scalar(text: str) -> Any:
    value = parse_yaml(text, f"'{text}'")
    # YAML 1.1 reads 1e-4 as a string; people mean the number.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _first_fault(error: ValidationError, kind: type[BaseModel], names: Mapping[str, str]) -> str:
    # A misspelt key explains a missing one.
    fault = min(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    where = ".".join(names.get(str(part), str(part)) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(str(fault["loc"][-1]), _known_keys(kind, fault["loc"][:-1]), n=1)
        hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
        return f"unknown key '{where}'{hint}"
    said = fault["msg"].removeprefix("Value error, ")
    return f"'{where}': {said}" if where else said


def _known_keys(kind: type[BaseModel], location: Iterable[int | str]) -> list[str]:
    """The field names of the section at ``location``."""
    for part in location:
        field = kind.model_fields.get(str(part))
        if field is None:
            continue
        for candidate in (field.annotation, *get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                kind = candidate
    return list(kind.model_fields)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def option_of(field: str, names: Mapping[str, str]) -> str:
    """What a field is called on the command line.

    Args:
        field: Its name.
        names: Options that are not called like their field, such as ``--steps``.
    """
    return names.get(field, "--" + field.replace("_", "-"))
