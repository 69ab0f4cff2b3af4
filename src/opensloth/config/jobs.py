"""The jobs: each the whole set of settings of one command, put together from the groups."""

from pathlib import Path

from opensloth.config.base import Settings, option
from opensloth.config.data import DataOptions
from opensloth.config.run import GrpoOptions, LaunchOptions, ModelOptions, SftOptions, TrainOptions

METHODS = ("sft", "grpo")


class PromptOptions(Settings):
    """What only data for GRPO has."""

    max_prompt_len: int = option(1024, "The longest prompt of data for GRPO, in tokens; longer ones are dropped.", ge=1)


class DataJob(ModelOptions, DataOptions, PromptOptions):
    """`os-data INPUT`: source rows to a directory of prepared data."""

    input: str = option(..., "A hub data set id, a file, a saved directory, or sample:arithmetic.", hidden=True)
    method: str = option("sft", "What the data is for.", choices=METHODS)
    output: Path | None = option(None, "The directory of prepared data.", shown="data/<method>-<data>-<hash>")
    gpus: int = option(1, "The number of shards; needs no GPU.", short="g", ge=1)
    force: bool = option(False, "Prepare anew, though the output directory holds it already.", short="f", off="-")


class RunJob(LaunchOptions, TrainOptions):
    """Prepared data to an adapter. What the data fixes comes from its manifest."""

    data: Path = option(..., "The directory that os-data left.", hidden=True)
    model: str | None = option(None, "The model, if not the one that the data was prepared for.", shown="the data's")
    revision: str | None = option(None, "The revision (branch, tag, commit) of a hub model.")
    trust_remote_code: bool = option(False, "Run Python code that comes with a hub model.", off="-")
    seed: int | None = option(
        None, "Seeds the order of steps and the adapter's first weights.", shown="the data's", ge=0, lt=2**32
    )
    output: Path | None = option(None, "The run directory.", shown="outputs/<method>-<model>-<data>-<hash>")
    force: bool = option(False, "Start anew in a directory that holds another run.", short="f", off="-")


class SftJob(SftOptions, RunJob):
    """`os-sft DIR`."""


class GrpoJob(GrpoOptions, RunJob):
    """`os-grpo DIR`."""


class TrainSftJob(SftOptions, LaunchOptions, ModelOptions, DataOptions):
    """`os-train sft INPUT`: preparation and training in one command. The shards follow the number of processes."""

    input: str = option(..., "A hub data set id, a file, a saved directory, or sample:arithmetic.", hidden=True)
    output: Path | None = option(None, "The run directory.", shown="outputs/sft-<model>-<data>-<hash>")
    force: bool = option(False, "Start anew in a directory that holds another run.", short="f", off="-")


class TrainGrpoJob(GrpoOptions, LaunchOptions, ModelOptions, DataOptions, PromptOptions):
    """`os-train grpo INPUT`: the same for GRPO."""

    input: str = option(..., "A hub data set id, a file, a saved directory, or sample:arithmetic.", hidden=True)
    output: Path | None = option(None, "The run directory.", shown="outputs/grpo-<model>-<data>-<hash>")
    force: bool = option(False, "Start anew in a directory that holds another run.", short="f", off="-")


TRAINING: dict[str, type[RunJob]] = {"sft": SftJob, "grpo": GrpoJob}


class EvalJob(Settings):
    """`os-eval INPUT`: models answer held-out problems and are compared."""

    input: str = option(..., "A hub data set id, a file, a saved directory, or sample:arithmetic.", hidden=True)
    model: tuple[str, ...] = option(
        ..., "A model or adapter; may be repeated, and the first is what others are held to."
    )
    trust_remote_code: bool = option(False, "Run Python code that comes with a hub model.", off="-")
    task: str = option("math", "How an answer is judged.", choices=("math",))
    samples: int | None = option(None, "Use only the first N problems.", short="n", shown="all", ge=1)
    split: str | None = option(
        None, "The split of the data.", shown="test for sample:arithmetic, else the data's only one"
    )
    subset: str | None = option(None, "The subset (configuration) of a hub data set.")
    data_revision: str | None = option(None, "The revision (branch, tag, commit) of a hub data set.")
    map: tuple[str, ...] = option((), "Name the column of a role, as `problem=question`; may be repeated.")
    chat_template: str = option("auto", "auto (the prompt.json of the first model that has one) or as in os-data.")
    system: str | None = option(None, "The system prompt.")
    max_new: int = option(512, "Tokens of an answer at most.", ge=1)
    group_size: int = option(1, "Also sample K answers to each problem, for pass@K (1: greedy answers alone).", ge=1)
    temperature: float = option(1.0, "The temperature of sampled answers.", gt=0)
    seed: int = option(3407, "Seeds the sampled answers.", ge=0, lt=2**32)
    show_wrong: int = option(0, "Show N problems that the last model got wrong.", ge=0)


def part(job: Settings, kind: type[Settings]) -> dict[str, object]:
    """The settings of `job` that `kind` has too, by name."""
    return {name: getattr(job, name) for name in kind.model_fields if name in type(job).model_fields}
