"""`--rollout graph`: decoding with CUDA graphs over fixed buffers, sampling included.

A decoding step of a small model is a thousand short kernels, and launching them takes ten times as long as running
them. Recorded once for each length of the cache (in steps of BUCKET), a step is replayed as one; weights change in
place, so recordings stay good for the whole run. Prompts go through the model once for each group. On a CPU the same
steps run without recordings.
"""

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
WARM_UP = 2  # steps before a recording, in which libraries choose and load their kernels


class FixedLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values (rows, heads, positions, head size) at addresses that never change.

    Attributes:
        slot: (1,), where the next position is written; shared by all layers.
        visible: positions that attention looks at.
    """

    def __init__(self, like: DynamicLayer, rows: int, length: int, slot: torch.Tensor) -> None:
        super().__init__()
        shape = (rows, like.keys.shape[1], length, like.keys.shape[3])
        self.keys, self.values = like.keys.new_zeros(shape), like.values.new_zeros(shape)
        self.is_initialized = True
        self.slot = slot
        self.visible = length

    def fill(self, prompt: DynamicLayer, source: torch.Tensor) -> None:
        """Row i begins with what row `source[i]` of the prompts' cache holds."""
        for mine, theirs in ((self.keys, prompt.keys), (self.values, prompt.values)):
            mine[:, :, : theirs.shape[2]] = theirs[source]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.slot, key_states)
        self.values.index_copy_(2, self.slot, value_states)
        return self.keys[:, :, : self.visible], self.values[:, :, : self.visible]


class Buffers:
    """All that a decoding step reads and writes, for `rows` completions of at most `new` tokens."""

    def __init__(self, prompts: Cache, rows: int, length: int, new: int, device: torch.device) -> None:
        self.rows, self.length, self.new = rows, length, new
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
        self.graphs: dict[tuple[int, Sampling, tuple[int, ...]], torch.cuda.CUDAGraph] = {}
        self.pool = (
            torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        )  # recordings are never played at once
        self.ends: dict[tuple[int, ...], torch.Tensor] = {}

    def write(self, logits: torch.Tensor, sampling: Sampling, stops: tuple[int, ...]) -> None:
        """Choose the tokens of position `at`, and move on by one."""
        if stops not in self.ends:
            self.ends[stops] = torch.tensor(stops or (-1,), dtype=torch.long, device=self.at.device)
        numbers = None if sampling.greedy else self.uniforms.index_select(1, self.at)[:, 0]
        chosen, values = choose(logits, sampling, numbers)
        self.written.index_copy_(1, self.at, chosen[:, None])
        self.logprobs.index_copy_(1, self.at, values[:, None])
        self.open.logical_and_((chosen[:, None] != self.ends[stops]).all(1))
        self.tokens.copy_(chosen[:, None])
        self.at.add_(1)


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
        longest = ids.shape[1]
        how = (sampling, tuple(stops))
        with self.merge(policy), grouped_attention(policy):
            cache = Cache(layers=[DynamicLayer() for _ in DynamicCache(config=policy.config).layers])
            logits = step(policy, ids, mask, cache)
            state = self.room(cache, len(prompts), longest + max_new, max_new, device)
            if device.type == "cuda":
                for length in range(longest + 1, longest + max_new, BUCKET):
                    go_on(halt)
                    self.record(policy, state, bucket(length), *how)
                self.record(policy, state, bucket(longest + max_new - 1), *how)
            missing = state.rows - len(prompts)
            source = torch.tensor(places + [0] * missing, device=device)
            for layer, prompt in zip(state.cache.layers, cache.layers, strict=True):
                layer.fill(prompt, source)
            del cache
            state.open.copy_(torch.arange(state.rows, device=device) < len(prompts))
            state.seen.zero_()
            state.seen[:, 0, 0, :longest] = mask[source].bool()
            state.positions.copy_(mask.sum(1, keepdim=True)[source])
            state.slot.fill_(longest)
            state.at.zero_()
            if uniforms is not None:
                state.uniforms[: len(prompts), :max_new] = uniforms
            state.write(logits[source], *how)
            for at in range(1, max_new):
                go_on(halt)
                if at % CHECK_EVERY == 0 and not bool(state.open.any()):
                    break
                self.advance(policy, state, bucket(longest + at), *how)
        rows = len(prompts)
        return state.written[:rows, :max_new].tolist(), state.logprobs[:rows, :max_new].tolist()

    def room(self, cache: Cache, rows: int, length: int, new: int, device: torch.device) -> Buffers:
        """Buffers that are large enough; the old ones, and their recordings, where they are."""
        old = self.buffers
        if old is None or old.rows < rows or old.length < length or old.new < new:
            length, new = bucket(max(length, old.length if old else 0)), max(new, old.new if old else 0)
            self.buffers = None  # before the new ones: they may not fit beside each other
            self.buffers = Buffers(cache, max(rows, old.rows if old else 0), length, new, device)
        assert self.buffers is not None
        return self.buffers

    def advance(
        self, policy: torch.nn.Module, state: Buffers, length: int, sampling: Sampling, stops: tuple[int, ...]
    ) -> None:
        """One token for every row, with attention over the first `length` positions."""
        graph = state.graphs.get((length, sampling, stops))
        if graph is not None:
            graph.replay()
            return
        state.seen.index_fill_(3, state.slot, True)
        for layer in state.cache.layers:
            layer.visible = length
        out: Any = policy(
            input_ids=state.tokens,
            attention_mask=state.seen[..., :length],
            position_ids=state.positions,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        state.write(out.logits[:, -1], sampling, stops)
        state.slot.add_(1)
        state.positions.add_(1)

    def record(
        self, policy: torch.nn.Module, state: Buffers, length: int, sampling: Sampling, stops: tuple[int, ...]
    ) -> None:
        """Record a step of this length, unless it is there. Leaves the buffers' contents undefined."""
        key = (length, sampling, stops)
        if key in state.graphs:
            return

        def rehearse() -> None:
            state.slot.zero_()
            state.at.zero_()
            self.advance(policy, state, length, sampling, stops)

        state.positions.zero_()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                rehearse()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # thread_local: NCCL's watchdog asks the card from a thread of its own, which would break a recording
        with torch.cuda.graph(graph, pool=state.pool, capture_error_mode="thread_local"):
            self.advance(policy, state, length, sampling, stops)
        state.graphs[key] = graph


def bucket(length: int) -> int:
    """`length` rounded up to whole buckets."""
    return -(-length // BUCKET) * BUCKET
