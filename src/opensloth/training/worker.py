"""One training process: `python -m opensloth.training.worker RUN_DIR`, started by the launcher or by torchrun.

It reads RUN_DIR/job.json and its place among the processes from the environment, and nothing else.
"""

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

from opensloth import log, paths
from opensloth.config.jobs import TRAINING
from opensloth.data.models.resolve import ModelRef
from opensloth.data.prepared.directory import Prepared, open_prepared
from opensloth.errors import UserError
from opensloth.launch.device import claim_device


def main() -> None:
    run(Path(sys.argv[1]))  # whoever starts this module reports what it raises


def run(run_dir: Path) -> None:
    """Train the job of a run directory, as one of its processes."""
    log.quiet_libraries()
    paths.keep_compiled()
    device_name = claim_device()  # before torch is imported: it may hide the other cards
    record = paths.read_json(run_dir / "job.json", "a run directory")
    method = record["method"]
    job = TRAINING[method].model_validate({name: entry["value"] for name, entry in record["settings"].items()})
    adapter = record["model"]["adapter"]
    ref = ModelRef(
        spec=record["model"]["base"],
        base=record["model"]["base"],
        revision=record["model"]["revision"],
        adapter=Path(adapter) if adapter else None,
        name="",
    )
    if job.engine == "unsloth" and device_name.startswith("cuda") and importlib.util.find_spec("unsloth"):
        import_unsloth()
    from opensloth.training.place import join

    place = join(device_name)
    runner = importlib.import_module(f"opensloth.training.{method}.run")
    runner.train(run_dir, job, ref, open_data(record), place)


def open_data(record: dict[str, Any]) -> Prepared:
    """The data of the job. Raises UserError where it was prepared anew since: other rows are another job."""
    prepared = open_prepared(Path(record["data"]["directory"]))
    if prepared.manifest.digest != record["identity"]["data"]:
        raise UserError(f"{prepared.directory} was prepared anew since this run began.", "Start another run on it.")
    return prepared


def import_unsloth() -> None:
    """Before torch's libraries: unsloth replaces parts of transformers, peft and trl as it is imported.

    What it compiles goes to our cache, not to the working directory.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(paths.cache_dir() / "unsloth_compiled"))
    importlib.import_module("unsloth")


if __name__ == "__main__":
    main()
