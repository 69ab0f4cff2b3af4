"""How settings are declared, and how defaults, a config file and flags become one checked job with known origins."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from opensloth.errors import UserError, nearest


class Settings(BaseModel):
    """A group of settings. Unknown names are errors; a job never changes once it is resolved."""

    # built when first used: --help reads the declarations alone, of which os-train has several hundred
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, defer_build=True)

    @field_validator("*", mode="before")
    @classmethod
    def known_choice(cls, value: Any, field: ValidationInfo) -> Any:
        """A setting with `choices` takes those words alone, spelled with `-` or `_`."""
        choices = Declared(str(field.field_name), cls.model_fields[str(field.field_name)]).choices
        if not choices:
            return value
        if isinstance(value, bool):  # YAML reads a bare `on` or `off` as a boolean
            value = "on" if value else "off"
        spelled = str(value).replace("-", "_")
        if spelled not in choices:
            raise ValueError(f"must be one of {', '.join(choices)}")
        return spelled


def option(
    default: Any,
    help: str,
    *,
    short: str = "",
    off: str = "",
    shown: str = "",
    choices: tuple[str, ...] = (),
    hidden: bool = False,
    **bounds: Any,
) -> Any:
    """Declare one setting.

    Args:
        help: one sentence, for `--help`, the docs table and config files alike.
        short: a one-letter flag, such as `-g`.
        off: for a switch, the flag that turns it off (default `--no-NAME`); "-" for a switch that has none.
        shown: the default as people read it, where the value itself says little.
        choices: the allowed words, in the order in which help lists them.
        hidden: not a command-line option.
        bounds: pydantic's `ge`, `gt`, `le`, `lt`.
    """
    extra: dict[str, Any] = {"short": short, "off": off, "shown": shown, "choices": list(choices), "hidden": hidden}
    return Field(default, description=help, json_schema_extra=extra, **bounds)


@dataclass(frozen=True)
class Declared:
    """One declared setting, as the command line, the docs and the checks see it."""

    name: str
    info: FieldInfo

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def spelled(self) -> str:
        """What a person types: the flag, or the place of an argument (INPUT, DIR)."""
        if not self.extra("hidden"):
            return self.flag
        return "DIR" if self.info.annotation is Path else self.name.upper()

    @property
    def help(self) -> str:
        return self.info.description or ""

    def extra(self, key: str) -> Any:
        extra = self.info.json_schema_extra
        return extra.get(key) if isinstance(extra, dict) else None

    @property
    def choices(self) -> tuple[str, ...]:
        return tuple(self.extra("choices") or ())

    @property
    def shown_default(self) -> str:
        if shown := self.extra("shown"):
            return str(shown)
        default = self.info.get_default(call_default_factory=True)
        if default is None or default == ():
            return ""
        if isinstance(default, bool):
            return "on" if default else "off"
        return ",".join(default) if isinstance(default, tuple) else str(default)


def declared(settings: type[BaseModel]) -> list[Declared]:
    """The settings of a class, in order of declaration."""
    return [Declared(name, info) for name, info in settings.model_fields.items()]


Job = TypeVar("Job", bound=Settings)


@dataclass(frozen=True)
class Resolved(Generic[Job]):
    """A checked job and, for each setting, where its value came from: `default`, `data`, `config FILE` or `flag`."""

    job: Job
    origins: dict[str, str]

    def record(self) -> dict[str, Any]:
        """What `job.json` holds: each setting with its value and origin."""
        values = self.job.model_dump(mode="json")
        return {name: {"value": value, "origin": self.origins[name]} for name, value in values.items()}


def resolve(
    settings: type[Job], flags: Mapping[str, Any], config: Path | None = None, beside: Container[str] = ()
) -> Resolved[Job]:
    """Merge defaults < config file < flags and check the result.

    Args:
        flags: values given on the command line; None means "not given".
        config: a YAML file of setting names and values; `_` and `-` are the same in names.
        beside: names that the file may hold for another command; they are passed over.
    Raises:
        UserError: an unknown name (with the nearest one), or a value that does not fit, with the setting named.
    """
    values: dict[str, Any] = {}
    origins = dict.fromkeys(settings.model_fields, "default")
    if config is not None:
        for name, value in read_config(config).items():
            if name not in settings.model_fields:
                if name in beside:
                    continue
                hint = nearest(name, settings.model_fields) or "docs/options.md lists every setting."
                raise UserError(f"{config}: unknown setting {name!r}.", hint)
            values[name], origins[name] = value, f"config {config}"
    for name, value in flags.items():
        if value is not None:
            values[name], origins[name] = value, "flag"
    for item in declared(settings):
        if item.info.is_required() and item.name not in values:
            raise UserError(f"{item.spelled} is missing.", f"{item.spelled}: {item.help}")
    try:
        return Resolved(settings.model_validate(values), origins)
    except ValidationError as error:
        raise explain(error, settings, values, origins) from None


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML mapping of settings. Raises UserError where the file is missing or is no mapping."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"Cannot read --config {path}: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path} holds a {type(content).__name__}.", "Write one `name: value` a line.")
    return {str(name).replace("-", "_"): value for name, value in content.items()}


def explain(
    error: ValidationError, settings: type[Settings], values: Mapping[str, Any], origins: Mapping[str, str]
) -> UserError:
    """The first fault of a job as one line that names the flag or file it came from."""
    first = error.errors(include_url=False)[0]
    message = str(first["msg"]).removeprefix("Value error, ")
    if not first["loc"]:
        return UserError(message)
    name = str(first["loc"][0])
    origin = origins.get(name, "default")
    spelled = Declared(name, settings.model_fields[name]).spelled
    where = f"{origin.removeprefix('config ')}: {name}" if origin.startswith("config") else spelled
    value = values.get(name)
    shown = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
    return UserError(f"{where} {shown}: {message[0].lower()}{message[1:]}.")
