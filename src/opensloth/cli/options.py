"""Typer commands made from the settings of a job, so that each option is said once, in `opensloth.config`.

Values come in as the text that was typed and are checked with the whole job by `config.base.resolve`: bounds, choices
and contradictions give the same message whether they come from a flag or from a file. An option that was not given is
None here; its default is the declaration's.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Generic, TypeVar, get_args

import typer

from opensloth.cli.program import reader_may_leave
from opensloth.config.base import Declared, Resolved, Settings, declared, resolve
from opensloth.errors import DONE

PANELS = {
    "ModelOptions": "Model",
    "DataOptions": "Data",
    "PromptOptions": "Data",
    "TrainOptions": "Training",
    "SftOptions": "Training",
    "GrpoOptions": "GRPO",
    "LaunchOptions": "Launch",
}
ADAPTER_PANEL = "Adapter and weights"
ADAPTER_PREFIXES = ("lora_", "load_in_", "use_rslora", "full_finetuning", "dtype")
OWN_PANEL = "This command"
PANEL_ORDER = (OWN_PANEL, "Model", "Data", "GRPO", "Training", ADAPTER_PANEL, "Launch")
COMMON = {
    "config": "A YAML file of settings, one `name: value` a line; flags win over it.",
    "dry_run": "Print the resolved job and what it needs, and touch nothing.",
    "as_json": "Print one line of JSON with the paths and figures instead.",
}
# `--load_in_4bit` is `--load-in-4bit`; values and file names keep their `_`.
CONTEXT = {"token_normalize_func": lambda name: name.replace("_", "-"), "help_option_names": ["--help", "-h"]}

Job = TypeVar("Job", bound=Settings)


@dataclass(frozen=True)
class Request(Generic[Job]):
    """What was asked for: the checked job with its origins, and how to answer."""

    resolved: Resolved[Job]
    dry_run: bool
    as_json: bool
    config: Path | None

    @property
    def job(self) -> Job:
        return self.resolved.job


@dataclass(frozen=True)
class Shows:
    """A switch that prints something and ends the command, whatever else was given or left out."""

    flag: str
    help: str
    show: Callable[[], None]


def new_app(help: str, **settings: Any) -> typer.Typer:
    """A Typer program with this project's ways: `_` is `-` in names, plain tracebacks (locals may hold secrets)."""
    return typer.Typer(help=help, context_settings=CONTEXT, pretty_exceptions_enable=False, **settings)


def add_command(
    app: typer.Typer,
    name: str,
    settings: type[Job],
    run: Callable[[Request[Job]], None],
    *,
    help: str,
    beside: type[Settings] | None = None,
    shows: Shows | None = None,
) -> None:
    """Give `app` the command `name`, with an option for each setting and an argument for the hidden one.

    Args:
        beside: another job whose settings a config file may hold too, so that one file serves two commands.
        shows: a switch of this command alone.
    """
    allowed = frozenset(beside.model_fields) if beside else frozenset()

    def command(config: Path | None, dry_run: bool, as_json: bool, **flags: Any) -> None:
        given = {key: value for key, value in flags.items() if value not in (None, [], ())}
        with reader_may_leave():
            run(Request(resolve(settings, given, config, allowed), dry_run, as_json, config))

    signature = inspect.Signature(
        [
            *(parameter(item, heading) for heading, items in by_panel(settings).items() for item in items),
            *([switch(shows)] if shows else []),
            common("config", Path | None, None, "--config", metavar="FILE"),
            common("dry_run", bool, False, "--dry-run"),
            common("as_json", bool, False, "--json"),
        ]
    )
    # Typer reads the signature alone; the annotations of **flags would be taken for a parameter's.
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {}
    app.command(name, help=help, context_settings=CONTEXT)(command)


def elsewhere(here: type[Settings], there: type[Settings], hint: str) -> dict[str, str]:
    """The options that only the job `there` has, each with a hint for those who gave it to `here`."""
    return {item.flag: hint for item in declared(there) if item.name not in here.model_fields}


