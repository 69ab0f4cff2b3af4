"""Writes docs/options.md from the settings' declarations: `python -m opensloth.cli.document [FILE]`."""

import sys
from pathlib import Path

import annotated_types

from opensloth import paths
from opensloth.cli import grpo
from opensloth.cli.options import COMMON, OWN_PANEL, by_panel, metavar, spellings, value_kinds
from opensloth.config.base import Declared, Settings
from opensloth.config.jobs import DataJob, EvalJob, GrpoJob, SftJob, TrainGrpoJob, TrainSftJob
from opensloth.config.verify import VerifyGrpoJob, VerifySftJob

FILE = Path("docs/options.md")
SHOWN = {"os-grpo DIR": (grpo.SHOWS,)}
COMMANDS: dict[str, type[Settings]] = {
    "os-data INPUT": DataJob,
    "os-sft DIR": SftJob,
    "os-grpo DIR": GrpoJob,
    "os-train sft INPUT": TrainSftJob,
    "os-train grpo INPUT": TrainGrpoJob,
    "os-train verify sft [INPUT]": VerifySftJob,
    "os-train verify grpo [INPUT]": VerifyGrpoJob,
    "os-eval INPUT": EvalJob,
}
HEAD = """# Options

Made from the declarations in `src/opensloth/config/` by `python -m opensloth.cli.document`: change them there.

`_` and `-` are the same in option names, so `--load_in_4bit` works. `--config FILE.yaml` takes the same names, one
`name: value` a line; flags win over the file, and the file over the defaults. A file may hold the settings of `os-data`
beside those of `os-sft` or `os-grpo`; what contradicts prepared data is an error.
"""
SIGNS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


def document() -> str:
    """The whole of docs/options.md."""
    return "\n".join([HEAD, *(section(command, settings) for command, settings in COMMANDS.items())])


def section(command: str, settings: type[Settings]) -> str:
    rows = [
        (heading, option(item), "required" if item.info.is_required() else item.shown_default, meaning(item))
        for heading, items in by_panel(settings).items()
        for item in items
        if not item.extra("hidden")
    ]
    rows += [(OWN_PANEL, f"`{switch.flag}`", "", switch.help) for switch in SHOWN.get(command, ())]
    rows += [
        (OWN_PANEL, "`--config FILE`", "", COMMON["config"]),
        (OWN_PANEL, "`--dry-run`", "off", COMMON["dry_run"]),
        (OWN_PANEL, "`--json`", "off", COMMON["as_json"]),
    ]
    lines = [f"## {command}", "", "| group | option | default | meaning |", "|---|---|---|---|"]
    before = ""
    for heading, *cells in rows:
        lines.append("| " + " | ".join([heading if heading != before else "", *map(escaped, cells)]) + " |")
        before = heading
    return "\n".join([*lines, ""])


def option(item: Declared) -> str:
    """`-n`, `--samples N`; a switch with both of its flags."""
    flags, *short = spellings(item)
    value = "" if bool in value_kinds(item) else f" {metavar(item)}"
    return ", ".join([*(f"`{letter}`" for letter in short), *(f"`{flag}{value}`" for flag in flags.split("/"))])


def meaning(item: Declared) -> str:
    notes = [f"One of {', '.join(item.choices)}."] if item.choices else []
    if limits := bounds(item):
        notes.append(limits[0].upper() + limits[1:] + ".")
    return " ".join([item.help, *notes])


def bounds(item: Declared) -> str:
    """The limits of a number, as `at least 1, below 5`."""
    found = []
    for rule in item.info.metadata:
        if isinstance(rule, annotated_types.Ge | annotated_types.Gt | annotated_types.Le | annotated_types.Lt):
            found += [f"{sign} {getattr(rule, name)}" for name, sign in SIGNS.items() if hasattr(rule, name)]
    return ", ".join(found)


def escaped(text: str) -> str:
    """Text that a Markdown table takes as it is."""
    return text.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    paths.write_text(target, document())
    print(target)
