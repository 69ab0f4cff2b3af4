"""`os-eval`: models answer held-out problems, side by side."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from opensloth import log
from opensloth.cli.model_facts import config_of, context_length
from opensloth.cli.options import Request, add_command, new_app
from opensloth.cli.program import leave, run
from opensloth.config.jobs import EvalJob
from opensloth.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opensloth.data.models.resolve import ModelRef
    from opensloth.evaluation.compare import Comparison, Report
    from opensloth.evaluation.score import Interval

HELP = "Score models and adapters on held-out problems, with intervals, against the first of them."
app = new_app(HELP)


def evaluate(request: Request[EvalJob]) -> None:
    from opensloth.evaluation.asked import asked

    job = request.job
    if request.dry_run:
        from opensloth.cli.dry_run import show as show_plan

        answers = f"1 greedy and {job.group_size} sampled" if job.group_size > 1 else "1, greedy"
        plan = {"models": f"{len(job.model)}, one after the other", "answers to each": answers}
        if job.input.startswith("sample:") or Path(job.input).exists():  # no data set is fetched for it
            plan["problems"] = f"{len(asked(job).problems):,}"
        show_plan(request.resolved, plan, request.as_json)
        return
    what = asked(job)
    check_context(job, what.refs)
    from opensloth.evaluation.compare import compare  # with torch, which takes seconds

    found = compare(job, what)
    if request.as_json:
        print(json.dumps(record(found, job), ensure_ascii=False))
    else:
        show(found, job)


def check_context(job: EvalJob, refs: "Sequence[ModelRef]") -> None:
    """Raises UserError where answers could be longer than what a model knows positions for."""
    for ref in refs:
        context = context_length(config_of(ref, job.trust_remote_code))
        if context is not None and job.max_new >= context:
            raise UserError(
                f"--max-new {job.max_new:,} leaves no room for a problem in the {context:,} positions of {ref.name}.",
                "Lower it.",
            )


def record(found: "Comparison", job: EvalJob) -> dict[str, Any]:
    """The comparison as plain values: shares from 0 to 1, intervals as value, low, high."""
    first = found.reports[0]
    rows = [
        {
            "model": report.model,
            "pass_at_1": asdict(report.pass_at_1),
            "pass_at_k": report.pass_at_k,
            "format_rate": report.format_rate,
            "mean_tokens": report.mean_tokens,
            "right": [one.right for one in report.greedy],
            "difference": None if report is first else asdict(report.against(first)),
        }
        for report in found.reports
    ]
    return {"input": job.input, "problems": len(found.problems), "contract": found.contract.name, "models": rows}


def show(found: "Comparison", job: EvalJob) -> None:
    console = Console(highlight=False, soft_wrap=True)
    console.print(table(found.reports, len(found.problems)))
    for example, answer in wrong(found)[: job.show_wrong]:
        console.print()
        for name, text in (
            (
                "problem",
                example.messages[-1]["content"] if example.messages[-1]["role"] == "user" else question(example),
            ),
            ("expected", example.answer),
            ("written", answer),
        ):
            console.print(f"{name:<10}{log.printable(str(text))}", markup=False)


def question(example: Any) -> str:
    return next(str(message["content"]) for message in reversed(example.messages) if message["role"] == "user")


def wrong(found: "Comparison") -> list[tuple[Any, str]]:
    """The problems that the last model got wrong, with what it wrote."""
    last = found.reports[-1]
    return [(example, one.text) for example, one in zip(found.problems, last.greedy, strict=True) if not one.right]


def table(reports: "list[Report]", problems: int) -> Table:
    """One column a model, one row a figure; what is not there for any model is left out."""
    first = reports[0]
    columns = Table(title=f"{problems} problems", title_justify="left")
    columns.add_column("")
    for report in reports:
        columns.add_column(report.model, justify="right", overflow="fold")
    columns.add_row("right answers, greedy", *(percent(report.pass_at_1) for report in reports))
    if first.sampled:
        k = len(first.sampled[0])
        columns.add_row(f"pass@{k}, sampled", *(f"{report.pass_at_k:.1%}" for report in reports))
    columns.add_row("answers in the format", *(f"{report.format_rate:.1%}" for report in reports))
    columns.add_row("tokens of an answer", *(f"{report.mean_tokens:.1f}" for report in reports))
    if len(reports) > 1:
        others = [f"{points(report.against(first))}" for report in reports[1:]]
        columns.add_row("against the first, in points", "", *others)
    return columns


def percent(share: "Interval") -> str:
    return f"{share.value:.1%} ({share.low:.0%} to {share.high:.0%})"


def points(difference: "Interval") -> str:
    value, low, high = (100 * number for number in (difference.value, difference.low, difference.high))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


add_command(app, "eval", EvalJob, evaluate, help=HELP)


def main() -> None:
    leave(run(app))


if __name__ == "__main__":
    main()
