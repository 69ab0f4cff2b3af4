"""CUDA graphs that are recorded one after the other, and leave a process whole where a recording breaks off."""

import contextlib
from collections.abc import Callable

import torch


class Tape:
    """CUDA graphs that share one pool of memory. A forward's is replayed, then its backward's, and no other between."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, work: Callable[[], None]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self.stream):
            # other threads (NCCL's watchdog) may ask the card for things meanwhile
            graph.capture_begin(self.pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                self.leave_broken(graph)
                raise
        return graph.replay

    def leave_broken(self, graph: torch.cuda.CUDAGraph) -> None:
        """What `capture_end` leaves undone where the recording broke off: the allocator would go on to keep what it is
        given back, and the next random number that is drawn on the card would fail."""
        with contextlib.suppress(RuntimeError):
            graph.capture_end()
        device = torch.cuda.current_device()
        with contextlib.suppress(RuntimeError, AttributeError):  # private, and done already where that went well
            torch._C._cuda_endAllocateToPool(device, self.pool)
        generator = torch.cuda.default_generators[device]
        generator.graphsafe_set_state(generator.clone_state())
