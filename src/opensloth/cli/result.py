"""How a training command ends: where the adapter is, and the last figures of the run."""

import json
import shlex
from typing import TYPE_CHECKING, Any

from opensloth import log
from opensloth.launch.world import speaks

if TYPE_CHECKING:
    from opensloth.launch.run_directory import Result


def report(result: "Result", as_json: bool) -> None:
    """Print where the adapter is, and the last figures of the run; once, however many processes torchrun started."""
    if not speaks():
        return
    if as_json:
        record = {"output": str(result.output), "status": result.status, "metrics": result.metrics}
        print(json.dumps(record, ensure_ascii=False))
        return
    lines = [(result.status, str(result.output))]
    lines += [(name.replace("_", " "), figure(value)) for name, value in shown(result.metrics)]
    if (board := result.output / "tensorboard").is_dir():
        lines.append(("watch it", f"tensorboard --logdir {shlex.quote(str(board))}"))
    width = max(len(name) for name, _ in lines) + 2
    for name, text in lines:
        print(log.printable(f"{name:<{width}}{text}"))


def shown(metrics: dict[str, Any]) -> list[tuple[str, Any]]:
    """What there is, without what each process has: that is for programs."""
    return [(name, value) for name, value in metrics.items() if value is not None and not isinstance(value, dict)]


def figure(value: Any) -> str:
    """A number as people read it."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
