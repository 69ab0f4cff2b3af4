"""`os-data`: source rows to a directory of prepared data, a look into one, and a new number of shards."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from opensloth import log
from opensloth.cli.options import Request, add_command, elsewhere, new_app
from opensloth.cli.program import leave, reader_may_leave, run
from opensloth.config.jobs import DataJob, GrpoJob, SftJob
from opensloth.errors import UserError, nearest

if TYPE_CHECKING:
    from opensloth.data.prepared.prepare import Prepared

DEFAULT = "prepare"
TYPER_OWN = ("--help", "-h", "--install-completion", "--show-completion")


class Training(SftJob, GrpoJob):
    """What is for training, by either method: a config file may hold it beside the settings of data."""


class DefaultGroup(TyperGroup):
    """`os-data INPUT` is `os-data prepare INPUT`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in TYPER_OWN:
            if not ctx.resilient_parsing:
                refuse_mistyped(args[0], list(self.commands))
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The commands, and under them what `os-data INPUT` takes, which is what most people look for."""
        super().format_help(ctx, formatter)
        prepare = self.commands[DEFAULT]
        prepare.format_help(type(ctx)(prepare, info_name=DEFAULT, parent=ctx), formatter)


def refuse_mistyped(word: str, commands: Sequence[str]) -> None:
    """Say so where a word is no file and nearly a command; a hub data set's own name is `owner/name`."""
    if word.startswith("-") or set(word) & set("/.:\\") or Path(word).exists():
        return
    if hint := nearest(word, commands):
        raise UserError(f"There is no command and no file {word!r}.", hint)


app = new_app("Prepare data for training: os-data INPUT --model MODEL.", cls=DefaultGroup)


def prepare(request: Request[DataJob]) -> None:
    origin = request.resolved.origins["max_prompt_len"]
    if request.job.method == "sft" and origin != "default":
        where = "--max-prompt-len" if origin == "flag" else f"{origin.removeprefix('config ')}: max_prompt_len"
        raise UserError(f"{where} is for --method grpo.", "Data for SFT has --max-seq-length.")
    if request.dry_run:
        from opensloth.cli.dry_run import plan_data

        plan_data(request)
        return
    from opensloth.data.models.resolve import is_made
    from opensloth.data.prepared.build import hide_torch
    from opensloth.data.prepared.prepare import prepare

    here = request.job.input.startswith("sample:") or Path(request.job.input).expanduser().exists()
    needs_torch = not here  # to hash what it was asked for, `datasets` imports torch where sys.modules has the name
    needs_torch |= request.job.trust_remote_code or not is_made(request.job.model)
    if not needs_torch:
        hide_torch()
    report(prepare(request.job), request.as_json)


add_command(app, DEFAULT, DataJob, prepare, help="Prepare data: the same as os-data INPUT.", beside=Training)


@app.command()
def show(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory that os-data left.")],
    row: Annotated[int | None, typer.Option("--row", help="One row, by its row_id.", metavar="ID")] = None,
    number: Annotated[int, typer.Option("-n", "--number", help="How many rows.", metavar="N", min=0)] = 3,
    html: Annotated[Path | None, typer.Option(help="Write one offline HTML page.", metavar="FILE")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a hub model.")
    ] = False,
) -> None:
    """Show prepared rows with their trained and masked tokens, lengths, packs and drops."""
    from opensloth.data.show.terminal import show

    with reader_may_leave():
        show(directory, row=row, n=number, html=html, trust_remote_code=trust_remote_code)


@app.command()
def reshard(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory that os-data left.")],
    gpus: Annotated[int, typer.Option("--gpus", "-g", help="The new number of shards.", metavar="N", min=1)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")] = False,
) -> None:
    """Divide prepared data anew, without tokenizing."""
    from opensloth.data.prepared.prepare import reshard

    report(reshard(directory, gpus), as_json)


def figures(prepared: "Prepared") -> dict[str, Any]:
    """What `--json` prints about prepared data."""
    manifest = prepared.manifest
    kept = ["rows_in", "rows_kept", "dropped", "truncated", "duplicates", "tokens", "trained_tokens"]
    kept += ["shards", "packs_per_shard"]
    record = {"data": str(prepared.directory), "method": manifest.method, "model": manifest.model}
    return record | {name: getattr(manifest, name) for name in kept} | {"digest": manifest.digest}


def report(prepared: "Prepared", as_json: bool) -> None:
    """Print what a directory of prepared data holds, and the next command to type."""
    if as_json:
        print(json.dumps(figures(prepared), ensure_ascii=False))
        return
    from opensloth.data.prepared.summary import summarize

    directory, manifest = prepared.directory, prepared.manifest
    lines = summarize(prepared).lines()
    if manifest.dropped:
        lines.append(("dropped rows", f"listed in {directory / 'dropped.jsonl'}"))
    lines.append(("prepared data", str(directory)))
    lines.append(("next", f"os-{manifest.method} {shlex.quote(str(directory))}"))
    for name, text in lines:
        print(log.printable(f"{name:<16}{text}"))


def main() -> None:
    hint = "That is a setting of training: give it to os-sft or os-grpo, or to os-train."
    leave(run(app, sys.argv[1:] or ["--help"], elsewhere(DataJob, Training, hint)))


if __name__ == "__main__":
    main()
