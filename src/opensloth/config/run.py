"""Settings of a training run: the model, the optimizer, the batch, checkpoints, processes."""

from typing import Any

from pydantic import field_validator, model_validator

from opensloth.config.base import Settings, option

ENGINES = ("auto", "native", "unsloth")
CHECKPOINTING = ("auto", "none", "selective", "full")
COMPILE = ("auto", "on", "off")
GRAPHS = ("auto", "off")
DTYPES = ("auto", "bfloat16", "float16", "float32")
SCHEDULERS = ("linear", "cosine", "constant")
OPTIMIZERS = ("auto", "adamw", "adamw_8bit", "sgd")
LOSSES = ("dapo", "grpo", "dr_grpo", "bnpo")
ROLLOUTS = ("auto", "graph", "vllm", "generate")
SCALES = ("auto", "group", "batch", "none")
ZERO_SIGNAL = ("warn", "stop")
SEVEN_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class ModelOptions(Settings):
    """Which weights to start from."""

    model: str = option(
        ..., "A hub id, a model directory, an adapter directory (training goes on from it), or sample:smollm2."
    )
    revision: str | None = option(None, "The revision (branch, tag, commit) of a hub model.")
    trust_remote_code: bool = option(False, "Run Python code that comes with a hub model.", off="-")


