"""Saturation: the layer from which a rank of the next-token distribution holds its token for good.

Read the logits of every layer through the model's own final norm and unembedding and rank the tokens. Rank i is
saturated at layer l_i when the token at that very rank is, from h_{l_i} on, the one that h_L has there. Transformers
tend to settle their ranks in order, l_1 < l_2 < .. < l_k: first the top token, then the second, and so on.

Paper:
    Lioubashevski, Schlank, Stanovsky, Goldstein 2024, "Looking beyond the top-1: transformers determine top tokens in
    order".
"""

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.trajectory.measure import Measure, Readout, Trajectory
from restpoint.trajectory.sampling import evenly_spaced

_LATEST = 0.85
_FEWEST = 3
_SEED = 0x5A7


def top_tokens(states: Float[Tensor, "depth tokens hidden"], readout: Readout, k: int) -> Int[Tensor, "depth tokens k"]:
    """The k most probable tokens at every layer, in order; one layer's logits are held at a time.

    Raises:
        RestpointError: k is below 1 or larger than the vocabulary.
    """
    found = []
    for state in states:
        logits = readout(state)
        if not 1 <= k <= logits.shape[-1]:
            raise RestpointError(f"k is {k} and the vocabulary has {logits.shape[-1]} tokens; give 1 up to that many")
        found.append(logits.topk(k, dim=-1).indices)
    return torch.stack(found)


def saturation_layers(top: Int[Tensor, "depth tokens k"]) -> Int[Tensor, "tokens k"]:
    """The first layer from which each rank holds the last layer's token; 0 for a rank that never mismatches.

    A rank that comes to its token with the last layer only has L.
    """
    matches = (top == top[-1]).int()
    return top.shape[0] - matches.flip(0).cumprod(0).sum(0)


def settles_early(layers: Int[Tensor, "tokens k"], last: int) -> Bool[Tensor, " tokens"]:
    """Whether the top token saturates in the first 85 percent: l_1 <= floor(0.85 L).

    Later than that, too few layers are left to see in what order the other ranks settle.
    """
    return layers[:, 0] <= int(_LATEST * last + 1e-9)  # 0.85 is not exact, and 0.85 x 20 is to be 17


def ranks_in_play(layers: Int[Tensor, "tokens k"], last: int) -> Int[Tensor, " tokens"]:
    """How many ranks m are left of each token when trailing ones that saturate with the last layer only are dropped.

    They are those whose order cannot be seen: the model ended before they settled.
    """
    return layers.shape[-1] - (layers == last).int().flip(-1).cumprod(-1).sum(-1)


def strict_tau(layers: Int[Tensor, "tokens k"], count: Int[Tensor, " tokens"]) -> Float64[Tensor, " tokens"]:
    """Kendall's tau of (l_1 .. l_m) against (1 .. m), with ties discordant: (C - D) / pairs.

    C counts the pairs i < j with l_i < l_j, D all the others, so 1 says that the ranks settle strictly one after
    another, and ranks that settle together speak against an order. It is SciPy's tau where there are no ties.

    Args:
        layers: saturation layers.
        count: for each token, how many of its ranks take part, m; with fewer than two of them tau is NaN.
    """
    pairs = _Pairs(layers, count)
    return pairs.tau(pairs.rising.sum(-1))


def permuted_tau(
    layers: Int[Tensor, "tokens k"],
    count: Int[Tensor, " tokens"],
    permutations: int,
    generator: torch.Generator,
) -> Float64[Tensor, "permutations tokens"]:
    """`strict_tau` against random permutations of (1 .. m), drawn for every token and permutation independently."""
    pairs = _Pairs(layers, count)
    keys = torch.rand(permutations, *layers.shape, dtype=torch.float64, generator=generator).to(layers.device)
    concordant = torch.zeros(permutations, layers.shape[0], dtype=torch.int64, device=layers.device)
    for pair, (i, j) in enumerate(zip(*pairs.ranks, strict=True)):  # k (k - 1) / 2 of them, each over all tokens
        concordant += torch.where(keys[..., i] < keys[..., j], pairs.rising[:, pair], pairs.falling[:, pair])
    return pairs.tau(concordant)


class _Pairs:
    """The pairs of ranks i < j that are in play, for every token."""

    def __init__(self, layers: Tensor, count: Tensor):
        self.ranks = torch.triu_indices(layers.shape[-1], layers.shape[-1], 1, device=layers.device)
        i, j = self.ranks
        present = j < count[:, None]
        self.rising = present & (layers[:, i] < layers[:, j])
        self.falling = present & (layers[:, i] > layers[:, j])
        self.count = present.sum(-1)

    def tau(self, concordant: Tensor) -> Tensor:
        return 2 * concordant.double() / self.count.double() - 1  # 0 / 0 where there is no pair


