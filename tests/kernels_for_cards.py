"""Compiles our kernels for cards that are not here, each as our own code launches it.

usage: python tests/kernels_for_cards.py CAPABILITY ...    (80: an A100, 90: an H100, 120: an RTX 5090)

The interpreter that runs them in the other tests takes what no card would. Nothing is run here: a launch on CPU tensors
becomes a compilation, down to the card's machine code. A process of its own, since TRITON_INTERPRET is read at import.
"""

import os
import sys
from types import SimpleNamespace

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
WORDS = ("num_warps", "num_stages")


def kind(value):
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i64" if abs(value) > 2**31 - 1 else "i32"


def aligned(value):
    """What Triton tells the compiler of an argument at a launch: a tensor's address is a multiple of 16 bytes."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


def compiling(capabilities):
    """What stands for a kernel's launch."""

    def run(kernel, *arguments, grid, warmup, **words):
        options = {name: words.pop(name) for name in WORDS if name in words}
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | words
        fixed = {p.name: given[p.name] for p in kernel.params if p.is_constexpr}
        fixed |= {name: 1 for name, value in given.items() if type(value) is int and value == 1}
        signature = {name: "constexpr" if name in fixed else kind(value) for name, value in given.items()}
        known = {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(given)
            if name not in fixed and aligned(given[name])
        }
        for capability in capabilities:
            source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=known)
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            print(kernel.__name__, capability, signature[kernel.arg_names[0]], len(made.asm["cubin"]))

    return run


def quantized(nested, dtype):
    """How bitsandbytes tells that 128 weights are quantized."""
    scales = SimpleNamespace(absmax=torch.zeros(1), code=torch.zeros(256), blocksize=256)
    kind = torch.uint8 if nested else torch.float32
    return SimpleNamespace(
        absmax=torch.zeros(2, dtype=kind),
        code=torch.zeros(16),
        blocksize=64,
        shape=(8, 16),
        dtype=dtype,
        nested=nested,
        offset=torch.zeros(()),
        state2=scales,
    )


def launch_all(dtype):
    """Every kernel that the product launches, in a shape of Qwen3-0.6B and of SmolLM2."""
    from opensloth.engine.gate import Shares, gated, gated_back
    from opensloth.engine.nf4 import numbers
    from opensloth.engine.norm import normalize
    from opensloth.engine.rotary import launch
    from opensloth.engine.softmax import loss_and_slopes, scores_of, slopes_of
    from opensloth.rollout.draw import choose_whole
    from opensloth.rollout.kernel import Norm, Turn, attend

    for nested in (True, False):
        numbers(torch.zeros(64, 1, dtype=torch.uint8), quantized(nested, dtype))
    rows, ones = 4, torch.zeros(1, dtype=torch.long)
    for heads, keys, size, vocabulary in ((16, 8, 128, 151_936), (9, 3, 64, 49_152)):
        wide = torch.zeros(rows, 1, (heads + 2 * keys) * size, dtype=dtype)
        q, k, v = (x.unflatten(-1, (-1, size)) for x in wide.split([heads * size, keys * size, keys * size], -1))
        normalize(q, torch.ones(size, dtype=dtype), 1e-6)
        angles = torch.zeros(rows, 1, size, dtype=dtype)
        for back in (False, True):
            launch(q.transpose(1, 2), k.transpose(1, 2), angles, angles, back=back)
        own, prompts = (torch.zeros(rows, keys, 64, size, dtype=dtype) for _ in range(2))
        source = torch.zeros(rows, dtype=torch.long)
        norm = Norm(torch.ones(size, dtype=dtype), 1e-6)
        for turn in (None, Turn(angles, angles, None), Turn(angles, angles, (norm, norm))):
            attend(q[:, 0], k[:, 0], v[:, 0], own, own, prompts, prompts, source, source, ones, ones, 0.1, turn)
        gated(*torch.zeros(rows, 1, 6 * heads * size, dtype=dtype).chunk(2, -1))
        gate, up, slopes = torch.zeros(3, rows, 3 * heads * size, dtype=dtype)
        for rank in (4, 16, 64):
            low, factor = torch.zeros(rows, 2 * rank, dtype=dtype), torch.zeros(3 * heads * size, rank, dtype=dtype)
            shares, back = Shares(low, factor, factor), (low[:, :rank], factor.T.contiguous())
            for kind in ("silu", "gelu"):
                gated(gate, up, shares, kind)
                gated_back(gate, up, slopes, shares, back, kind)
        gated_back(gate, up, slopes)
        logits = torch.zeros(rows, vocabulary, dtype=dtype)
        for uniforms in (None, torch.zeros(rows, dtype=torch.float64)):
            choose_whole(logits, 1.0, uniforms)
        for cap in (None, 30.0):
            for slopes in (False, True):
                loss_and_slopes(logits, source, cap, slopes)
            scores_of(logits, source, 0.6, cap)
            slopes_of(logits, source, torch.zeros(rows), 0.6, cap)


if __name__ == "__main__":
    JITFunction.run = compiling([int(word) for word in sys.argv[1:]])
    launch_all(torch.bfloat16)
