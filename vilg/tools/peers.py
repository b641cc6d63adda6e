"""Which node is slower than its peers, from figures of all ranks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

WORSE_THAN = 0.10  # as a share of the peers' median
SIGMAS = 3.0
FEWEST_PEERS = 3  # of two that differ nobody can say which one is slow
_MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation per median absolute deviation


@dataclass(frozen=True)
class Slow:
    """A rank whose figure is far below that of its peers; both in the measure's unit."""

    measure: str
    node: str
    rank: int
    value: float
    peers: float

    def __str__(self) -> str:
        below = 100 * (1 - self.value / self.peers)
        return f"{self.node} (rank {self.rank}): {self.measure} {below:.0f}% below its peers"


def find_slow(measure: str, values: Sequence[float | None], nodes: Sequence[str]) -> list[Slow]:
    """The worst rank of every node that has one more than 10% and more than 3 sigma below its peers.

    values: by rank, larger is better; None where a rank has no such figure. Peers are the ranks of other nodes; in a
    job of one node, the other ranks. Sigma comes from the median absolute deviation: other slow ranks do not widen it.
    """
    worst: dict[str, Slow] = {}
    for rank, (value, node) in enumerate(zip(values, nodes, strict=True)):
        others = [(v, n) for r, (v, n) in enumerate(zip(values, nodes)) if r != rank and v is not None]
        peers = [v for v, n in others if n != node] or [v for v, _ in others]
        if value is None or len(peers) < FEWEST_PEERS:
            continue
        middle = median(peers)
        sigma = _MAD_TO_SIGMA * median(abs(peer - middle) for peer in peers)
        is_slow = value < (1 - WORSE_THAN) * middle and value < middle - SIGMAS * sigma
        if is_slow and (node not in worst or value < worst[node].value):
            worst[node] = Slow(measure, node, rank, value, middle)
    return list(worst.values())


def find_different(facts: Sequence[Mapping[str, str]], nodes: Sequence[str]) -> dict[str, list[str]]:
    """Nodes whose facts differ from those of most ranks (at a tie: of rank 0), and what differs."""
    counts = Counter(tuple(sorted(each.items())) for each in facts)
    usual = dict(max(counts, key=lambda each: (counts[each], each == tuple(sorted(facts[0].items())))))
    found: dict[str, list[str]] = {}
    for each, node in zip(facts, nodes, strict=True):
        for key in sorted(each.keys() | usual.keys()):
            if each.get(key) != usual.get(key):
                text = f"{key} {each.get(key, 'missing')} instead of {usual.get(key, 'none')}"
                if text not in found.setdefault(node, []):
                    found[node].append(text)
    return found
