"""Log-probabilities of completions under a model: what GRPO trains, and what it compares with the reference.

Batches come as TRL makes them: prompts padded on the left, completions on the right, one `attention_mask` over both.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from opensloth.engine import attention
from opensloth.engine.fill import Pack, Sizes
from opensloth.engine.head import Gradients, Head, before_cap, by_kernel, chunks, logits_of

ALIGNED = 8  # numbers: 64 bytes, as kernels like their inputs to begin


class TokenScores(NamedTuple):
    """Of each completion token, shape (rows, completion length), fp32, 0 where there is padding.

    `logps` at the sampling temperature; `entropy` (nats) of the distribution that the token was drawn from, without a
    gradient.
    """

    logps: torch.Tensor
    entropy: torch.Tensor


def packed(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    length: int,
    temperature: float,
    head: Head | None = None,
    sizes: Sizes | None = None,
) -> TokenScores:
    """One forward over all rows laid one behind the other, without padding; logits for completion tokens alone.

    Rows that follow each other with the same prompt share it: its tokens go through the model once.

    Args:
        model: with the attention of engine/attention.py; may be wrapped in DDP.
        input_ids, attention_mask: (rows, prompt and completion). If both are on the host, it does not wait.
        length: of the completions' part.
        head: of the model; without it the model makes the logits of all completion tokens at once.
        sizes: which packs that train are filled up to, unless it was given up to record them.
    """
    device = next(model.parameters()).device
    ids, mask = input_ids.cpu(), attention_mask.cpu().bool()
    laid, at = lay_out(ids, mask, length, device), mask[:, -length:]
    pack = Pack(ids[laid.keep], (mask.cumsum(1) - 1)[laid.keep], laid.rows, laid.key_places)
    gave_up = head is not None and head.graphed is not None and head.graphed.gave_up
    if sizes is not None and torch.is_grad_enabled() and not gave_up:
        pack = sizes.fill(pack)
    tokens, positions, queries, keys, predictors, targets, scored, *key_places = carried(
        [
            pack.tokens,
            pack.positions,
            pack.rows.queries,
            pack.rows.keys,
            laid.predictors,
            ids[:, -length:][at],
            at.flatten().nonzero()[:, 0],
            *([] if pack.key_places is None else [pack.key_places]),
        ],
        device,
    )
    inputs: dict[str, Any] = {
        "input_ids": tokens[None],
        "position_ids": positions[None],
        "cu_seq_lens_q": queries,
        "cu_seq_lens_k": keys,
        "max_length_q": pack.rows.longest_queries,
        "max_length_k": pack.rows.longest_keys,
        "key_places": key_places[0] if key_places else None,
    }
    if head is not None:
        head = head.of(model)
        hidden = head.hidden(model, **inputs)[0].index_select(0, predictors)
        logps, entropy = score_hidden(head, hidden, targets, temperature)
    else:  # with a cache, rows would see each other
        logits = model(**inputs, logits_to_keep=predictors, use_cache=False).logits[0]
        logps, entropy = score(logits, targets, temperature)
    empty = torch.zeros(at.numel(), dtype=logps.dtype, device=device)
    return TokenScores(*(empty.index_copy(0, scored, found).view(at.shape) for found in (logps, entropy)))


def carried(numbers: list[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Whole numbers of the host, each (any,), on `device`: in one transfer, for which the host does not wait."""
    if device.type == "cpu":
        return numbers
    ends = list(accumulate(-(-len(one) // ALIGNED) * ALIGNED for one in numbers))
    buffer = torch.empty(ends[-1], dtype=torch.long, pin_memory=True)
    places = [slice(start, start + len(one)) for start, one in zip([0, *ends], numbers, strict=False)]
    for place, one in zip(places, numbers, strict=True):
        buffer[place] = one
    there = buffer.to(device, non_blocking=True)
    return [there[place].to(one.dtype) for place, one in zip(places, numbers, strict=True)]


class Laid(NamedTuple):
    """Rows in a pack: which of their tokens lie in it, and where.

    Attributes:
        keep: (rows, prompt and completion), True for the tokens of the pack, in its order.
        key_places: the place in the pack of every token that a row sees, row by row; None where no prompt is shared.
        predictors: the place of the token before each completion token.
    """

    keep: torch.Tensor
    rows: attention.Boundaries
    key_places: torch.Tensor | None
    predictors: torch.Tensor


def lay_out(input_ids: torch.Tensor, mask: torch.Tensor, length: int, device: torch.device | None = None) -> Laid:
    """Lay rows one behind the other; a row whose prompt is that of the row before has only its completion there.

    Args:
        input_ids, mask: on the host, which needs to know the lengths; `device` is where the model is.
    """
    prompts, completions = mask[:, :-length], mask[:, -length:]
    ids = input_ids[:, :-length].masked_fill(~prompts, -1)
    first = torch.ones(len(ids), dtype=torch.bool, device=ids.device)  # whether a row brings its prompt
    if attention.shares(device or ids.device):
        first[1:] = (ids[1:] != ids[:-1]).any(1)
    keep = torch.cat([prompts & first[:, None], completions], 1)
    rows = attention.Boundaries(ends(keep), ends(mask), int(keep.sum(1).max()), int(mask.sum(1).max()))
    starts = rows.queries[:-1].long()
    head = starts[first][first.cumsum(0) - 1]  # where the prompt of each row begins
    own = starts + first * prompts.sum(1)  # where its completion begins
    of_prompt = head[:, None] + prompts.cumsum(1) - 1
    of_completion = own[:, None] + completions.cumsum(1) - 1
    before = of_completion - 1
    before[:, 0] = of_prompt[:, -1]  # the first token of a completion follows the last one of the prompt
    key_places = None if bool(first.all()) else torch.cat([of_prompt, of_completion], 1)[mask]
    return Laid(keep, rows, key_places, before[completions])


def ends(mask: torch.Tensor) -> torch.Tensor:
    """The boundaries of rows whose tokens are marked: cumulative, from 0."""
    return F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)


def padded(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    length: int,
    temperature: float,
    head: Head | None = None,
) -> TokenScores:
    """The same over a padded batch, for models whose rows cannot be packed.

    Rows are moved to the left, so that all padding stands behind them, where no token sees it: unsloth's models pass
    over the mask while they train.
    """
    prompts, tokens = attention_mask[:, :-length].sum(1), attention_mask.sum(1)
    width, before = int(tokens.max()), int(prompts.min()) - 1  # of what stands before, no logits are needed
    order = attention_mask.argsort(dim=1, descending=True, stable=True)[:, :width]
    mask = attention_mask.gather(1, order)
    inputs: dict[str, Any] = {
        "input_ids": input_ids.gather(1, order),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
    }
    at = attention_mask[:, -length:].bool()
    targets = input_ids[:, -length:][at]
    rows, columns = at.nonzero(as_tuple=True)
    places = prompts[rows] - 1 + columns
    if head is not None:
        head = head.of(model)
        logps, entropy = score_hidden(head, head.hidden(model, **inputs)[rows, places], targets, temperature)
    else:
        logits = model(**inputs, logits_to_keep=width - before, use_cache=False).logits[:, before - width :]
        logps, entropy = score(logits[rows, places - before], targets, temperature)
    empty = torch.zeros(at.shape, dtype=logps.dtype, device=at.device)
    return TokenScores(empty.masked_scatter(at, logps), empty.masked_scatter(at, entropy))


def score(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of `targets` and entropy under softmax(logits / temperature), in fp32.

    Args:
        logits: (..., vocabulary).
        targets: (...).
    """
    scaled = logits.float() / temperature
    total = scaled.logsumexp(-1)
    logps = scaled.gather(-1, targets[..., None])[..., 0] - total
    with torch.no_grad():
        mean = (scaled - total[..., None]).exp_().mul_(scaled).sum(-1)
    return logps, total.detach() - mean


def score_hidden(
    head: Head, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`score` of the logits that `head` gives `hidden` (tokens, hidden size), of which a chunk is there at a time."""
    operands = head.operands(hidden)
    wants, *others = (x is not None and x.requires_grad and torch.is_grad_enabled() for x in operands)
    found: tuple[torch.Tensor, torch.Tensor] = HeadScores.apply(  # type: ignore[no-untyped-call]
        *operands, targets, temperature, head, wants and not any(others)
    )
    return found


class HeadScores(torch.autograd.Function):
    """What is upstream of a token's log-probability is one number, known in the backward alone. Where the head is
    frozen the gradient of its hidden state is known but for this factor, and made with the logits (`ahead`); where it
    trains each chunk's logits are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        temperature: float,
        head: Head,
        ahead: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        score_chunk, slopes_of_chunk = functions_for(hidden)
        logps = torch.empty(len(hidden), device=hidden.device)
        entropy, ones = torch.empty_like(logps), torch.ones_like(logps)
        gradients = Gradients(hidden, weight, bias, (ahead, False, False))
        for part in chunks(len(hidden), len(weight)):
            raw = F.linear(hidden[part], weight, bias)
            logps[part], entropy[part] = score_chunk(raw, targets[part], temperature, head.cap)
            if ahead:
                gradients.add(part, slopes_of_chunk(raw, targets[part], ones[part], temperature, head.cap))
        ctx.save_for_backward(*((gradients.hidden,) if ahead else (hidden, weight, bias, targets)))
        ctx.temperature, ctx.head, ctx.ahead = temperature, head, ahead
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.ahead:
            (by_one,) = ctx.saved_tensors
            return (by_one.float() * upstream[0][:, None]).to(by_one.dtype), *(None,) * 6
        hidden, weight, bias, targets = ctx.saved_tensors
        gradients = Gradients(hidden, weight, bias, ctx.needs_input_grad[:3])
        _, slopes_of_chunk = functions_for(hidden)
        for part in chunks(len(hidden), len(weight)):
            raw, wanted = F.linear(hidden[part], weight, bias), upstream[0][part]
            gradients.add(part, slopes_of_chunk(raw, targets[part], wanted, ctx.temperature, ctx.head.cap))
        found = (gradients.hidden, gradients.weight, gradients.bias)
        return *(None if x is None else x.to(weight.dtype) for x in found), *(None,) * 4


def functions_for(hidden: torch.Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What scores a chunk of logits, and what makes their slopes: as `scores_of` and `slopes_of`."""
    if not by_kernel(hidden):
        return scores_of, slopes_of
    from opensloth.engine import softmax

    return softmax.scores_of, softmax.slopes_of


def scores_of(
    raw: torch.Tensor, targets: torch.Tensor, temperature: float, cap: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`score` of what the head gave a chunk."""
    return score(logits_of(raw, cap), targets, temperature)


def slopes_of(
    raw: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, temperature: float, cap: float | None
) -> torch.Tensor:
    """Gradients of what the head gave a chunk, in its type, by those of its log-probabilities: (tokens,)."""
    logits, at = logits_of(raw, cap), targets[:, None]
    factor = upstream[:, None] / temperature
    chances = (logits / temperature).softmax(-1)
    of_chosen = before_cap((1 - chances.gather(1, at)) * factor, logits.gather(1, at), cap)
    found = before_cap(chances.mul_(-factor), logits, cap).to(raw.dtype)  # in place: a chunk is large
    return found.scatter_(1, at, of_chosen.to(raw.dtype))