class Saturation(Measure):
    """When the first k ranks settle, and whether in order.

    Results:
        "layer.mean" (k,): mean saturation layer of each rank, over all tokens read.
        "layer.histogram" (k, depth): how many tokens saturate at each layer.
        "tokens": how many were read.
        "share.early": of them, those with l_1 <= floor(0.85 L).
        "share.ranked": of them, those that are early and have m >= 3 ranks in play. What follows is about these.
        "share.ordered": of these, those whose ranks settle strictly one after another, tau = 1.
        "tau": mean `strict_tau`; NaN where there are no such tokens.
        "tau.null" (permutations,): the mean over the same tokens under each permutation of the labels. Its mean is
            below 0 as soon as ranks settle together, since ties are discordant under every labelling.
        "tau.p": (1 + those of the null at or above tau) / (1 + permutations).

    The permutations of a text's tokens are drawn from the text's index, so the null adds up over parts of a corpus
    exactly like everything else.

    Args:
        readout: the logits that one layer's states give; the lens.
        k: number of ranks.
        every: one text in so many is read: those whose index it divides.
        tokens: at most so many tokens of a text, evenly spaced.
        permutations: of the labels.
        last: the state that counts as the last, where what follows is read from it alone: s_r, before a coda.

    Raises:
        RestpointError: an argument is out of its range.
    """

    name: ClassVar[str] = "saturation"
    papers: ClassVar[tuple[str, ...]] = (
        "Lioubashevski, Schlank, Stanovsky, Goldstein 2024, Looking beyond the top-1: transformers determine top "
        "tokens in order",
    )

    def __init__(
        self,
        readout: Readout,
        k: int = 5,
        every: int = 1,
        tokens: int = 64,
        permutations: int = 1000,
        last: int | None = None,
    ):
        super().__init__()
        for argument, value in (("k", k), ("every", every), ("tokens", tokens), ("permutations", permutations)):
            if value < 1:
                raise RestpointError(f"{argument} is {value}; give a whole number from 1 on")
        self.readout = readout
        self.k = k
        self.every = every
        self.tokens = tokens
        self.permutations = permutations
        self.last = last

    @torch.no_grad()
    def add(self, trajectory: Trajectory) -> None:
        """Read one text; the texts between the sampled ones are passed over."""
        if trajectory.index % self.every:
            return
        states = trajectory.read[:, evenly_spaced(trajectory.states.shape[1], self.tokens)]
        decided = states if self.last is None else states[: self.last + 1]
        self.observe(saturation_layers(top_tokens(decided, self.readout, self.k)), len(states), trajectory.index)

    def observe(self, layers: Int[Tensor, "tokens k"], depth: int, index: int) -> None:
        """Add tokens whose saturation layers are known."""
        last = depth - 1 if self.last is None else self.last
        early = settles_early(layers, last)
        count = ranks_in_play(layers, last)
        ranked = early & (count >= _FEWEST)
        taus = strict_tau(layers[ranked], count[ranked])
        generator = torch.Generator().manual_seed(_SEED + index)
        null = permuted_tau(layers[ranked], count[ranked], self.permutations, generator)
        self._add("histogram", torch.nn.functional.one_hot(layers, depth).sum(0))
        self._add("tokens", torch.tensor(len(layers)))
        self._add("early", early.sum())
        self._add("ranked", ranked.sum())
        self._add("ordered", (taus == 1).sum())
        self._add("tau", taus.sum())
        self._add("null", null.sum(-1))

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        """As the class says; nothing where no text was read."""
        if not self.sums:
            return {}
        histogram = self.sums["histogram"].double()
        tokens, ranked = self.sums["tokens"].double(), self.sums["ranked"].double()
        tau, null = self.sums["tau"] / ranked, self.sums["null"] / ranked
        # Both are sums of fractions: equal ones may differ by their rounding.
        reached = (null >= tau - 1e-12).sum().double()
        return {
            "layer.mean": histogram @ torch.arange(histogram.shape[-1], dtype=torch.float64) / tokens,
            "layer.histogram": histogram,
            "tokens": tokens,
            "share.early": self.sums["early"] / tokens,
            "share.ranked": ranked / tokens,
            "share.ordered": self.sums["ordered"] / ranked,
            "tau": tau,
            "tau.null": null,
            "tau.p": torch.where(ranked > 0, (1 + reached) / (1 + len(null)), torch.nan),
        }