class TrainOptions(Settings):
    """What SFT and GRPO share; their defaults differ where the methods do."""

    epochs: float = option(1.0, "Passes over the data.", gt=0)
    max_steps: int | None = option(None, "Stop after N optimizer steps, whatever --epochs says.", ge=1)
    lr: float = option(2e-4, "The peak learning rate.", gt=0)
    lr_scheduler: str = option("linear", "How the learning rate falls after the warm-up.", choices=SCHEDULERS)
    warmup_steps: float = option(0.03, "Warm-up: steps, or below 1 a share of them (0.03 or 3%).", shown="3%", ge=0)
    weight_decay: float = option(0.01, "Decoupled weight decay.", ge=0)
    max_grad_norm: float = option(1.0, "Clip the gradient of all processes to this norm (0: never).", ge=0)
    optim: str = option("auto", "The optimizer; auto is AdamW, fused on a GPU; sgd has no moments.", choices=OPTIMIZERS)

    pack_tokens: int | str = option("auto", "Tokens that go through the model at once; auto goes by free memory.")
    batch_size: int | None = option(None, "Rows per process and micro-batch, instead of --pack-tokens.", ge=1)
    grad_accum: int | None = option(None, "Micro-batches per optimizer step, with --batch-size.", shown="1", ge=1)

    lora_r: int = option(16, "The rank of the adapter.", ge=1)
    lora_alpha: int = option(32, "The adapter's scale is alpha / r.", ge=1)
    lora_dropout: float = option(0.0, "Dropout on the adapter's input.", ge=0, lt=1)
    lora_targets: tuple[str, ...] = option(SEVEN_LINEARS, "The layers that get an adapter.", shown="the seven linears")
    use_rslora: bool = option(False, "Scale the adapter by alpha / sqrt(r) (arXiv 2312.03732).", off="-")
    load_in_4bit: bool = option(False, "QLoRA: the frozen base in 4-bit nf4 (arXiv 2305.14314).", off="-")
    load_in_8bit: bool = option(False, "The frozen base in 8-bit (LLM.int8).", off="-")
    full_finetuning: bool = option(False, "Train all weights instead of an adapter.", off="-")
    dtype: str = option(
        "auto", "The type of the computation; auto is bfloat16 where the hardware has it.", choices=DTYPES
    )

    engine: str = option(
        "auto", "native (transformers + PEFT) or unsloth; auto says what it chose and why.", choices=ENGINES
    )
    gradient_checkpointing: str = option(
        "auto", "Trade time for memory; auto goes by free memory.", choices=CHECKPOINTING
    )
    compile: str = option(
        "auto", "Compile the layers (engine native); auto does for long SFT on a card.", choices=COMPILE
    )
    cuda_graphs: str = option(
        "auto",
        "Record the passes of a pack as CUDA graphs (engine native); auto does on a card where it pays.",
        choices=GRAPHS,
    )

    logging_steps: int = option(1, "Log every N steps.", ge=1)
    save_steps: int = option(100, "Write a checkpoint every N steps.", ge=1)
    save_total_limit: int = option(2, "Keep the newest N checkpoints.", ge=1)
    eval_steps: int = option(0, "Evaluate every N steps (0: never) and at the end, where data was held out.", ge=0)
    resume: str = option("auto", "auto goes on from the newest complete checkpoint; never; or the PATH of one.")
    report_to: tuple[str, ...] = option(("tensorboard",), "Where metrics go: tensorboard, wandb, none.")

    @field_validator("warmup_steps", mode="before")
    @classmethod
    def percent(cls, value: object) -> object:
        return float(value[:-1]) / 100 if isinstance(value, str) and value.endswith("%") else value

    @field_validator("tokens_per_step", "pack_tokens", check_fields=False)
    @classmethod
    def auto_or_tokens(cls, value: int | str) -> int | str:
        if value == "auto":
            return value
        try:
            tokens = int(value)
        except ValueError:
            raise ValueError("must be auto or a number of tokens") from None
        if tokens < 1:
            raise ValueError("must be at least 1")
        return tokens

    @field_validator("lora_targets", "report_to", mode="before")
    @classmethod
    def comma_list(cls, value: object) -> object:
        """`a,b` is the list of a and b, on the command line and in files."""
        words = [value] if isinstance(value, str) else value
        if isinstance(words, list | tuple):
            return tuple(part for word in words for part in str(word).split(",") if part)
        return value

    @field_validator("report_to")
    @classmethod
    def known_reports(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := set(value) - {"tensorboard", "wandb", "none"}:
            raise ValueError(f"knows no {', '.join(sorted(unknown))}; choose from tensorboard, wandb, none")
        return value

    @model_validator(mode="after")
    def settings_agree(self) -> "TrainOptions":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("--load-in-4bit and --load-in-8bit exclude each other: choose one")
        if self.full_finetuning and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("--full-finetuning cannot train a quantized base: drop --load-in-4bit/--load-in-8bit")
        if self.grad_accum and not self.batch_size:
            raise ValueError("--grad-accum counts micro-batches of --batch-size rows: give --batch-size too")
        if self.batch_size and self.pack_tokens != "auto":
            raise ValueError("--batch-size and --pack-tokens both fix the size of a micro-batch: give one of them")
        return self


class SftOptions(TrainOptions):
    """What only SFT has."""

    tokens_per_step: int | str = option(
        "auto",
        "Real tokens of one optimizer step over all processes; auto: a hundredth of an epoch's, in 1,024..65,536.",
    )

    @model_validator(mode="after")
    def one_size_of_a_step(self) -> "SftOptions":
        if self.batch_size and self.tokens_per_step != "auto":
            raise ValueError("--batch-size and --tokens-per-step both fix the size of a step: give one of them")
        return self


class GrpoOptions(TrainOptions):
    """What only GRPO has, and its own defaults of what both have. An adapter to start from keeps its r and alpha."""

    lr: float = option(1e-5, "The peak learning rate.", gt=0)
    lr_scheduler: str = option("constant", "How the learning rate falls after the warm-up.", choices=SCHEDULERS)
    warmup_steps: float = option(0.0, "Warm-up: steps, or below 1 a share of them (0.03 or 3%).", ge=0)
    weight_decay: float = option(0.0, "Decoupled weight decay.", ge=0)
    max_grad_norm: float = option(0.5, "Clip the gradient of all processes to this norm (0: never).", ge=0)
    save_steps: int = option(25, "Write a checkpoint every N steps.", ge=1)

    task: str = option("math", "A preset of rewards; os-grpo --list-rewards shows them.")
    rewards: str | None = option(
        None, "Rewards instead of the preset's, with weights: math_answer,math_format=0.5,FILE.py:FUNCTION=2."
    )
    prompts_per_step: int = option(8, "Prompts of one batch of completions, over all processes.", ge=1)
    group_size: int = option(8, "Completions of each prompt, which are compared with each other.", ge=1)
    updates_per_batch: int = option(1, "Optimizer steps on each batch of completions.", ge=1)

    max_new: int = option(512, "Tokens of a completion at most.", ge=1)
    temperature: float = option(1.0, "Of sampling, and of the log-probabilities that train.", gt=0)
    top_p: float = option(1.0, "Sample from the likeliest tokens that make up this probability.", gt=0, le=1)
    top_k: int = option(0, "Sample from the K likeliest tokens (0: all).", ge=0)
    min_p: float = option(0.0, "Leave out tokens below this share of the likeliest one's probability.", ge=0, lt=1)
    stop: tuple[str, ...] = option((), "A token that ends a completion, beside the contract's; may be repeated.")

    beta: float = option(0.0, "Weight of the KL divergence from the model that training starts from.", ge=0)
    loss: str = option(
        "dapo", "How token losses are averaged (arXiv 2503.14476, 2402.03300, 2503.20783).", choices=LOSSES
    )
    scale_rewards: str = option(
        "auto",
        "What advantages are divided by: the spread of the rewards in the group, in the batch, or nothing; auto: the "
        "group's, but nothing with --loss dr_grpo.",
        choices=SCALES,
    )
    clip: float = option(
        0.2,
        "How far a token's probability may move from what it was when the batch was made: 1 - clip to 1 + clip.",
        gt=0,
    )

    rollout: str = option(
        "auto", "How completions are made; auto is graph on a card with engine native, else generate.", choices=ROLLOUTS
    )
    print_samples_every: int = option(10, "Let demo_reward show a completion every N optimizer steps (0: never).", ge=0)
    zero_signal: str = option(
        "warn", "What to do where no group has a spread of rewards, so that nothing is learned.", choices=ZERO_SIGNAL
    )

    @field_validator("stop", mode="before")
    @classmethod
    def several_texts(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def checkpoints_lie_between_batches(cls, values: Any) -> Any:
        """A --save-steps that nobody chose is rounded up to whole batches."""
        updates = values.get("updates_per_batch") if isinstance(values, dict) else None
        if updates is None or "save_steps" in values or not str(updates).isdecimal() or int(updates) < 1:
            return values
        return {**values, "save_steps": whole(cls.model_fields["save_steps"].default, int(updates))}

    @model_validator(mode="after")
    def batch_adds_up(self) -> "GrpoOptions":
        if self.group_size < 2:
            raise ValueError(
                "--group-size 1: a completion is judged against the others of its group, so there must be at least 2"
            )
        if self.save_steps % self.updates_per_batch:
            raise ValueError(
                f"--save-steps {self.save_steps} is no multiple of --updates-per-batch {self.updates_per_batch}: "
                "a run goes on between two batches of completions, not within one; "
                f"--save-steps {whole(self.save_steps, self.updates_per_batch)} is the next that is"
            )
        return self

    @model_validator(mode="after")
    def vllm_serves(self) -> "GrpoOptions":
        if self.rollout == "vllm" and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("--rollout vllm gets the weights in 16 bits or more: drop --load-in-4bit/--load-in-8bit")
        if self.rollout == "vllm" and self.engine == "unsloth":
            raise ValueError("--rollout vllm works with --engine native: unsloth brings its own")
        return self


def whole(count: int, of: int) -> int:
    """`count`, rounded up to a multiple."""
    return -(-count // of) * of


class LaunchOptions(Settings):
    """Processes and machines."""

    gpus: str = option(
        "auto", "auto (all visible), a number, or a list such as 0,2; 0,0 lets two processes share a card.", short="g"
    )
    processes: int | None = option(None, "Train on the CPU with N processes.", ge=1)
    nnodes: int = option(1, "Machines that train together.", ge=1)
    node_rank: int = option(0, "This machine's number, from 0.", ge=0)
    rdzv_endpoint: str | None = option(None, "HOST:PORT of machine 0, where the machines meet.")
    max_restarts: int = option(0, "Restart failed processes from the last checkpoint up to N times.", ge=0)
    timeout: int = option(600, "Seconds without an answer from another process before the run is ended.", ge=1)
    check_every: int = option(100, "Compare the adapter's hash over all processes every N steps (0: never).", ge=0)

    @field_validator("gpus", mode="before")
    @classmethod
    def number_or_list(cls, value: object) -> object:
        return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    @model_validator(mode="after")
    def nodes_meet(self) -> "LaunchOptions":
        if self.nnodes > 1 and not self.rdzv_endpoint:
            raise ValueError("--nnodes over 1 needs --rdzv-endpoint HOST:PORT, the same on every machine")
        if self.node_rank >= self.nnodes:
            raise ValueError(f"--node-rank {self.node_rank} must be below --nnodes {self.nnodes}")
        return self
