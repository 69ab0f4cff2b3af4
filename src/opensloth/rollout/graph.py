"""`--rollout graph`: decoding with CUDA graphs over fixed buffers, sampling included.

A decoding step of a small model is a thousand short kernels, and launching them takes ten times as long as running
them. Recorded once for each number of rows, a step is replayed as one; weights change in place, so recordings stay good
for the whole run. Prompts go through the model once for each group. On a CPU the same steps run without recordings.
Where keys and values lie, and which attention reads them, is told in rollout/store.py.

What has ended stops costing: every CHECK_EVERY steps the open rows are counted. When they fit into half of those that
are computed (or a quarter, and so on, down to SMALLEST), they move to the front of the buffers, and the steps from then
on compute only the front. Halves keep the recordings few, and a move costs about what two steps read. Rows are not
refilled from the prompts that wait: a refilled row would need a place of its own in the cache, and a step's batch waits
for its longest completion in any case.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from opensloth.engine.fused import same
from opensloth.rollout import block, grouped
from opensloth.rollout.decode import Halt, attention_by, go_on, lay_out, never, step
from opensloth.rollout.merge import Merge
from opensloth.rollout.sampling import Sampling, choose
from opensloth.rollout.store import Make, OwnRows, SharedPrompts, Store, bucket, why_not_shared
from opensloth.rollout.turn import Forwards, forwards, turning

CHECK_EVERY = 8  # steps between two looks at how many completions have not ended
LATER = 2  # steps after which what was seen is known: the card has these to do while the host waits for it
WARM_UP = 2  # steps made plainly before one is recorded: libraries choose and load their kernels in them
SMALLEST = 8  # rows; fewer cost a step nothing less

How = tuple[Sampling, tuple[int, ...]]  # how tokens are chosen, and which end a completion


class Buffers:
    """All that a decoding step reads and writes, for `rows` completions of at most `new` tokens.

    `count` is how many of the rows, from the front, a step computes.
    """

    def __init__(self, store: Store, device: torch.device) -> None:
        self.store = store
        self.rows, new = store.rows, store.new
        rows = self.count = store.rows
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.positions = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.uniforms = torch.zeros((rows, new), dtype=torch.float64, device=device)
        self.written = torch.zeros((rows, new), dtype=torch.long, device=device)
        self.logprobs = torch.zeros((rows, new), device=device)
        self.open = torch.zeros(rows, dtype=torch.bool, device=device)
        self.graphs: dict[tuple[int, int, How], torch.cuda.CUDAGraph] = {}
        self.made: Counter[tuple[int, int, How]] = Counter()  # steps without a recording
        # one for all recordings: they are never played at once
        self.pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        self.ends: dict[tuple[int, ...], torch.Tensor] = {}

    def begin(self, prompts: Cache, mask: torch.Tensor, source: torch.Tensor, uniforms: torch.Tensor | None) -> None:
        """Lay the prompts out: `mask` (distinct prompts, longest), `source` (completions,), `uniforms` as in decode."""
        asked = len(source)
        self.count = smallest(self.rows, asked)
        self.store.begin(prompts, mask, source)
        self.open.zero_()
        self.open[:asked] = True
        self.positions.zero_()
        self.positions[:asked] = mask.sum(1, keepdim=True)[source]
        self.at.zero_()
        if uniforms is not None:
            self.uniforms[:asked, : uniforms.shape[1]] = uniforms

    def write(self, logits: torch.Tensor, how: How) -> None:
        """Choose the tokens of position `at`, and move on by one."""
        sampling, stops = how
        if stops not in self.ends:
            self.ends[stops] = torch.tensor(stops or (-1,), dtype=torch.long, device=self.at.device)
        count = len(logits)
        numbers = None if sampling.greedy else self.uniforms[:count].index_select(1, self.at)[:, 0]
        chosen, values = choose(logits, sampling, numbers)
        self.written[:count].index_copy_(1, self.at, chosen[:, None])
        self.logprobs[:count].index_copy_(1, self.at, values[:, None])
        self.open[:count].logical_and_((chosen[:, None] != self.ends[stops]).all(1))
        self.tokens[:count].copy_(chosen[:, None])
        self.at.add_(1)

    def copy_to(self, tokens: torch.Tensor, logprobs: torch.Tensor, rows: torch.Tensor) -> None:
        """What is written so far, of the first rows, into row `rows[i]` of (completions, new) tensors."""
        new = tokens.shape[1]
        tokens[rows], logprobs[rows] = self.written[: len(rows), :new], self.logprobs[: len(rows), :new]

    def shrink(self, count: int, length: int) -> torch.Tensor:
        """Compute so many rows from now on, the open ones among them.

        Args:
            length: positions that the cache holds.
        Returns:
            (count,) which of the rows before each row was.
        """
        rows = (~self.open[: self.count]).to(torch.uint8).argsort(stable=True)[:count]
        self.store.move(rows, length)
        for one in (self.tokens, self.positions, self.uniforms, self.written, self.logprobs, self.open):
            one[:count] = one[rows]
        self.count = count
        return rows


class Look:
    """How many rows are open, seen where the card is in its work, and told when it has come there."""

    def __init__(self, open_: torch.Tensor) -> None:
        self.sum = open_.sum()
        self.done: torch.cuda.Event | None = None
        if open_.is_cuda:
            self.sum = torch.empty((), dtype=torch.long, pin_memory=True).copy_(self.sum, non_blocking=True)
            self.done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self.done.record()

    def count(self) -> int:
        if self.done is not None:
            self.done.synchronize()
        return int(self.sum)


class GraphDecoder:
    """Completes batches of prompts; keeps its buffers and recordings from one batch to the next.

    Args:
        kind: how keys and values are kept; else SharedPrompts, where it serves.
        longest: tokens of the longest prompt that will come, so that none makes larger buffers and recordings anew.
    """

    def __init__(self, kind: Make | None = None, longest: int = 0) -> None:
        self.kind = kind
        self.longest = longest
        self.buffers: Buffers | None = None
        self.merge = Merge()
        self.turned: Forwards | None = None  # of layers that take fewer kernels, once that was tried

    def __call__(
        self,
        policy: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        stops: Sequence[int],
        pad: int,
        max_new: int,
        sampling: Sampling,
        uniforms: torch.Tensor | None,
        halt: Halt = never,
    ) -> tuple[list[list[int]], list[list[float]]]:
        """As `decode.decode`; what follows a stop token is for the caller to cut."""
        device = next(policy.parameters()).device
        ids, mask, places = lay_out(prompts, pad, device)
        longest, asked = ids.shape[1], len(prompts)
        how = (sampling, tuple(stops))
        source = torch.tensor(places, device=device)
        tokens = torch.zeros((asked, max_new), dtype=torch.long, device=device)
        logprobs = torch.zeros((asked, max_new), device=device)
        rows = torch.arange(asked, device=device)  # which completion each row is
        with self.merge(policy):
            with attention_by(policy, grouped.NAME):
                cache = Cache(layers=[DynamicLayer() for _ in DynamicCache(config=policy.config).layers])
                logits = step(policy, ids, mask, cache)
            state = self.room(policy, cache, len(ids), asked, longest, max_new, device)
            state.begin(cache, mask, source, uniforms)
            del cache
            state.write(logits[source], how)
            self.write_on(policy, state, how, longest, rows, tokens, logprobs, halt)
        return tokens.tolist(), logprobs.tolist()

    def write_on(
        self,
        policy: torch.nn.Module,
        state: Buffers,
        how: How,
        longest: int,
        rows: torch.Tensor,
        tokens: torch.Tensor,
        logprobs: torch.Tensor,
        halt: Halt,
    ) -> None:
        """All positions after the first, into `tokens` and `logprobs` (completions, new), of which `rows` are which."""
        with attention_by(policy, state.store.attention):
            if self.turned is None:
                self.turned = turned(policy, state, state.store.span(longest + 1))
        with attention_by(policy, state.store.attention), turning(self.turned):
            for at in range(1, tokens.shape[1]):
                go_on(halt)
                if at % CHECK_EVERY == 0:
                    seen = Look(state.open[: state.count])
                elif at > CHECK_EVERY and at % CHECK_EVERY == LATER:
                    left = seen.count()
                    if left == 0:
                        break
                    if smallest(state.rows, left) < state.count:
                        state.copy_to(tokens, logprobs, rows)
                        rows = rows[state.shrink(smallest(state.rows, left), longest + at)]
                self.advance(policy, state, state.store.span(longest + at), how)
        state.copy_to(tokens, logprobs, rows)

    def release(self) -> None:
        """Give the memory of buffers and recordings back to the card; the next batch makes them anew."""
        self.buffers = None
        torch.cuda.empty_cache()

    def room(
        self,
        policy: torch.nn.Module,
        cache: Cache,
        prompts: int,
        rows: int,
        longest: int,
        new: int,
        device: torch.device,
    ) -> Buffers:
        """Buffers that are large enough; the old ones, and their recordings, where they are."""
        # in whole buckets: each prompt that is a little longer than all before would cost the recordings
        needed = (prompts, rows, bucket(max(longest, self.longest)), new)
        old = self.buffers
        if old is not None:
            store = old.store
            there = (store.prompts, store.rows, store.longest, store.new)
            if all(had >= wanted for had, wanted in zip(there, needed, strict=True)):
                return old
            needed = (max(there[0], prompts), max(there[1], rows), max(there[2], needed[2]), max(there[3], new))
            del store
        config: Any = policy.config
        kind: Make = self.kind or (OwnRows if why_not_shared(config, device) else SharedPrompts)
        old = self.buffers = None  # before the new ones: they may not fit beside each other
        self.buffers = Buffers(kind(cache, *needed, device), device)
        return self.buffers

    def advance(self, policy: torch.nn.Module, state: Buffers, span: int, how: How) -> None:
        """One token for every row that is computed; `span` as Store.span has it."""
        key = (state.count, span, how)
        if state.at.device.type == "cuda" and key not in state.graphs:
            state.made[key] += 1
            if state.made[key] > WARM_UP:
                state.graphs[key] = self.record(policy, state, span, how)
        graph = state.graphs.get(key)
        if graph is None:
            self.plain(policy, state, span, how)
        else:
            graph.replay()

    def plain(self, policy: torch.nn.Module, state: Buffers, span: int, how: How) -> None:
        """What is recorded."""
        state.write(logits_of(policy, state, span), how)
        state.store.step_done()
        state.positions.add_(1)

    def record(self, policy: torch.nn.Module, state: Buffers, span: int, how: How) -> torch.cuda.CUDAGraph:
        """A recording of a step, which is not made by that: nothing in the buffers changes."""
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # a recording must not read weights that autocast has cast, and will let go
        # thread_local: NCCL's watchdog asks the card from a thread of its own, which would break a recording
        with torch.cuda.graph(graph, pool=state.pool, capture_error_mode="thread_local"):
            self.plain(policy, state, span, how)
        torch.clear_autocast_cache()  # nor may others read what was cast in it
        return graph


def logits_of(policy: torch.nn.Module, state: Buffers, span: int) -> torch.Tensor:
    """Of the next position of the rows that are computed, whose keys and values are written. (rows, vocabulary)."""
    count = state.count
    out: Any = policy(
        input_ids=state.tokens[:count],
        position_ids=state.positions[:count],
        use_cache=True,
        logits_to_keep=1,
        **state.store.inputs(count, span),
    )
    logits: torch.Tensor = out.logits[:, -1]
    return logits


def turned(policy: torch.nn.Module, state: Buffers, span: int) -> Forwards:
    """Other forwards of a model's layers for decoding steps, as many as compute the same; none where none do."""
    heads = forwards(policy) if isinstance(state.store, SharedPrompts) else {}
    if not heads:
        return {}
    expected = logits_of(policy, state, span)
    around = block.forwards(policy)
    for found in ({**heads, **around}, heads) if around else (heads,):
        with turning(found):  # keys and values are written once more, to the same place
            if same(logits_of(policy, state, span), expected):
                return found
    return {}


def smallest(rows: int, needed: int) -> int:
    """The smallest number of rows that holds `needed` of them: `rows`, its half (rounded up), its quarter ..."""
    while rows > SMALLEST and -(-rows // 2) >= needed:
        rows = -(-rows // 2)
    return rows
