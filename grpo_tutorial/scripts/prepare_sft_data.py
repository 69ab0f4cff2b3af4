#!/usr/bin/env python3
"""Stage 1, step 1 of the tutorial: fetch worked solutions and write them as plain rows.

Each row written has `problem`, `generated_solution` (without <think> marks) and `expected_answer`. Any data set whose
rows hold working and answer apart will do. Only rows whose answer is a number are kept, unless --all-answers: a number
can be checked in stage 2, and a short SFT stage is there to teach the format. Runs from any folder; can be run again.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from opensloth import log, paths
from opensloth.data.messages.examples import BadRow, detect_format
from opensloth.data.messages.formats import SHAPES
from opensloth.data.sources.open import open_source
from opensloth.errors import OpenSlothError, UserError

ROOT = Path(__file__).resolve().parents[2]
DATASET = "unsloth/OpenMathReasoning-mini"
OUTPUT = Path("grpo_tutorial/data/sft_openmath_raw.jsonl")
NUMBER = re.compile(r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?")


def is_number(answer: str) -> bool:
    """Whether `answer` is one number: 42, -3, 1,200 or 0.5; not 1/2, x + 1 or an interval."""
    text = answer.strip()
    return bool(NUMBER.fullmatch(text)) and any(c.isdigit() for c in text)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    dataset = os.environ.get("SFT_DATASET") or DATASET
    samples = os.environ.get("SFT_SAMPLES") or None
    parser.add_argument("--dataset", default=dataset, help="hub id or file (default: SFT_DATASET or %(default)s)")
    parser.add_argument("--split", help=f"default: cot for {DATASET}, train for any other")
    parser.add_argument("--subset", help="subset (configuration) of a hub data set")
    parser.add_argument(
        "--samples", default=samples, help="keep the first N rows that fit (default: SFT_SAMPLES or all)"
    )
    parser.add_argument("--all-answers", action="store_true", help="also keep answers that are no number")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="default: %(default)s")
    return parser.parse_args()


def prepare(options: argparse.Namespace) -> None:
    """Stream the source into the output file and say what was kept. Raises UserError if nothing was."""
    limit = number_of_samples(options.samples)
    split = options.split or ("cot" if options.dataset == DATASET else "train")
    source = open_source(options.dataset, split=split, subset=options.subset)
    row_format = detect_format(source.columns, {})
    if SHAPES[row_format.name].gold is None:
        hint = "Use a set like OpenMathReasoning or GSM8K, or give your own rows straight to os-data."
        raise UserError(f"The rows of {options.dataset} do not hold working and answer apart.", hint)
    dropped: Counter[str] = Counter()
    kept: list[str] = []
    with log.progress("reading", source.size, "rows") as report:
        for done, raw in enumerate(source.rows(), 1):
            report(done)
            if raw.value is None:
                dropped[raw.problem or "no row"] += 1
                continue
            try:
                example = row_format.example(raw.value)
            except BadRow as bad:
                dropped[bad.reason] += 1
                continue
            if example.working is None or example.answer is None:
                dropped["no working"] += 1
                continue
            if not (options.all_answers or is_number(example.answer)):
                dropped["answer is no number"] += 1
                continue
            problem = next(m["content"] for m in example.messages if m["role"] == "user")
            row = {"problem": problem, "generated_solution": example.working, "expected_answer": example.answer}
            kept.append(json.dumps(row, ensure_ascii=False) + "\n")
            if len(kept) == limit:
                break
    if not kept:
        raise UserError(f"No row of {options.dataset} was kept ({summary(dropped)}).", "Try --all-answers.")
    output = ROOT / options.output
    paths.check_writable(output.parent)
    paths.write_text(output, "".join(kept))
    log.say(f"kept {len(kept):,} rows in {options.output}" + (f"; dropped {summary(dropped)}" if dropped else ""))


def number_of_samples(text: str | None) -> int | None:
    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"--samples (SFT_SAMPLES) {text}: must be a number of rows, at least 1.")
    return int(text)


def summary(dropped: Counter[str]) -> str:
    return ", ".join(f"{count:,} x {reason}" for reason, count in dropped.most_common())


def main() -> int:
    log.quiet_libraries()
    try:
        prepare(arguments())
    except OpenSlothError as error:
        log.fail(error.message, error.hint)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
