"""Transport between next-token laws when moving mass between tokens costs the distance of their embeddings.

Total variation counts every change of token alike. Under the ground cost |e_i - e_j| a change to a near synonym is
cheap, so the cost says how far a law still is from another in meaning, in units of the embeddings.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from restpoint.errors import RestpointError


@dataclass(frozen=True, eq=False)
class TokenTransport:
    """The outcome of `token_transport`, one entry per pair of laws.

    Attributes:
        lower: never above the cost.
        upper: never below it. The two meet where ``covered`` is 1.
        moved: TV(p, q), the mass that must change its token.
        covered: share of it that both leaves and enters tokens treated one by one; 1 where nothing moves.
    """

    lower: Float64[Tensor, "*batch"]
    upper: Float64[Tensor, "*batch"]
    moved: Float64[Tensor, "*batch"]
    covered: Float64[Tensor, "*batch"]


@torch.no_grad()
def token_transport(
    p: Float[Tensor, "*batch vocab"],
    q: Float[Tensor, "*batch vocab"],
    embeddings: Float[Tensor, "tokens dim"],
    *,
    support: int = 32,
    nearest: Float[Tensor, " vocab"] | None = None,
) -> TokenTransport:
    """Bounds on W1(p, q) = min over couplings of E |e_X - e_Y|, X ~ p, Y ~ q, exact on the tokens that matter most.

    The cost obeys the triangle inequality, so what p and q share can stay where it is: W1(p, q) is the cost from the
    excess m = (p - q)_+ to the lack n = (q - p)_+. The ``support`` largest entries of each are kept as they are; the
    rest of each becomes one lump, M and N. Write m~, n~ for the measures with lumps. Their linear programme, at most
    (support + 1) x (support + 1), is solved exactly, once for each bound.

    **Upper.** Let a lump's cost be c(i, N) = sqrt(E |e_i - e_Y|^2) with Y drawn from the rest of n, likewise c(M, j)
    and c(M, N) with X and Y drawn independently. Any coupling of m~ and n~ becomes one of m and n by spreading what
    touches a lump in proportion to the rest, independently at both ends. It costs E |e_i - e_Y| there, and by Jensen's
    inequality that is at most c. So the least cost under c is at least W1. The second moments need no distance to any
    single token of the rest.

    **Lower.** Let a lump's cost be d(i, N) = r_i, d(M, j) = r_j, where r_i is at most the distance of token i to any
    other, and d(M, N) the smallest r. Any coupling of m and n becomes one of m~ and n~ by adding up over the rest,
    and every entry costs at least d, since m and n share no token. So the least cost under d is at most W1. Also, by
    Jensen's inequality, |E e_X - E e_Y| <= E |e_X - e_Y| for every coupling; the larger of the two is returned.

    Without a rest both programmes are the exact one. The mean of the embeddings is of no matter.

    Args:
        p: laws over the vocabulary.
        q: laws over the same vocabulary.
        embeddings: one row for each token, of the embedding or the unembedding.
        support: tokens kept on each side, k.
        nearest: r, from `nearest_distances`; 0 if left out, which makes the lower bound lower.

    Returns:
        Bounds in units of the embeddings, up to the rounding of their dtype.

    Raises:
        RestpointError: a row is no distribution, the embeddings have another vocabulary, or the support is below 1.

    Paper:
        Villani 2009, "Optimal Transport: Old and New", chapters 4 and 6.
    """
    batch, vocabulary = p.shape[:-1], p.shape[-1]
    if support < 1:
        raise RestpointError(f"support is {support}; keep at least one token on each side")
    if embeddings.shape[0] != vocabulary:
        raise RestpointError(
            f"embeddings: they hold {embeddings.shape[0]} tokens and p {vocabulary}; pass those of p's vocabulary"
        )
    p, q = _law("p", p), _law("q", q)
    apart = (p - q).reshape(-1, vocabulary)
    moved = apart.abs().sum(-1) / 2
    squares = embeddings.square().sum(-1)
    leaving = _Side.of(apart.clamp_min(0), embeddings, squares, support)
    entering = _Side.of((-apart).clamp_min_(0), embeddings, squares, support)

    upper_cost = _join(
        torch.cdist(leaving.points, entering.points, compute_mode="donot_use_mm_for_euclid_dist"),
        _to_lump(leaving.points, entering),
        _to_lump(entering.points, leaving),
        ((leaving.centre - entering.centre).square().sum(-1) + leaving.variance + entering.variance).sqrt(),
    )
    lower_cost = upper_cost.clone()
    radius = torch.zeros(vocabulary, dtype=torch.float64, device=p.device) if nearest is None else nearest.double()
    lower_cost[:, :-1, -1] = radius[leaving.tokens]
    lower_cost[:, -1, :-1] = radius[entering.tokens]
    lower_cost[:, -1, -1] = radius.min()

    means = (leaving.mean - entering.mean).norm(dim=-1)
    masses = leaving.masses.cpu().numpy(), entering.masses.cpu().numpy()
    upper = least_costs(*masses, upper_cost.cpu().numpy()).to(p.device)
    lower = torch.maximum(least_costs(*masses, lower_cost.cpu().numpy()).to(p.device), means)
    rest = torch.maximum(leaving.masses[:, -1], entering.masses[:, -1])
    covered = torch.where(moved > 0, 1 - rest / moved, 1.0)
    return TokenTransport(
        lower=torch.minimum(lower, upper).reshape(batch),  # they may cross by rounding where they meet
        upper=upper.reshape(batch),
        moved=moved.reshape(batch),
        covered=covered.reshape(batch),
    )


@torch.no_grad()
def top_transport(
    log_p: Float[Tensor, "rows vocab"],
    log_q: Float[Tensor, "rows vocab"],
    embeddings: Float[Tensor, "vocab dim"],
    support: int,
) -> Float64[Tensor, " rows"]:
    """W1 between two laws on their own most probable tokens, scaled to sum to one, in units of the embeddings.

    Exact for the laws so cut down; `token_transport` bounds the cost between the whole ones, for several times the
    work.
    """
    kept = min(support, log_p.shape[-1])
    (tops, tokens), (others, other_tokens) = log_p.topk(kept, -1), log_q.topk(kept, -1)
    apart = torch.cdist(
        embeddings[tokens].float(), embeddings[other_tokens].float(), compute_mode="donot_use_mm_for_euclid_dist"
    )
    leaving, entering = (side.double().softmax(-1).cpu().numpy() for side in (tops, others))
    return least_costs(leaving, entering, apart.double().cpu().numpy()).to(log_p.device)


@torch.no_grad()
def nearest_distances(embeddings: Float[Tensor, "vocab dim"], block: int = 1024) -> Float64[Tensor, " vocab"]:
    """r_i = min over j != i of |e_i - e_j|, lowered by what rounding may have added; 0 for tokens that coincide.

    It takes vocab^2 dim multiplications, once for a model; rows are taken in blocks.

    Args:
        embeddings: one row for each token.
        block: rows whose distances to all others are held at once.

    Raises:
        RestpointError: there are fewer than two tokens, or a block is below one row.
    """
    vocabulary, dim = embeddings.shape
    if vocabulary < 2:
        raise RestpointError(f"embeddings: there are {vocabulary} tokens; a distance takes two")
    if block < 1:
        raise RestpointError(f"block is {block}; take at least one row at once")
    centred = embeddings if embeddings.dtype == torch.float64 else embeddings.float()
    centred = centred - centred.mean(0)
    squares = centred.square().sum(-1)
    # |x|^2 + |y|^2 - 2 <x, y> is off by at most about (dim + 4) units of rounding of the squares.
    slack = 2 * (dim + 4) * torch.finfo(centred.dtype).eps * (squares + squares.max())
    least = []
    for start in range(0, vocabulary, block):
        rows = slice(start, start + block)
        distances = (squares - 2 * (centred[rows] @ centred.T)).add_(squares[rows, None])
        own = torch.arange(len(distances), device=embeddings.device)
        distances[own, own + start] = torch.inf
        least.append(distances.amin(-1))
    return (torch.cat(least) - slack).clamp_min(0).double().sqrt()


@dataclass(frozen=True, eq=False)
class _Side:
    """What leaves, or what enters: the largest masses one by one, and the rest as a lump."""

    tokens: Int[Tensor, "laws kept"]
    points: Float64[Tensor, "laws kept dim"]
    masses: Float64[Tensor, "laws kept_and_rest"]
    centre: Float64[Tensor, "laws dim"]
    """Mean of the rest."""
    variance: Float64[Tensor, " laws"]
    """Mean squared distance of the rest from its centre."""
    mean: Float64[Tensor, "laws dim"]
    """Sum of mass times embedding over everything."""

    @classmethod
    def of(cls, mass: Tensor, embeddings: Tensor, squares: Tensor, support: int) -> "_Side":
        kept, tokens = mass.topk(min(support, mass.shape[-1]), dim=-1)
        rest = mass.scatter(-1, tokens, 0.0)
        lump = rest.sum(-1)
        shares = (rest / lump.clamp_min(torch.finfo(torch.float64).tiny)[:, None]).to(embeddings.dtype)
        centre = (shares @ embeddings).double()
        variance = ((shares @ squares).double() - centre.square().sum(-1)).clamp_min(0)
        points = embeddings[tokens].double()
        mean = (kept.unsqueeze(-2) @ points).squeeze(-2) + lump[:, None] * centre
        return cls(tokens, points, torch.cat([kept, lump[:, None]], -1), centre, variance, mean)


def _to_lump(points: Float64[Tensor, "laws kept dim"], side: _Side) -> Float64[Tensor, "laws kept"]:
    return ((points - side.centre.unsqueeze(-2)).square().sum(-1) + side.variance[:, None]).sqrt()


def _join(inner: Tensor, right: Tensor, below: Tensor, corner: Tensor) -> Tensor:
    top = torch.cat([inner, right.unsqueeze(-1)], -1)
    bottom = torch.cat([below, corner.unsqueeze(-1)], -1)
    return torch.cat([top, bottom.unsqueeze(-2)], -2)


def least_costs(leaving: np.ndarray, entering: np.ndarray, cost: np.ndarray) -> Float64[Tensor, " laws"]:
    """The least cost of carrying each row's masses into the others', by that row's costs; 0 where there is no mass.

    Both sides of a row must sum to the same, up to rounding. On the CPU, one small linear programme after another.
    """
    import ot  # takes over a second: only those who solve programmes wait for it

    values = np.zeros(len(cost))
    for row, (source, target) in enumerate(zip(leaving, entering, strict=True)):
        some, other = source > 0, target > 0
        total = source.sum()
        if not (some.any() and other.any()):
            continue
        # Of sum 1: the solver's tolerances are absolute.
        share, wanted = source[some] / total, target[other] / target.sum()
        values[row] = total * ot.emd2(share, wanted, np.ascontiguousarray(cost[row][np.ix_(some, other)]))
    return torch.from_numpy(values)


def _law(name: str, law: Tensor) -> Float64[Tensor, "*batch vocab"]:
    law = law.double()
    total = law.sum(-1, keepdim=True)
    if not bool(((law >= 0).all(-1) & ((total.squeeze(-1) - 1).abs() <= 1e-3)).all()):
        raise RestpointError(f"{name}: a row has negative or NaN entries or does not sum to 1; pass softmax(logits)")
    return law / total
