"""States with the rank that the model is at work on there: a bounded sample of a corpus.

If the ranks settle one after another, the layers in (l_{i-1}, l_i] are those in which rank i is decided: they do task
i [Lioubashevski et al. 2024, "Looking beyond the top-1: transformers determine top tokens in order"].
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.trajectory.measure import Readout, Trajectory
from restpoint.trajectory.sampling import evenly_spaced
from restpoint.trajectory.saturation import saturation_layers, settles_early, top_tokens


def task_labels(layers: Int[Tensor, "tokens k"], depth: int) -> Int[Tensor, "depth tokens"]:
    """The task of every token's state at every layer: i in (l_{i-1}, l_i], and 0 where all k ranks have settled.

    The state at l_1 is the last of task 1. Where a rank settles before an earlier one, it never is the one at work:
    intervals end at the running maximum of l, so every state has one task.

    Args:
        layers: saturation layers of the first k ranks.
        depth: number of states, L + 1.
    """
    ends = layers.cummax(-1).values
    settled = (ends < torch.arange(depth, device=layers.device)[:, None, None]).sum(-1)
    return torch.where(settled < layers.shape[-1], settled + 1, 0)


@dataclass(frozen=True, eq=False)
class Examples:
    """States with their tasks.

    Attributes:
        states: as they are in the residual stream.
        tasks: 1 for the first rank.
        layers: where they were taken.
        texts: index of the text that they are from.
    """

    states: Float[Tensor, "count hidden"]
    tasks: Int[Tensor, " count"]
    layers: Int[Tensor, " count"]
    texts: Int[Tensor, " count"]

    def chosen(self, rows: Int[Tensor, " chosen"]) -> "Examples":
        """Some of them, in the order given."""
        return Examples(self.states[rows], self.tasks[rows], self.layers[rows], self.texts[rows])

    def joined(self, other: "Examples") -> "Examples":
        """These, and then those of another."""
        width = max(self.states.shape[1], other.states.shape[1])  # an empty one need not know it
        states = [part.states.reshape(len(part.states), width) for part in (self, other)]
        return Examples(
            torch.cat(states),
            torch.cat([self.tasks, other.tasks]),
            torch.cat([self.layers, other.layers]),
            torch.cat([self.texts, other.texts]),
        )


class TaskExamples:
    """A bounded sample of states, as many as ``capacity`` for each layer and task, whatever the corpus.

    Of all states of one layer and task, those are kept whose (text, token) has the smallest hash. So the sample is
    uniform, the same in every run, and two samples of two halves of a corpus merge to the sample of the whole.

    Args:
        readout: the logits that one layer's states give.
        tasks: how many are told apart; the states of later ones are left out.
        capacity: states kept for each layer and task.
        every: one text in so many is read: those whose index it divides.
        tokens: at most so many tokens of a text, evenly spaced; of these, those that settle early.

    Raises:
        RestpointError: an argument is out of its range.
    """

    def __init__(self, readout: Readout, tasks: int = 3, capacity: int = 64, every: int = 1, tokens: int = 64):
        limits = (("tasks", tasks, 2), ("capacity", capacity, 1), ("every", every, 1), ("tokens", tokens, 1))
        for argument, value, least in limits:
            if value < least:
                raise RestpointError(f"{argument} is {value}; give a whole number from {least} on")
        self.readout = readout
        self.tasks = tasks
        self.capacity = capacity
        self.every = every
        self.tokens = tokens
        self.hashes = torch.zeros(0, dtype=torch.int64)
        nothing = torch.zeros(0, dtype=torch.int64)
        self.held = Examples(torch.zeros(0, 0), nothing, nothing, nothing)

    @torch.no_grad()
    def add(self, trajectory: Trajectory) -> None:
        """Sample one text; the texts between those that are read are passed over."""
        if trajectory.index % self.every:
            return
        depth, length = trajectory.states.shape[:2]
        positions = evenly_spaced(length, self.tokens)
        top = top_tokens(trajectory.states[:, positions], self.readout, self.tasks)
        settled = saturation_layers(top)
        labels = torch.where(settles_early(settled, depth - 1), task_labels(settled, depth), 0).cpu()
        layers, columns = labels.nonzero(as_tuple=True)
        tasks, tokens = labels[layers, columns], positions[columns]
        texts = torch.full_like(tasks, trajectory.index)
        hashes = scattered((texts << 20) + tokens)
        # States are fetched for those that will stay only: late in a corpus, they are few.
        stratum = torch.cat([self._stratum(self.held.layers, self.held.tasks), self._stratum(layers, tasks)])
        kept = _smallest(torch.cat([self.hashes, hashes]), stratum, self.capacity) - len(self.hashes)
        new = kept[kept >= 0]
        states = trajectory.states[layers[new], tokens[new]].float().cpu()
        self._hold(hashes[new], Examples(states, tasks[new], layers[new], texts[new]))

    def merge(self, other: "TaskExamples") -> None:
        """Add what another one has seen.

        Raises:
            RestpointError: it has other settings, or is of a model of another width.
        """
        widths = {sample.held.states.shape[1] for sample in (self, other)} - {0}
        if (self.tasks, self.capacity) != (other.tasks, other.capacity) or len(widths) > 1:
            raise RestpointError(
                "other: it has other tasks, another capacity or width; merge samples of one model and settings"
            )
        self._hold(other.hashes, other.held)

    def balanced(self) -> Examples:
        """As many examples of each task at every layer: the smallest hashes of those that are held.

        Layers at which some task never occurs are left out, so that the layer says nothing about the task.

        Raises:
            RestpointError: there is no layer at which every task occurs.
        """
        stratum = self._stratum(self.held.layers, self.held.tasks)
        depth = 1 + max(self.held.layers.tolist(), default=0)
        fewest = torch.bincount(stratum, minlength=depth * self.tasks).view(depth, self.tasks).amin(-1)
        if not bool(fewest.any()):
            raise RestpointError(
                f"tasks is {self.tasks}, and no layer was seen doing each of them; read more texts or ask for fewer"
            )
        kept = _smallest(self.hashes, stratum, fewest[self.held.layers])
        return self.held.chosen(kept)

    def _hold(self, hashes: Tensor, added: Examples) -> None:
        """Keep the smallest hashes of what is held and what is added."""
        hashes, joined = torch.cat([self.hashes, hashes]), self.held.joined(added)
        kept = _smallest(hashes, self._stratum(joined.layers, joined.tasks), self.capacity)
        self.hashes, self.held = hashes[kept], joined.chosen(kept)

    def _stratum(self, layers: Tensor, tasks: Tensor) -> Tensor:
        return layers * self.tasks + tasks - 1


def _smallest(hashes: Tensor, stratum: Tensor, count: int | Tensor) -> Tensor:
    """Those among the ``count`` smallest hashes of their stratum, ordered by stratum and hash."""
    order = hashes.argsort()
    order = order[stratum[order].argsort(stable=True)]
    ordered = stratum[order]
    rank = torch.arange(len(order)) - torch.searchsorted(ordered, ordered)
    return order[rank < (count[order] if isinstance(count, Tensor) else count)]


def scattered(numbers: Int[Tensor, " count"]) -> Int[Tensor, " count"]:
    """A bijection of 64-bit numbers whose results look random (splitmix64): no two tokens share a hash."""
    numbers = numbers + -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        numbers = (numbers ^ _shifted(numbers, shift)) * factor
    return numbers ^ _shifted(numbers, 31)


def _shifted(numbers: Tensor, bits: int) -> Tensor:
    """To the right, as if without a sign."""
    return (numbers >> bits) & ((1 << (64 - bits)) - 1)
