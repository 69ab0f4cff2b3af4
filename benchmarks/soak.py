"""make soak: SFT and GRPO runs of a tiny model, killed at random moments, against the same runs left alone.

    python benchmarks/soak.py --kills 40 --seed 1

Prints a row for each kill and writes benchmarks/results/soak-cpu.json. Exit code 1 where a run ended with other bytes.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))

import kills  # noqa: E402  (tests are no package)
from machine import describe  # noqa: E402

PER_RUN = 5  # kills of one run, before it is left to end


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--kills", type=int, default=40)
    options.add_argument("--seed", type=int, default=time.time_ns() % 2**31)
    options.add_argument("--output", type=Path, default=HERE / "results" / "soak-cpu.json")
    asked = options.parse_args()
    print(f"seed {asked.seed}", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        rows, runs = soak(kills.make_place(Path(folder)), asked.kills, random.Random(asked.seed))
    different = [run for run in runs if not run["same_bytes"]]
    seconds = round(time.monotonic() - start)
    print(f"{len(rows)} kills, {len(runs)} runs, {len(different)} with other bytes, {seconds} s")
    result = {**describe(), "seed": asked.seed, "seconds": seconds, "runs": runs, "kills": rows}
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(different))


def soak(place: Path, count: int, chance: random.Random) -> tuple[list[dict], list[dict]]:
    """The kills and the runs, as the result file holds them."""
    rows, runs = [], []
    expected = {method: kills.whole(place, method)[0] for method in kills.COMMANDS}
    print(f"{'method':7}{'run':>4}  {'moment':11}{'victim':10}{'signal':9}{'checkpoint':>10}{'code':>6}{'seconds':>9}")
    number = 0
    while len(rows) < count:
        method = sorted(kills.COMMANDS)[number % 2]
        told = kills.disturbed(place, method, number, min(PER_RUN, count - len(rows)), chance)
        same = kills.adapter(place / f"{method}-{number}") == expected[method]
        for kill in told:
            print(
                f"{kill.method:7}{kill.run:>4}  {kill.moment:11}{kill.victim:10}{kill.signal:9}"
                f"{kill.step:>10}{kill.code:>6}{kill.seconds:>9.2f}",
                flush=True,
            )
        print(f"{method:7}{number:>4}  ended with {'the same' if same else 'OTHER'} bytes", flush=True)
        digest = hashlib.sha256(expected[method]).hexdigest()
        runs.append({"method": method, "run": number, "kills": len(told), "same_bytes": same, "adapter": digest})
        rows += [kill.record() for kill in told]
        number += 1
    return rows, runs


if __name__ == "__main__":
    main()
