"""Options made from settings: name, type, range, default and help are those of the settings' fields."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from powersteer.core.config import ConfigT, StrictConfig, build_config, option_of
from powersteer.core.errors import PowersteerError

GUARD = 1000
"""A limit this large only catches slips of the hand, and is not told."""
_SIMPLE = (str, int, float, bool, Path)
_OtherT = TypeVar("_OtherT", bound=StrictConfig)


@dataclass(frozen=True)
class Fields:
    """How a command's options differ from the fields of the settings.

    Args:
        names: Options that are not called like their field, such as ``--steps``.
        arguments: Fields that are given by position.
        optional: Required fields that the command can do without.
        leave_out: Fields that the command sets itself.
    """

    names: Mapping[str, str] = field(default_factory=dict[str, str])
    arguments: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()

    def option(self, name: str) -> str:
        """What a field is called on the command line."""
        return option_of(name, self.names)


@dataclass(frozen=True)
class Given(Generic[ConfigT]):
    """What somebody typed for one class of settings.

    Args:
        kind: The settings.
        values: The typed values by field; what was left out is not in it.
        fields: How the options differ.
        where: What errors begin with.
    """

    kind: type[ConfigT]
    values: dict[str, Any]
    fields: Fields
    where: str

    def __getitem__(self, name: str) -> Any:
        """The typed value of a field, or its default; None where it has none."""
        return self.values[name] if name in self.values else _default(self.kind.model_fields[name])

    def build(self, overrides: Sequence[str] = (), **more: Any) -> ConfigT:
        """Validate the typed values.

        Args:
            overrides: ``key=value`` strings, as in `build_config`.
            **more: Values that the command sets itself.

        Raises:
            PowersteerError: A value is not allowed, or a required one is missing.
        """
        return self._build(self.kind, self.values | more, overrides)

    def build_as(self, kind: type[_OtherT]) -> _OtherT:
        """Validate the typed values of the fields that another class has too; see `build`."""
        return self._build(kind, {name: value for name, value in self.values.items() if name in kind.model_fields})

    def _build(self, kind: type[_OtherT], values: dict[str, Any], overrides: Sequence[str] = ()) -> _OtherT:
        names = {name: option.removeprefix("--") for name, option in self.fields.names.items()}
        return build_config(values, kind, overrides, where=self.where, names=names)


def with_fields(command: Callable[..., None]) -> Callable[..., None]:
    """A command with an option for each field of its settings.

    Args:
        command: A parameter annotated with ``Given[Settings]``, or ``Annotated[Given[Settings], Fields(...)]``, becomes
            one option for each field. The others are typer's.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, tuple[type[StrictConfig], Fields]] = {}
    parameters = [inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    for name, parameter in inspect.signature(command).parameters.items():
        kind, fields = _settings_of(hints[name])
        if kind is not None:
            groups[name] = kind, fields
            parameters += [_parameter(kind, of_kind, fields) for of_kind in _names(kind, fields)]
        elif name != "ctx":
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    def run(ctx: typer.Context, **typed: Any) -> None:
        for name, (kind, fields) in groups.items():
            values = {of_kind: typed.pop(of_kind) for of_kind in _names(kind, fields)}
            said = {of_kind: value for of_kind, value in values.items() if was_typed(ctx, of_kind)}
            typed[name] = Given(kind, said, fields, command.__name__.replace("_", " "))
        command(**({"ctx": ctx} if "ctx" in hints else {}), **typed)

    run.__name__, run.__doc__, run.__module__ = command.__name__, command.__doc__, command.__module__
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    run.__dict__["__signature__"] = inspect.Signature(parameters)
    return run


def was_typed(ctx: typer.Context, name: str) -> bool:
    """Whether somebody gave the parameter: it is no default."""
    source = ctx.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def refuse_idle(ctx: typer.Context, reason: str, *names: str) -> None:
    """Refuse options that were given and would do nothing.

    Args:
        ctx: The command's context.
        reason: Why they would: ``with --manifest``.
        *names: Parameters of the command.

    Raises:
        PowersteerError: One of them was given.
    """
    for name in names:
        if was_typed(ctx, name):
            parameter = next(one for one in ctx.command.params if one.name == name)
            raise PowersteerError(f"{parameter.opts[0]} has no effect {reason}: leave it out")


def described(kind: type[StrictConfig], name: str) -> str:
    """A field's description in plain text, with its range or choices."""
    info = kind.model_fields[name]
    text = " ".join(re.sub(r"``(.+?)``", r"\1", info.description or "").split())
    values, limits = _values_and_limits(info)
    if get_origin(values) is Literal:
        *first, last = map(str, get_args(values))
        text += f" One of {', '.join(first)} or {last}."
    low, high = _limit(limits, "ge", "gt", values, 1), _limit(limits, "le", "lt", values, -1)
    if low is not None and high is not None:
        text += f" {'From' if low[0] else 'Above'} {low[1]}{' to' if low[0] else ', up to'} "
        text += f"{high[1]}." if high[0] else f"below {high[1]}."
    elif low is not None and low != (True, "0"):
        text += f" {'At least' if low[0] else 'Above'} {low[1]}."
    elif high is not None:
        text += f" {'At most' if high[0] else 'Below'} {high[1]}."
    return text


def default_of(kind: type[StrictConfig], name: str) -> str:
    """A field's default as it would be typed; nothing where it is required or off by default."""
    default = _default(kind.model_fields[name])
    return "" if default is None else default if isinstance(default, str) else json.dumps(default)


def _settings_of(hint: Any) -> tuple[type[StrictConfig] | None, Fields]:
    fields = next((one for one in get_args(hint) if isinstance(one, Fields)), Fields())
    given = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return (get_args(given)[0] if get_origin(given) is Given else None), fields


def _names(kind: type[StrictConfig], fields: Fields) -> list[str]:
    return [name for name in kind.model_fields if name not in fields.leave_out]


def _parameter(kind: type[StrictConfig], name: str, fields: Fields) -> inspect.Parameter:
    """A parameter of a command, as typer reads it."""
    info = kind.model_fields[name]
    values, _ = _values_and_limits(info)
    value: Any = str if get_origin(values) is Literal else values
    if value not in _SIMPLE:
        raise TypeError(f"{kind.__name__}.{name}: no option can be made of {info.annotation}")
    default = list(info.default) if isinstance(info.default, tuple) else _default(info)
    if info.is_required() and name not in fields.optional:
        default = ...
    told: dict[str, Any] = {"help": described(kind, name), "show_default": default not in (None, "", [], ...)}
    option = fields.option(name)
    if name in fields.arguments:
        spec: Any = typer.Argument(default, **told)
    else:
        spec = typer.Option(default, f"{option}/--no-{option[2:]}" if value is bool else option, **told)
    annotation = list[value] | None if _is_tuple(info.annotation) else value | None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=spec, annotation=annotation)


