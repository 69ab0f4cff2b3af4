"""`--rollout graph`: decoding with CUDA graphs over fixed buffers, sampling included.

A decoding step of a small model is a thousand short kernels, and launching them takes ten times as long as running
them. Recorded once for each length of the cache (in steps of BUCKET) and number of rows, a step is replayed as one;
weights change in place, so recordings stay good for the whole run. Prompts go through the model once for each group.
On a CPU the same steps run without recordings.

What has ended stops costing: every CHECK_EVERY steps, when the open rows fit into half of those that are computed (or a
quarter, and so on, down to SMALLEST), they move to the front of the buffers, and the steps from then on compute only
the front. Halves keep the recordings few, and a move costs about what two steps read. Rows are not refilled from the
prompts that wait: a refilled row would need a place of its own in the cache, and a step's batch waits for its longest
completion in any case.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from opensloth.rollout.decode import Halt, go_on, grouped_attention, lay_out, never, step
from opensloth.rollout.merge import Merge
from opensloth.rollout.sampling import Sampling, choose

BUCKET = 64  # positions of the cache; attention costs what the bucket holds
CHECK_EVERY = 8  # steps between two looks at whether all completions have ended: each waits for the card
WARM_UP = 2  # steps made plainly before one is recorded: libraries choose and load their kernels in them
SMALLEST = 8  # rows; fewer cost a step nothing less

How = tuple[Sampling, tuple[int, ...]]  # how tokens are chosen, and which end a completion


class FixedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values (rows, heads, positions, head size) at addresses that never change.

    Attributes:
        slot: (1,), where the next position is written; shared by all layers.
        count, visible: rows, and positions of each, that attention looks at.
    """

    def __init__(self, like: DynamicLayer, rows: int, length: int, slot: torch.Tensor) -> None:
        super().__init__()
        shape = (rows, like.keys.shape[1], length, like.keys.shape[3])
        self.keys, self.values = like.keys.new_zeros(shape), like.values.new_zeros(shape)
        self.is_initialized = True
        self.slot = slot
        self.count, self.visible = rows, length

    def fill(self, prompt: DynamicLayer, source: torch.Tensor) -> None:
        """Row i begins with what row `source[i]` of the prompts' cache holds."""
        for mine, theirs in ((self.keys, prompt.keys), (self.values, prompt.values)):
            mine[: len(source), :, : theirs.shape[2]] = theirs[source]

    def move(self, rows: torch.Tensor, length: int) -> None:
        """Row i becomes what row `rows[i]` was, so many positions of it."""
        for mine in (self.keys, self.values):
            mine[: len(rows), :, :length] = mine[rows, :, :length]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.keys[: self.count], self.values[: self.count]
        keys.index_copy_(2, self.slot, key_states)
        values.index_copy_(2, self.slot, value_states)
        return keys[:, :, : self.visible], values[:, :, : self.visible]


