"""The flow network of what may be drafted and what is picked of it."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from restpoint.transport.siblings import Drawing

_UNITS = 2**30  # probability 1 in the integers of the flow network; scipy takes 32 bits


@dataclass(frozen=True, eq=False)
class Network:
    """Sets of at most n of m tokens, and edges from what may be drafted to the tokens that it holds.

    A row is a set with a flag: whether the draft after these tokens was elsewhere. Column m is "elsewhere".
    """

    drawn: Drawing
    count: int
    members: list[Int[np.ndarray, "_ _"]]  # by size: the tokens of each set
    smaller: list[Int[np.ndarray, "_ _"]]  # by size: for each token, the set of one size less without it
    holds: list[Bool[np.ndarray, "_ _"]]  # by size: whether each set holds each token
    row: dict[tuple[tuple[int, ...], bool], int]
    elsewhere: Bool[np.ndarray, " rows"]
    indices: Int[np.ndarray, " edges"]
    indptr: Int[np.ndarray, " starts"]
    edges: int  # from rows to tokens, in the middle of the list of edges

    def likely(self, drafted: Float[np.ndarray, " tokens"], outside: float) -> Float[np.ndarray, " rows"]:
        """The probability of each row, from q of the tokens and of everything elsewhere."""
        once = [np.zeros(len(sets)) for sets in self.members]  # exactly this set drawn so far
        once[0][0] = 1.0
        flagged = [np.zeros(len(sets)) for sets in self.members[:-1]]
        rest = [outside + ~held @ drafted for held in self.holds]
        for _ in range(self.count):
            after = [np.zeros_like(mass) for mass in once]
            for size, mass in enumerate(once):
                if self.drawn == "independent":
                    total, again = 1.0, self.holds[size] @ drafted
                    after[size] += mass * again
                else:
                    total = np.maximum(rest[size], np.finfo(float).tiny)
                if size < self.count:
                    flagged[size] += mass * outside / total
                    sent = mass / total
                    new, fewer = self.members[size + 1], self.smaller[size + 1]
                    after[size + 1] += (sent[fewer] * drafted[new]).sum(1)
            once = after
        plain = once[1:] if self.drawn == "independent" else once[-1:]
        return np.concatenate([*flagged, *plain])

    def solve(
        self, likely: Float[np.ndarray, " rows"], wanted: Float[np.ndarray, " columns"]
    ) -> Float[np.ndarray, "rows columns"]:
        """The probability of picking each column in each row, so that column y is picked at most ``wanted`` often."""
        count, columns = len(likely), len(wanted)
        units = np.floor(np.concatenate([likely, wanted]).clip(0, 1) * _UNITS).astype(np.int32)
        between = np.full(self.edges, _UNITS, np.int32)
        capacity = np.concatenate([units[:count], between, units[count:]])
        size = count + columns + 2
        graph = csr_array((capacity, self.indices, self.indptr), shape=(size, size))
        flow = maximum_flow(graph, 0, size - 1).flow.tocoo()
        row, column = flow.row - 1, flow.col - 1 - count
        real = (flow.data > 0) & (row >= 0) & (row < count) & (column >= 0) & (column < columns)
        rule = np.zeros((count, columns))
        rule[row[real], column[real]] = flow.data[real] / units[row[real]]
        return rule


@functools.lru_cache(maxsize=16)
def network_of(tokens: int, count: int, drawn: Drawing) -> Network:
    """The network of so many tokens and drafts; what depends on p and q is filled in later."""
    members, smaller, holds = [], [], []
    before: dict[tuple[int, ...], int] = {}
    for size in range(count + 1):
        sets = list(itertools.combinations(range(tokens), size))
        members.append(np.array(sets, dtype=int).reshape(len(sets), size))
        without_one = [[before[chosen[:i] + chosen[i + 1 :]] for i in range(size)] for chosen in sets]
        smaller.append(np.array(without_one, dtype=int).reshape(len(sets), size))
        held = np.zeros((len(sets), tokens), dtype=bool)
        np.put_along_axis(held, members[-1], True, axis=1)
        holds.append(held)
        before = {chosen: index for index, chosen in enumerate(sets)}
    plain = range(1, count + 1) if drawn == "independent" else range(count, count + 1)
    names = [(tuple(chosen), True) for sets in members[:-1] for chosen in sets.tolist()]
    names += [(tuple(chosen), False) for size in plain for chosen in members[size].tolist()]
    first = 1 + len(names)
    targets = [[*(first + token for token in chosen), *([first + tokens] if flag else [])] for chosen, flag in names]
    sink = first + tokens + 1
    lines = [list(range(1, first)), *targets, *([sink] for _ in range(tokens + 1)), []]
    return Network(
        drawn=drawn,
        count=count,
        members=members,
        smaller=smaller,
        holds=holds,
        row={name: index for index, name in enumerate(names)},
        elsewhere=np.array([flag for _, flag in names]),
        indices=np.array([column for line in lines for column in line], dtype=np.int32),
        indptr=np.cumsum([0, *(len(line) for line in lines)]).astype(np.int32),
        edges=sum(len(line) for line in targets),
    )
