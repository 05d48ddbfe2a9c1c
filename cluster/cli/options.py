"""Command-line options made of the fields of the configuration, so that neither can drift from the other.

Values are passed on as they were written: what they may be is checked in one place, by the configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from pydantic.fields import FieldInfo

from ...protos.config import EngineConfig
from ...protos.errors import ConfigError

GivenConfig = dict[str, Any]
"""The configuration's keys that the file or the flags give, for `EngineConfig.parse` or `ServeConfig.parse`."""

_METAVARS: dict[object, str] = {int: "INTEGER", float: "NUMBER", str: "TEXT", bool: "BOOLEAN"}
_NULL = "null"

_ConfigFile = Annotated[Path | None, typer.Option(
    "--config", metavar="FILE", help="YAML file with the same keys as the options below, which override it.")]


def takes_config(
    config_class: type[EngineConfig], *, model: Literal["required", "optional", "flag"],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config` and an option per field of `config_class`; it finds the values in its parameter
    `given`. An option of its own with a field's name takes that field's place. `model`: whether the field of this name
    is a positional argument, which a configuration file can stand in for where it is optional.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        own = [_parameter(name, hints[name], parameter.default)
               for name, parameter in inspect.signature(command).parameters.items() if name != "given"]
        taken = {parameter.name for parameter in own}
        fields = {name: field for name, field in config_class.model_fields.items() if name not in taken}

        def run(config_file: Path | None, **values: Any) -> None:
            given = {name: value for name in fields if (value := values.pop(name)) is not None}
            flags = {name: _plain(value, fields[name]) for name, value in given.items()}
            command(given={**_read(config_file), **flags}, **values)

        options = [_option(name, field) for name, field in fields.items() if name != "model" or model == "flag"]
        argument = [] if model == "flag" else [_model_argument(fields["model"], required=model == "required")]
        parameters = [*argument, *own, _parameter("config_file", _ConfigFile, None), *options]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, annotation: object, default: object) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _model_argument(field: FieldInfo, *, required: bool) -> inspect.Parameter:
    argument = typer.Argument(metavar="MODEL", help=field.description, show_default=False)
    if required:
        return _parameter("model", Annotated[str, argument], inspect.Parameter.empty)
    return _parameter("model", Annotated[str | None, argument], None)


def _option(name: str, field: FieldInfo) -> inspect.Parameter:
    """No default of its own: what is not given is left to the file, then to the configuration."""
    scalar, flag = _scalar(name, field), f"--{name.replace('_', '-')}"
    choices = get_args(scalar)  # empty unless it is a Literal
    is_bool = scalar is bool
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if is_bool else flag,
        help=f"{field.description}{_default_text(field)}",
        metavar=None if is_bool else f"[{'|'.join(choices)}]" if choices else _METAVARS[scalar],
        show_default=False,
        autocompletion=(lambda: list(choices)) if choices else None)
    return _parameter(name, Annotated[(bool if is_bool else str) | None, option], None)


def _scalar(name: str, field: FieldInfo) -> object:
    """The field's type without None and constraints: int, float, str, bool or a Literal of strings."""
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        [annotation] = [part for part in get_args(annotation) if part is not NoneType]
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if annotation not in _METAVARS and get_origin(annotation) is not Literal:
        raise TypeError(f"no command-line option can be made of the field {name}: {field.annotation}")
    return annotation


def _default_text(field: FieldInfo) -> str:
    """Where the default is None, the field's description says what that means."""
    if field.is_required() or field.default is None:
        return ""
    return f"  [default: {str(field.default).lower() if isinstance(field.default, bool) else field.default}]"


def _plain(value: object, field: FieldInfo) -> object:
    """What a flag says, with `null` for None where there is a None, as in YAML."""
    return None if value == _NULL and NoneType in get_args(field.annotation) else value


def _read(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"the configuration file {path} is not valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"the configuration file {path} must be a mapping such as 'block_size: 16'")
    return values