class Buffers:
    """All that a decoding step reads and writes, for `rows` completions of at most `new` tokens.

    `count` is how many of the rows, from the front, a step computes.
    """

    def __init__(self, prompts: Cache, rows: int, length: int, new: int, device: torch.device) -> None:
        self.rows, self.length, self.new = rows, length, new
        self.count = rows
        self.slot = torch.zeros(1, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.cache = Cache(layers=[FixedLayer(layer, rows, length, self.slot) for layer in prompts.layers])
        self.tokens = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.positions = torch.zeros((rows, 1), dtype=torch.long, device=device)
        self.seen = torch.zeros((rows, 1, 1, length), dtype=torch.bool, device=device)
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
        asked, longest = len(source), mask.shape[1]
        self.count = smallest(self.rows, asked)
        for layer, prompt in zip(self.cache.layers, prompts.layers, strict=True):
            layer.fill(prompt, source)
        self.open.zero_()
        self.open[:asked] = True
        self.seen.zero_()
        self.seen[:, 0, 0, 0] = True  # a row that sees nothing would be one of NaN
        self.seen[:asked, 0, 0, :longest] = mask[source].bool()
        self.positions.zero_()
        self.positions[:asked] = mask.sum(1, keepdim=True)[source]
        self.slot.fill_(longest)
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
        for layer in self.cache.layers:
            layer.move(rows, length)
        for one in (self.tokens, self.positions, self.seen, self.uniforms, self.written, self.logprobs, self.open):
            one[:count] = one[rows]
        self.count = count
        return rows


class GraphDecoder:
    """Completes batches of prompts; keeps its buffers and recordings from one batch to the next."""

    def __init__(self) -> None:
        self.buffers: Buffers | None = None
        self.merge = Merge()

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
        with self.merge(policy), grouped_attention(policy):
            cache = Cache(layers=[DynamicLayer() for _ in DynamicCache(config=policy.config).layers])
            logits = step(policy, ids, mask, cache)
            state = self.room(cache, asked, longest + max_new, max_new, device)
            state.begin(cache, mask, source, uniforms)
            del cache
            state.write(logits[source], how)
            for at in range(1, max_new):
                go_on(halt)
                if at % CHECK_EVERY == 0:
                    left = int(state.open[: state.count].sum())
                    if left == 0:
                        break
                    if smallest(state.rows, left) < state.count:
                        state.copy_to(tokens, logprobs, rows)
                        rows = rows[state.shrink(smallest(state.rows, left), longest + at)]
                self.advance(policy, state, bucket(longest + at), how)
            state.copy_to(tokens, logprobs, rows)
        return tokens.tolist(), logprobs.tolist()

    def release(self) -> None:
        """Give the memory of buffers and recordings back to the card; the next batch makes them anew."""
        self.buffers = None
        torch.cuda.empty_cache()

    def room(self, cache: Cache, rows: int, length: int, new: int, device: torch.device) -> Buffers:
        """Buffers that are large enough; the old ones, and their recordings, where they are."""
        old = self.buffers
        if old is None or old.rows < rows or old.length < length or old.new < new:
            length, new = bucket(max(length, old.length if old else 0)), max(new, old.new if old else 0)
            self.buffers = None  # before the new ones: they may not fit beside each other
            self.buffers = Buffers(cache, max(rows, old.rows if old else 0), length, new, device)
        assert self.buffers is not None
        return self.buffers

    def advance(self, policy: torch.nn.Module, state: Buffers, length: int, how: How) -> None:
        """One token for every row that is computed, with attention over the first `length` positions."""
        key = (state.count, length, how)
        if state.at.device.type == "cuda" and key not in state.graphs:
            state.made[key] += 1
            if state.made[key] > WARM_UP:
                state.graphs[key] = self.record(policy, state, length, how)
        graph = state.graphs.get(key)
        if graph is None:
            self.plain(policy, state, length, how)
        else:
            graph.replay()

    def plain(self, policy: torch.nn.Module, state: Buffers, length: int, how: How) -> None:
        """What is recorded."""
        count = state.count
        state.seen.index_fill_(3, state.slot, True)
        for layer in state.cache.layers:
            layer.count, layer.visible = count, length
        out: Any = policy(
            input_ids=state.tokens[:count],
            attention_mask=state.seen[:count, ..., :length],
            position_ids=state.positions[:count],
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state.write(out.logits[:, -1], how)
        state.slot.add_(1)
        state.positions.add_(1)

    def record(self, policy: torch.nn.Module, state: Buffers, length: int, how: How) -> torch.cuda.CUDAGraph:
        """A recording of a step, which is not made by that: nothing in the buffers changes."""
        graph = torch.cuda.CUDAGraph()
        torch.clear_autocast_cache()  # a recording must not read weights that autocast has cast, and will let go
        # thread_local: NCCL's watchdog asks the card from a thread of its own, which would break a recording
        with torch.cuda.graph(graph, pool=state.pool, capture_error_mode="thread_local"):
            self.plain(policy, state, length, how)
        torch.clear_autocast_cache()  # nor may others read what was cast in it
        return graph


def bucket(length: int) -> int:
    """`length` rounded up to whole buckets."""
    return -(-length // BUCKET) * BUCKET


def smallest(rows: int, needed: int) -> int:
    """The smallest number of rows that holds `needed` of them: `rows`, its half (rounded up), its quarter ..."""
    while rows > SMALLEST and -(-rows // 2) >= needed:
        rows = -(-rows // 2)
    return rows
