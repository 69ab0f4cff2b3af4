"""The written rules behind `auto`: which engine, which number type. Each choice comes with its reason, in words."""

import importlib.util
import math
from dataclasses import dataclass

import torch

from opensloth.config.run import TrainOptions
from opensloth.engine import fill, pace
from opensloth.engine.memory import ROOM, Shape
from opensloth.errors import UserError

WORTH_COMPILING = 10_000_000  # tokens of a run
WORTH_RECORDING = 0.97  # of the time of passes that are not recorded: to record takes time itself, and memory


@dataclass(frozen=True)
class Choice:
    value: str
    why: str


RECORDED = Choice("on", "a pack is a few launches for the host, not thousands")
FAST_HOST = Choice("off", "with this model and packs of this size the host is fast enough")


def engine(options: TrainOptions, device: torch.device) -> Choice:
    """`native` unless unsloth was asked for: it is exact everywhere, and the faster of the two on packs.

    Raises UserError where unsloth was asked for and cannot run.
    """
    if options.engine == "unsloth":
        if device.type != "cuda":
            raise UserError("--engine unsloth needs a CUDA card.", "Use --engine native (or auto) on this machine.")
        if importlib.util.find_spec("unsloth") is None:
            raise UserError(
                "--engine unsloth: unsloth is not installed.", 'Install it: pip install "openslothai[unsloth]".'
            )
        return Choice("unsloth", "as asked")
    if options.engine == "native":
        return Choice("native", "as asked")
    return Choice("native", "it packs rows exactly on every device")


def dtype(options: TrainOptions, device: torch.device) -> Choice:
    """bfloat16 where the hardware computes in it, else float16 (with a loss scaler) on a card and float32 on a CPU.

    Raises UserError for float16 on a CPU, which has no loss scaler.
    """
    if options.dtype == "float16" and device.type != "cuda":
        raise UserError("--dtype float16 needs a CUDA card.", "Use bfloat16 or float32 (or auto) on this machine.")
    if options.dtype != "auto":
        return Choice(options.dtype, "as asked")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if (major, minor) >= (8, 0):
            return Choice("bfloat16", f"the card (sm{major}{minor}) computes in it")
        return Choice("float16", f"the card (sm{major}{minor}) has no bfloat16; with a loss scaler")
    if device.type == "cpu" and cpu_has_bfloat16():
        return Choice("bfloat16", "this CPU computes in it")
    return Choice("float32", f"this {device.type.upper()} has no fast bfloat16")


def compilation(options: TrainOptions, device: torch.device, packs: bool, tokens: int) -> Choice:
    """Whether layers are compiled, "on" or "off": it takes a minute once, and then a part of every step's time away.

    Args:
        packs: whether rows lie one behind the other under our own attention.
        tokens: of the whole run, over all processes; 0 where they are not known.
    """
    if not packs:
        return Choice("off", "layers are compiled for packs")
    if options.load_in_4bit or options.load_in_8bit:
        return Choice("off", "layers of a quantized base are not compiled")
    if options.compile != "auto":
        return Choice(options.compile, "as asked")
    if device.type != "cuda":
        return Choice("off", "on a CPU it takes longer than it saves")
    if tokens < WORTH_COMPILING:
        return Choice("off", f"it takes longer than it saves in less than {WORTH_COMPILING:,} tokens")
    return Choice("on", "it takes a minute, once, and is kept for the next run")


def may_record(options: TrainOptions, device: torch.device, recordable: bool) -> Choice:
    """Whether the passes of packs are recorded as CUDA graphs, "on" or "off" (engine/graphed.py), if rows fill packs.

    Args:
        recordable: whether the host does the same for every pack of a shape.
    """
    if options.cuda_graphs == "off":
        return Choice("off", "as asked")
    if device.type != "cuda":
        return Choice("off", "they are for a card")
    if options.batch_size is not None:
        return Choice("off", "they are for packs of one size")
    if options.full_finetuning or options.load_in_8bit:
        return Choice("off", "they are for adapters, on a base in 16 or 4 bits")
    if not recordable:
        return Choice("off", "the host does not do the same for each pack with this model")
    return RECORDED


def worth_recording(shape: Shape, pack_tokens: int, filled: float, slower: bool) -> Choice:
    """The same, once it is known what packs there are: where they take less time recorded (engine/pace.py).

    Args:
        filled: the share of real tokens in packs that are all filled up to `pack_tokens`.
        slower: whether recorded passes add adapters' shares in a slower way (engine/matmul.py).
    """
    takes = pace.recorded(shape, pack_tokens, slower)
    if takes > pace.launched(shape, pack_tokens):
        return FAST_HOST
    if filled < pace.LEAST_FILLED or takes > pace.launched(shape, filled * pack_tokens):
        return Choice("off", f"with packs of one size {1 - filled:.0%} of all tokens would be padding")
    return RECORDED


def largest_recorded(shape: Shape, pack_tokens: int, longest: int, batch: int, slower: bool) -> int:
    """Tokens of the largest pack of completions with which batches take least time, if passes are recorded and packs
    filled up (engine/fill.py); 0 if batches take no longer when nothing is recorded.

    Args:
        pack_tokens: of the largest pack that is not recorded; those that are have no more.
        longest: tokens of the longest row, which a pack must hold besides what fills it up.
        batch: tokens of a batch whose completions are as long as they may be. Others have a half, or a quarter.
        slower: as in `worth_recording`.
    """
    largest = [tokens for tokens in fill.tokens_of(pack_tokens) if tokens >= ROOM * longest]
    if not largest:
        return 0
    batches = [batch / share for share in (1, 2, 4)]

    def launched(tokens: float) -> float:
        packs = math.ceil(tokens / pack_tokens)
        return packs * pace.launched(shape, tokens / packs, pace.OF_COMPLETIONS)

    def recorded(tokens: float, largest: int) -> float:
        packs = math.ceil(tokens / largest)
        size = min(tokens / packs + largest / fill.PARTS / 2, largest)  # half of a part is filled up, on average
        return packs * (pace.recorded(shape, size, slower) + pace.SMALL * shape.layers)

    seconds = {tokens: sum(recorded(batch, tokens) for batch in batches) for tokens in largest}
    best = min(largest, key=lambda tokens: (seconds[tokens], -tokens))
    return best if seconds[best] < WORTH_RECORDING * sum(map(launched, batches)) else 0


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); elsewhere fp32 is faster."""
    from torch.cpu import _is_amx_tile_supported, _is_avx512_bf16_supported

    return bool(_is_avx512_bf16_supported() or _is_amx_tile_supported())
