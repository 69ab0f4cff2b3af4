"""Settings of `os-train verify`: those of a job, with defaults for a small one, and how equal two runs must be."""

from pathlib import Path

from opensloth.config.base import Settings, option
from opensloth.config.data import DataOptions
from opensloth.config.jobs import PromptOptions
from opensloth.config.run import DTYPES, OPTIMIZERS, GrpoOptions, ModelOptions, SftOptions


class VerifyOptions(Settings):
    """What is compared with what. The small job accumulates, packs, holds rows out, and its rows differ in length."""

    input: str = option("sample:arithmetic", "The data: as for os-train, or sample:arithmetic.", hidden=True)
    processes: int | None = option(None, "Verify N CPU processes.", shown="2, unless --gpus is given", ge=1)
    gpus: str = option("auto", "Verify these cards: a number, or a list such as 0,2 or 0,0.", short="g", shown="none")
    tolerance: float | None = option(
        None, "The largest difference that passes.", shown="1e-5; 1e-4 on cards, 0.02 in 16 bits", gt=0
    )
    output: Path | None = option(None, "Keep both runs in this new directory.", shown="nothing is kept")
    timeout: int = option(600, "Seconds without an answer from another process before the run is ended.", ge=1)

    model: str = option("sample:tiny", "The model, as for os-train; sample:tiny is made on the spot.")
    samples: int | None = option(64, "Use only the first N rows.", short="n", ge=1)
    eval_fraction: float = option(0.1, "The share of rows held out for the eval loss.", ge=0, lt=1)
    dtype: str = option("float32", "The type of the computation.", choices=DTYPES)
    # AdamW takes whole steps of gradients that are almost 0, whatever their sign, and hides a wrong scale
    optim: str = option("sgd", "The optimizer; after sgd the adapter is the sum of the gradients.", choices=OPTIMIZERS)
    lr: float = option(0.1, "The peak learning rate.", gt=0)
    report_to: tuple[str, ...] = option(("none",), "Where metrics go: tensorboard, wandb, none.")


class VerifySftJob(VerifyOptions, SftOptions, ModelOptions, DataOptions):
    """`os-train verify sft [INPUT]`."""

    max_steps: int | None = option(4, "Optimizer steps that are compared.", ge=1)
    tokens_per_step: int | str = option(2048, "Real tokens of one optimizer step over all processes.")
    pack_tokens: int | str = option(512, "Tokens that go through the model at once.")


class VerifyGrpoJob(VerifyOptions, GrpoOptions, ModelOptions, DataOptions, PromptOptions):
    """`os-train verify grpo [INPUT]`."""

    max_steps: int | None = option(3, "Optimizer steps that are compared.", ge=1)
    pack_tokens: int | str = option(512, "Tokens that go through the model at once.")
    rewards: str | None = option(
        None, "Rewards as for os-grpo.", shown="one of verify's own, for which every group has a spread"
    )
    prompts_per_step: int = option(12, "Prompts of one batch of completions, over all processes.", ge=1)
    group_size: int = option(4, "Completions of each prompt, which are compared with each other.", ge=1)
    max_new: int = option(16, "Tokens of a completion at most.", ge=1)
    print_samples_every: int = option(0, "Let demo_reward show a completion every N optimizer steps (0: never).", ge=0)
