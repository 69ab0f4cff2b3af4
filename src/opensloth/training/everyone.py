"""What each process has, told to all of them."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def of_all(mine: T) -> list[T]:
    """`mine` of every process, in the order of ranks; of this one alone where it is alone. All call it at once."""
    if not dist.is_initialized():
        return [mine]
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    return found
