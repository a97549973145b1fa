"""The coupling of drafted siblings with a target that accepts most often, and how often that is.

Let Y be picked from the drafts by any rule, with law x; accepting the pick with probability min(1, p/x) and else
drawing from norm((p - x)_+) gives exactly p and accepts sum min(p, x). So a rule may be computed with any tolerance:
only optimality depends on it, never the law of Y.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.transport.couplings import SiblingCoupling, rows
from restpoint.transport.network import network_of
from restpoint.transport.siblings import Drawing, check_count, check_drafts, require_several, without
from restpoint.transport.variation import residual


@dataclass(frozen=True)
class OptimalTransport(SiblingCoupling):
    """The coupling with the largest P(Y in drafts) = min over sets H of p(H) + 1 - P(all drafts in H).

    The rule that picks Y from the drafts is a maximum flow: from each set of drafts, as much as it is likely, to its
    tokens, each taking at most p. The network holds the ``support`` tokens that matter most, the same for all drafts.
    A sequence of drafts is read up to its first one outside the network, which is picked where no other is; if the
    pick fails, the drafts not yet read face what is left of p in the same way. With all of q's tokens in the support
    this is the optimum, short of it by less than 10^-9 for each set of the network (its integers); the law of Y is p in
    any case. Where q spreads over many more tokens than the support, it accepts about as often as
    :class:`~restpoint.transport.couplings.RecursiveRejection`, which then is the better choice.

    Use it for peaked laws, where a few milliseconds for each position with several drawn siblings are little beside a
    pass of the model. With one sibling drawn at random and the others chosen without chance, :class:`MaximalCoupling`
    already is optimal. :meth:`kernel` waits for the device, and solves the network on the host.

    Attributes:
        drawn: "without replacement" or "independent".
        support: tokens in the network; its sets number about support^n / n!.

    Raises:
        RestpointError: ``drawn`` is "one" or ``support`` is below 1.

    Paper:
        Sun et al. 2023, "SpecTr: Fast Speculative Decoding via Optimal Transport" (the transport problem); Hu et al.
        2025, "Towards Optimal Multi-Draft Speculative Decoding" (the dual); Thomas, Pal 2025, "Global Resolution:
        Optimal Multi-Draft Speculative Sampling via Convex Minimization" (the flow).
    """

    name: str = field(default="optimal", init=False)
    drawn: Drawing = "without replacement"
    support: int = 12

    def __post_init__(self) -> None:
        require_several(self.drawn)
        if self.support < 1:
            raise RestpointError(f"support={self.support} leaves no token to transport: give at least 1")

    def kernel(
        self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], drafts: Sequence[int]
    ) -> Float[Tensor, " vocab"]:
        p, q = rows(p, q)
        check_drafts(drafts, p.shape[0], self.drawn)
        law, reached = torch.zeros_like(p), 1.0
        while True:
            read, picks, kept = self._pick(p, q, drafts)
            for token, probability in picks.items():
                law[token] += reached * probability
            reached *= max(0.0, 1 - sum(picks.values()))
            p = residual(p, kept)
            if len(read) == len(drafts):
                return law + reached * p
            drafts = drafts[len(read) :]
            if self.drawn == "without replacement":
                q = without(q, read)

    def acceptance(self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], count: int) -> float:
        """The optimum over all couplings, on the whole vocabulary, by the dual: what a full support attains.

        The minimum over all 2^vocab sets is found among the vocab + 1 sets of tokens with the smallest p/q, as
        :func:`all_within` shows. Independent drafts cost one sort; without replacement about 10 microseconds for each
        token of positive q.
        """
        check_count(count, self.drawn)
        p, q = (law.cpu() for law in rows(p, q))
        ratio = torch.where(q > 0, p / q, torch.inf)
        order = ratio.argsort()
        inside = all_within(q[order], count, self.drawn)
        wanted = torch.cat([torch.zeros_like(p[:1]), p[order].cumsum(0)])
        return min(1.0, max(0.0, float((wanted + 1 - inside).min())))

    def _pick(
        self, p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], drafts: Sequence[int]
    ) -> tuple[Sequence[int], dict[int, float], Float[Tensor, " vocab"]]:
        """Drafts read, probability with which each is picked and accepted, and the same averaged over drafts (<= p)."""
        # Relevant is what is drafted often, more so if it can be accepted.
        chosen = torch.topk(q + torch.minimum(p, q), min(self.support, p.shape[0])).indices
        elsewhere = torch.ones_like(q).index_fill_(0, chosen, 0.0)
        other_q = q * elsewhere
        share = other_q / other_q.sum().clamp_min(torch.finfo(q.dtype).tiny)
        packed = torch.stack([chosen.double(), p[chosen], q[chosen]])
        tokens, wanted, drafted = packed.cpu().numpy()
        tokens = tokens.astype(int).tolist()
        outside = float(other_q.sum())

        network = network_of(len(tokens), len(drafts), self.drawn)
        likely = network.likely(drafted, outside)
        # What the support cannot take is picked elsewhere.
        rule = network.solve(likely, np.append(wanted, 0.0))
        rule[network.elsewhere, -1] = (1 - rule[network.elsewhere].sum(1)).clip(0)
        law = torch.from_numpy(likely @ rule).to(p.device)
        picked = (law[-1] * share).index_copy_(0, chosen, law[:-1])
        kept = torch.minimum(picked, p)

        place = {token: index for index, token in enumerate(tokens)}
        end = next((index for index, token in enumerate(drafts) if token not in place), None)
        read = drafts if end is None else drafts[: end + 1]
        inside = sorted({place[token] for token in read if token in place})
        row = rule[network.row[tuple(inside), end is not None]]
        candidates = [(tokens[index], float(row[index])) for index in inside]
        if end is not None:
            candidates.append((drafts[end], float(row[-1])))
        ids = torch.tensor([token for token, _ in candidates], device=p.device)
        accepted = (kept[ids] / picked[ids].clamp_min(torch.finfo(p.dtype).tiny)).clamp_max(1.0).tolist()
        return read, {token: chance * a for (token, chance), a in zip(candidates, accepted, strict=True)}, kept


def all_within(q: Float[Tensor, " vocab"], count: int, drawn: Drawing) -> Float[Tensor, "vocab+1"]:
    """F(H) = P(all drafts in H) for H = the first 0, 1, .. vocab tokens of q.

    Independent drafts: F = q(H)^n. Without replacement give token i a clock that rings at rate q_i: drafts are the
    tokens in the order in which they first ring, and F is the chance that n tokens of H ring before any other does,
    the integral over t of (1 - q(H)) exp(-(1 - q(H)) t) P(n tokens of H have rung by t). The trapezoidal rule in log t
    integrates that to about 10^-13. If q has fewer tokens than ``count``, all of them are drafted.

    Why these sets are enough for min over H of p(H) - F(H), if tokens are sorted by p/q:

    * Independent. q -> -q^n is concave, so the minimum of p(H) - q(H)^n over the convex hull of all points (p(H),
      q(H)) is at a corner of the hull, and its lower corners are the sets with the smallest p/q.
    * Without replacement. Claim, for x, y outside H:  [F(H+x) - F(H)]/q_x <= [F(H+x+y) - F(H+x)]/q_y.  Given it, let H
      be optimal, y in H, x not in H: taking y out or x in gains nothing, so p_y <= F(H) - F(H-y) and F(H+x) - F(H) <=
      p_x, and the claim for H-y, first y then x, gives p_y/q_y <= p_x/q_x: H is sorted.
      Proof of the claim. F(H+x) - F(H) is the chance of A_x: x is drawn, the other n-1 are in H. F(H+x+y) - F(H+x) is
      the chance of A_y (y drawn, others in H) or B (x and y drawn, others in H). So to show: P(A_x) q_y/q_x - P(A_y)
      <= P(B). If q_x <= q_y: P(A_x)/q_x is a sum over orders of products of 1/(1 - mass drawn before), which grows
      with q_x, so the left side is not positive. If q_x > q_y: let x ring when the earlier of two clocks does, x' of
      rate q_y and x'' of rate q_x - q_y. P(A_x) q_y/q_x is the chance of A_x with x' before x''. Exchange the clocks x'
      and y, which have one rate. That event becomes: y rings before x'', and until n of H+y have rung, neither x' nor
      anything outside H+x+y has. If x'' has not rung by then either, A_y holds; if it has, x and y are both among the
      first n and the others in H, so B holds.

    Args:
        q: the law of the first draft, sum 1; the order of its tokens says which sets are meant.
        count: number of drafts n.
        drawn: how they are drawn.

    Returns:
        F in float64 on the CPU.

    Paper:
        Hu et al. 2025, "Towards Optimal Multi-Draft Speculative Decoding".
    """
    law = q.double().cpu()
    mass = torch.cat([torch.zeros_like(law[:1]), law.cumsum(0)])
    positive = int((law > 0).sum())
    count = min(count, positive) if drawn == "without replacement" else count
    if drawn != "without replacement" or count == 1:
        return (mass / mass[-1]).clamp(0, 1) ** count
    # Complements summed from the far end keep their digits where H is nearly everything.
    outside = torch.cat([law.flip(0).cumsum(0).flip(0), torch.zeros_like(law[:1])]).tolist()
    step = 0.25
    times = np.exp(np.arange(-24, 42, step))
    rung = np.zeros(
        (count + 1, times.size)
    )  # by each time, how many tokens of H have rung; the last row: count or more
    rung[0] = 1.0
    inside = [0.0]
    seen = 0
    for rate, rest in zip(law.tolist(), outside[1:], strict=True):
        if rate > 0:
            seen += 1
            quiet = np.exp(-rate * times)
            rings = -np.expm1(-rate * times)
            moved = rung[:-1] * rings
            rung[:-1] *= quiet
            rung[1:] += moved
        if seen == positive:
            inside.append(1.0)
        elif seen < count:
            inside.append(0.0)
        else:
            inside.append(float(step * (rest * times * np.exp(-rest * times) * rung[-1]).sum()))
    return torch.tensor(inside, dtype=torch.float64).clamp_(0, 1)


def greedy_and_one(p: Float[Tensor, " vocab"], q: Float[Tensor, " vocab"], chosen: Sequence[int]) -> float:
    """P(Y in drafts) = p(D) + sum over x not in D of min(p(x), q'(x)), q' = norm(q outside D): D chosen, one drawn.

    The siblings are a set D chosen without chance and one token X ~ q'. :class:`MaximalCoupling` of p and q' is
    exact, and as q'(D) = 0 it yields a token of D, always by its residual, with probability p(D): there the tree goes
    on for free. No coupling does better: H = D and {x: p(x) < q'(x)} in the dual bounds them all by p(H) + 1 - P(all
    drafts in H) = p(D) + p(H - D) + 1 - q'(H - D) = p(D) + sum over x not in D of min(p(x), q'(x)).

    Raises:
        RestpointError: p and q are not two rows of one vocabulary.

    Paper:
        Hu et al. 2025, "Towards Optimal Multi-Draft Speculative Decoding".
    """
    p, q = rows(p, q)
    rest = without(q, chosen)
    free = p[torch.tensor(list(chosen), dtype=torch.long, device=p.device)].sum()
    return float(free + torch.minimum(p, rest).sum())
