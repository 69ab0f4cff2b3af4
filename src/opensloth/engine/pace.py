"""How long a pack takes the card, and the host that launches its kernels: the rule by which passes are recorded.

The host needs as long for a small pack as for a large one. Fitted to what H200 were measured at (docs/performance.md),
whose speeds it tells within a fifth: models of 135M, 0.6B and 4B, launched one by one in packs of 4,096 to 33,792
tokens, and recorded in such of 4,096 (4B) or 8,192 (the others) and more. Smaller ones take longer than it says: SMALL
is left out where packs are there already, since it makes no other choice. It knows nothing of recomputed layers, of
bases in 4 bits, and of cards that compute in fp32; LEAST_FILLED limits what can be lost by that.
"""

from opensloth.engine.memory import Shape

LAUNCHING = 6e-3  # seconds of the host for a layer with adapters, forward and backward
OF_COMPLETIONS = 1.3  # times as long: packs in which prompts are shared gather their keys. 0.9 to 2 were measured
LATE = 0.25  # of that time the card waits though it has more to do: now and then the host is late
WEIGHT = 5.7e-15  # seconds of the card for each token and weight: 4 operations, 7e14 of them in a second
OUTPUT = 1.5e-11  # for each token and number that comes out of a layer's matmuls: all that is done with it besides
ADDING = 4e-12  # for each such number where a recording adds an adapter's share in fp32 (engine/matmul.py)
SMALL = 3.5e-4  # seconds of the card for a layer, however few tokens a pack has: its kernels follow each other
LEAST_FILLED = 0.75  # of the tokens of packs that are all filled up to one size must be real


def recorded(shape: Shape, tokens: float, slower: bool) -> float:
    """Seconds of a pack whose passes are recorded. `slower` says whether adapters' shares are added in fp32."""
    return of_card(shape, tokens) + slower * tokens * shape.layers * ADDING * shape.outputs


def launched(shape: Shape, tokens: float, work: float = 1.0) -> float:
    """Seconds of a pack whose kernels the host launches one by one: `work` times those of a pack of rows."""
    host = work * LAUNCHING * shape.layers
    return max(host, of_card(shape, tokens)) + LATE * host


def of_card(shape: Shape, tokens: float) -> float:
    return tokens * shape.layers * (WEIGHT * shape.layer + OUTPUT * shape.outputs)