def common(name: str, kind: Any, default: Any, flag: str, **extra: Any) -> inspect.Parameter:
    info = typer.Option(flag, help=COMMON[name], rich_help_panel=OWN_PANEL, show_default=False, **extra)
    return keyword(name, kind, info, default)


def switch(shows: Shows) -> inspect.Parameter:
    def show(asked: bool) -> None:
        if asked:
            with reader_may_leave():
                shows.show()
            raise typer.Exit(DONE)

    info = typer.Option(
        shows.flag, help=shows.help, rich_help_panel=OWN_PANEL, show_default=False, is_eager=True, callback=show
    )
    return keyword(shows.flag.strip("-").replace("-", "_"), bool | None, info, None)


def keyword(name: str, kind: Any, info: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def by_panel(settings: type[Settings]) -> dict[str, list[Declared]]:
    """The settings under their headings, in the order in which `--help` and the docs show them."""
    found: dict[str, list[Declared]] = {heading: [] for heading in PANEL_ORDER}
    for item in declared(settings):
        found[panel(settings, item.name)].append(item)
    return {heading: items for heading, items in found.items() if items}


def panel(settings: type[Settings], name: str) -> str:
    """The heading of a setting: that of the group that declares it first, whoever gives it another default."""
    if name.startswith(ADAPTER_PREFIXES):
        return ADAPTER_PANEL
    owner = next(group for group in reversed(settings.__mro__) if name in vars(group).get("__annotations__", {}))
    return PANELS.get(owner.__name__, OWN_PANEL)


def parameter(item: Declared, heading: str) -> inspect.Parameter:
    """One setting as Typer sees it: a switch, a path, a word (checked later), or a list of words."""
    kinds = value_kinds(item)
    if item.extra("hidden"):
        # Not required here: a config file may hold it, and the check of the whole job says what is missing.
        text = typer.Argument(help=item.help, metavar=metavar(item), show_default=False)
        return keyword(item.name, str | None, text, None)
    kind: Any = str | None
    extra: dict[str, Any] = {"metavar": metavar(item)}
    if bool in kinds:
        kind, extra = bool | None, {}
    elif tuple in kinds:
        kind = list[str] | None
    elif Path in kinds:
        kind = Path | None
    if item.choices:
        extra["autocompletion"] = lambda incomplete: [word for word in item.choices if word.startswith(incomplete)]
    info = typer.Option(*spellings(item), help=described(item), rich_help_panel=heading, show_default=False, **extra)
    return keyword(item.name, kind, info, None)


def value_kinds(item: Declared) -> set[Any]:
    """The types that a setting may have: {int, str} for `int | str`, {tuple} for `tuple[str, ...]`."""
    annotation = item.info.annotation
    members = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return {getattr(member, "__origin__", member) for member in members} - {type(None)}


def spellings(item: Declared) -> list[str]:
    """How a setting is typed: its flag, with the flag that turns a switch off, and its letter."""
    flag = item.flag
    if bool in value_kinds(item) and item.extra("off") != "-":
        flag += f"/--{item.extra('off') or f'no-{flag[2:]}'}"
    short = item.extra("short")
    return [flag, f"-{short}"] if short else [flag]


def metavar(item: Declared) -> str:
    """What stands for the value in help."""
    if item.extra("hidden"):
        return item.spelled
    if item.choices:
        return "WORD"
    kinds = value_kinds(item)
    if Path in kinds:
        return "PATH"
    if tuple in kinds:
        return {"map": "ROLE=COL", "stop": "TEXT", "model": "TEXT"}.get(item.name, "A,B,...")
    if int in kinds:
        return "N|auto" if str in kinds else "N"
    return "X" if float in kinds else "TEXT"


def described(item: Declared) -> str:
    """The help of a setting with its choices and its default, or that it has none."""
    choices = f" One of {', '.join(item.choices)}." if item.choices else ""
    if item.info.is_required():
        return f"{item.help}{choices} (required)"
    return f"{item.help}{choices} (default: {item.shown_default})" if item.shown_default else f"{item.help}{choices}"
