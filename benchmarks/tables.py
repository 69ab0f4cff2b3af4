"""What was measured, as people read it: the best of each library, ratios in words, rows as a table."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from series import Outcome


def best(rows: Sequence[Outcome], case: Callable[[Outcome], str]) -> list[Outcome]:
    """Of each case the fastest row of each library, and how many times as fast as theirs ours is."""
    found: dict[str, dict[str, Outcome]] = {}
    for row in sorted(rows, key=lambda row: row["tokens_per_second"]):
        found.setdefault(case(row), {})[row["impl"]] = {name: row[name] for name in ("setting", "tokens_per_second")}
    result = []
    for name, fastest in sorted(found.items()):
        mine = fastest.get("opensloth", {}).get("tokens_per_second")
        others = {impl: one["tokens_per_second"] for impl, one in fastest.items() if impl != "opensloth"}
        times = {impl: round(mine / speed, 3) for impl, speed in others.items()} if mine else {}
        result.append({"case": name, "fastest": fastest, "times_as_fast_as": times})
    return result


def told(best: Sequence[Outcome]) -> str:
    """Ratios in words."""
    lines = [
        f"{one['case']}: {times:.2f} times as fast as the best of {impl} ({one['fastest'][impl]['setting']})"
        for one in best
        for impl, times in one["times_as_fast_as"].items()
    ]
    return "\n".join(lines)


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """Rows under the names of their columns, as plain text."""
    cells = [list(columns), *([shown(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "" if value is None else str(value)