def _default(info: FieldInfo) -> Any:
    return None if info.is_required() or info.default_factory is not None else info.default


def _is_tuple(annotation: Any) -> bool:
    if get_origin(annotation) in (Union, UnionType):
        return any(_is_tuple(one) for one in get_args(annotation))
    return get_origin(annotation) is tuple


def _values_and_limits(info: FieldInfo) -> tuple[Any, list[Any]]:
    """The type of one value, such as `int` or a `Literal`, and what limits it."""
    values, limits = info.annotation, list(info.metadata)
    while (origin := get_origin(values)) in (Union, UnionType, tuple, Annotated):
        first, *others = [one for one in get_args(values) if one not in (type(None), ...)]
        if origin is Annotated:
            for one in others:
                limits += one.metadata if isinstance(one, FieldInfo) else [one]
        elif others:
            break  # a choice of types, or a tuple of a given length
        values = first
    return values, limits


def _limit(limits: list[Any], within: str, beyond: str, values: Any, step: int) -> tuple[bool, str] | None:
    """The limit on one side: whether it is allowed itself, and the number. None where there is no limit but a guard.

    Args:
        limits: The field's metadata.
        within: Attribute of a limit that is allowed itself: ``ge`` or ``le``.
        beyond: Attribute of one that is not: ``gt`` or ``lt``.
        values: Type of the values; whole numbers have a last one that is allowed.
        step: From a limit that is not allowed to the next whole number.
    """
    for limit in limits:
        number, last = getattr(limit, within, None), True
        if number is None and (number := getattr(limit, beyond, None)) is not None:
            number, last = (number + step, True) if values is int else (number, False)
        if number is not None:
            return (last, f"{number:g}") if abs(number) < GUARD else None
    return None
