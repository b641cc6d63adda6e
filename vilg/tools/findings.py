"""What preflight found: rows for people, figures for machines, and the nodes to run without."""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from vilg.parallel.ranks import Ranks


@dataclass(frozen=True)
class Row:
    """One line of the report. slow: a node is far behind its peers; absent: this machine has no such part, no fault.
    again: bad now, but another start may find it mended (data that do not answer)."""

    check: str
    status: Literal["ok", "slow", "bad", "absent"]
    detail: str
    again: bool = False


@dataclass
class Report:
    """nodes: the node of every rank; figures: measure -> value of every rank; bad_nodes: those to run without."""

    rows: list[Row] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    figures: dict[str, list[float | None]] = field(default_factory=dict)
    bad_nodes: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, ranks: Ranks) -> "Report":
        """An empty report that knows the nodes; all ranks call it."""
        return cls(nodes=ranks.gather(node_name()))

    @property
    def node_names(self) -> list[str]:
        """Every node once, in the order of their first ranks."""
        return sorted(set(self.nodes), key=self.nodes.index)

    def is_first_of_its_node(self, rank: int) -> bool:
        """Whether the rank speaks for its node where one answer a node is enough."""
        return self.nodes.index(self.nodes[rank]) == rank

    def blame(self, *nodes: str) -> None:
        """Count nodes among those to run without."""
        self.bad_nodes = sorted({*self.bad_nodes, *nodes})

    def blame_few(self, nodes: Sequence[str]) -> None:
        """Blame nodes, unless they are most of all: what most nodes lack is a fault of the recipe or the cluster, and a
        job that leaves them out could never start again."""
        if 2 * len(set(nodes)) <= len(self.node_names):
            self.blame(*nodes)


def node_name() -> str:
    """SLURM's name of this node, which is what it can exclude; elsewhere the host's."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def by_node(different: dict[str, list[str]]) -> str:
    """`node2: torch 2.12 instead of 2.13; node3: ...` of what `peers.find_different` found."""
    return "; ".join(f"{node}: {', '.join(what)}" for node, what in different.items())
