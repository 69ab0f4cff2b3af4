"""The decoding kernel beside plain attention, on numbers that fit no block."""

from typing import Any

import torch

TOLERANCE = {torch.float32: 3e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def reference(query: Any, key: Any, value: Any, prompts: Any, own: Any, starts: Any, source: Any, at: int) -> Any:
    """Row by row, in fp32: (rows, 1, heads, head size), with scaling 0.3."""
    rows = []
    for row, prompt in enumerate(source.tolist()[: len(query)]):
        both = zip(prompts, own, (key, value), strict=True)
        k, v = (torch.cat([p[prompt, :, starts[prompt] :], o[row, :, :at], new[row]], 1).float() for p, o, new in both)
        groups = query.shape[1] // key.shape[1]
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        weights = (query[row].float() @ k.transpose(1, 2) * 0.3).softmax(-1)
        rows.append((weights @ v).transpose(0, 1))
    return torch.stack(rows)


def hold_to_reference(groups: int, size: int, dtype: Any, at: int, device: str) -> None:
    """Three prompts of different length, four rows of two key heads, and what the kernel writes."""
    from opensloth.rollout.kernel import attend

    chooser = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> Any:
        return torch.randn(*shape, generator=chooser).to(device, dtype)

    heads, rows, longest, new = 2, 4, 70, 90
    starts = torch.tensor([0, 67, 69], dtype=torch.int32, device=device)
    source = torch.tensor([0, 0, 1, 2, 0], dtype=torch.int32, device=device)
    query = numbers(rows, 1, heads * groups, size).transpose(1, 2)
    key, value = (numbers(rows, 1, heads, size).transpose(1, 2) for _ in range(2))
    prompts = [numbers(3, heads, longest, size) for _ in range(2)]
    own = [numbers(rows + 1, heads, new, size) for _ in range(2)]
    expected = reference(query, key, value, prompts, own, starts, source, at)
    written = [x.clone() for x in own]
    for x, one in zip(written, (key, value), strict=True):
        x[:rows, :, at] = one[:, :, 0]
    ends = (torch.tensor([end], device=device) for end in (longest, at))
    one = (x[:, :, 0] for x in (query, key, value))
    found = attend(*one, *own, *prompts, source, starts, *ends, 0.3)[:, None]
    torch.testing.assert_close(found.float(), expected, atol=TOLERANCE[dtype], rtol=0)
    assert all(torch.equal(x, y) for x, y in zip(own, written, strict=True))
