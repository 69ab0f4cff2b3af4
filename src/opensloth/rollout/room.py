"""How many completions a card makes at once, and whether their buffers stay while it trains: by rule, before a run.

The rule: buffers that stay keep their recordings, and may have KEPT of the free memory. Where that is so little that
the completions of a batch need at least twice as many turns as they would in FREED of it, the buffers are made anew for
each batch and freed before its training: recording makes a turn about half as long again, and twice the turns are more.
"""

from dataclasses import dataclass

KEPT = 0.2
FREED = 0.7
MOST = 1024  # rows; beyond this a card is busy


@dataclass(frozen=True)
class Room:
    """Buffers for `rows` completions of `row_bytes` each; `stays` while the policy trains."""

    rows: int
    row_bytes: int
    stays: bool

    @property
    def kept(self) -> int:
        """Bytes that training has to do without."""
        return self.rows * self.row_bytes if self.stays else 0

    def __str__(self) -> str:
        size = f"{self.rows * self.row_bytes / 2**30:.2f} GiB"
        fate = "which stay while it trains" if self.stays else "freed while it trains"
        return f"{self.rows:,} completions at once in {size} of buffers, {fate}"


def choose(completions: int, row_bytes: int, free: int) -> Room:
    """Buffers for a batch of so many completions in `free` bytes of a card's memory."""
    staying, freed = (min(completions, fitting(row_bytes, free * share)) for share in (KEPT, FREED))
    stays = turns(completions, staying) < 2 * turns(completions, freed)
    return Room(staying if stays else freed, row_bytes, stays)


def fitting(row_bytes: int, room: float) -> int:
    """Rows that so many bytes hold: one at least, MOST at most."""
    return min(max(int(room / row_bytes), 1), MOST)


def turns(completions: int, rows: int) -> int:
    return -(-completions // rows)
