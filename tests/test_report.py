"""docs/results.md is what benchmarks/report.py makes of the raw figures."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import report  # noqa: E402  (benchmarks are no package)

RESULTS = ROOT / "benchmarks" / "results"


def scores(value):
    interval = {"value": value, "low": value - 0.04, "high": value + 0.04}
    return {"pass_at_1": interval, "format_rate": 0.99, "mean_tokens": 40.4}


def difference(value):
    return {"value": value, "low": value - 0.03, "high": value + 0.03}


@pytest.fixture
def found():
    run = [{"step": step, "pass_rate": step / 100, "entropy": 0.3} for step in range(1, 31)]
    return {
        "machine": {"device": "A card"},
        "versions": dict.fromkeys(("python", "torch", "transformers", "trl", "peft"), "1.0"),
        "command": "python reasoning.py eval",
        "recipe": {"sft": {"lr": 1e-3}, "grpo": {"lr": 2e-4}},
        "seconds": {"sft": 60.0, "grpo-1": 300.4, "trl-1": 400.0},
        "scores": {name: scores(value) for name, value in {"base": 0.1, "sft": 0.25, "grpo-1": 0.42}.items()},
        "differences": {"grpo-1 - sft": difference(0.17), report.ALL_SEEDS: difference(0.17)},
        "curves": {"grpo-1": run, "grpo-2": run},
    }


def test_the_page_has_the_figures_and_nothing_that_was_not_measured(found):
    page = report.page(found, "reasoning-card.json")
    assert "| sft | 25.0 (21.0 to 29.0) |  | 99.0 | 40 | 60 |" in page
    assert "| grpo-1 | 42.0 (38.0 to 46.0) | +17.0 (+14.0 to +20.0) | 99.0 | 40 | 300 |" in page
    assert "GRPO changed pass@1 by +17.0 (+14.0 to +20.0) percentage points" in page
    assert "line [3.0, 4.0, 5.0" in page  # in percent, the mean of five steps
    assert "TRL's own" not in page
    assert "GSM" not in page


def test_trl_and_the_stories_have_parts_of_their_own(found):
    found["scores"] |= {"grpo-1 after 40 steps": scores(0.4), "trl-1": scores(0.38)}
    found["scores"] |= {"gsm base": scores(0.0), "gsm data-sft": scores(0.1), "gsm data-grpo-1": scores(0.15)}
    found["differences"]["grpo-1 after 40 steps - trl-1"] = difference(-0.02)
    found["differences"]["gsm data-grpo-1 - gsm data-sft"] = difference(0.05)
    page = report.page(found, "reasoning-card.json")
    assert "| grpo-1 after 40 steps - trl-1 | -2.0 (-5.0 to +1.0) |" in page
    assert "| gsm data-grpo-1 | 15.0 (11.0 to 19.0) | +5.0 (+2.0 to +8.0) |" in page
    assert page.index("## Beside TRL") < page.index("## GSM-Symbolic")


def test_a_control_of_an_earlier_run_has_a_table_of_its_own(found, tmp_path):
    earlier = found | {"scores": {"sft": scores(0.2), "control": scores(0.6)}, "seconds": {"control": 195.0}}
    (tmp_path / "earlier.json").write_text(json.dumps(earlier))
    page = report.page(found, "reasoning-card.json", tmp_path / "earlier.json")
    assert "| control | 60.0 (56.0 to 64.0) |  | 99.0 | 40 | 195 |" in page
    assert page.index("## Beside a control") < page.index("| control |") < page.index("## While it trains")
    assert "--control benchmarks/results/earlier.json > docs/results.md" in page


def test_the_published_page_is_made_from_the_published_figures():
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    found, control = RESULTS / "reasoning-h100.json", RESULTS / "reasoning-h100-control.json"
    assert page == report.page(json.loads(found.read_text(encoding="utf-8")), found.name, control)
