"""What is measured on a cloud of tokens: pure functions of states, for simulated particles and a model's own alike.

Tokens are the last axis but one and coordinates the last; everything before is a batch. Angles, energies, clusters and
centres look at directions only, so states are divided by their norms first; a zero vector has no direction and is
refused. The functions compute in the dtype that they are given: pass float64 where exponentials of large inverse
temperatures are compared.
"""

import math

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from restpoint.errors import RestpointError


def directions(states: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens dim"]:
    """X / |x| for every token.

    Raises:
        RestpointError: a state is the zero vector, or is not finite.
    """
    norms = states.norm(dim=-1, keepdim=True)
    if not bool(((norms > 0) & norms.isfinite()).all()):
        raise RestpointError("states: one is zero or not finite and has no direction; leave that token out")
    return states / norms


def cosines(states: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens tokens"]:
    """<x_i, x_j> of the directions of every pair."""
    units = directions(states)
    return (units @ units.mT).clamp(-1, 1)


def geodesic_distance(a: Float[Tensor, "*batch dim"], b: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """The angle between unit vectors in radians: 2 atan2(|a - b|, |a + b|), accurate for tiny and for flat angles."""
    return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))


def distance_to_first(states: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch tokens"]:
    """The angle between every token and the first one, in radians; 0 everywhere after a causal collapse."""
    units = directions(states)
    return geodesic_distance(units, units[..., :1, :].expand_as(units))


# --- energies ---


def log_energy(
    states: Float[Tensor, "*batch tokens dim"], beta: float | Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """The logarithm of E_b = 1/(2b) mean over i, j of exp(b <x_i, x_j>), which no b makes overflow.

    With V = QᵀK = I, full self-attention never lets E_b decrease, and the unnormalised kind is its gradient flow. The
    mean is over all pairs, i = j included; E_b is largest, e^b / (2b), where all tokens coincide.

    Args:
        states: tokens; their directions are used.
        beta: inverse temperature b > 0, one or one for each cloud of the batch.

    Raises:
        RestpointError: beta is not positive.

    Paper:
        Geshkovski, Letrouit, Polyanskiy, Rigollet 2023, "A mathematical perspective on transformers".
    """
    return log_energy_of_pairs(cosines(states), beta)


def log_energy_of_pairs(
    cosines: Float[Tensor, "*batch tokens tokens"], beta: float | Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch"]:
    """:func:`log_energy` of a cloud whose :func:`cosines` are known."""
    beta = _positive(cosines, beta)
    scores = beta[..., None, None] * cosines
    pairs = 2 * math.log(cosines.shape[-1])
    return scores.flatten(-2).logsumexp(-1) - pairs - (2 * beta).log()


def log_sequential_energies(
    states: Float[Tensor, "*batch tokens dim"], beta: float | Float[Tensor, "*#batch"]
) -> Float[Tensor, "*batch tokens"]:
    """The logarithm of E_k = (1/b) sum over j < k of exp(b <x_k, x_j>), for every token k.

    The causal system has no energy of all tokens together. With V = QᵀK = I it is sequential instead:
    dx_k/dt = grad E_k / Z_k, an ascent for x_k in the landscape of the tokens before it, so E_k never decreases while
    those are at rest. The first token has none before it: -inf.

    Raises:
        RestpointError: beta is not positive.

    Paper:
        Karagodin, Polyanskiy, Rigollet 2024, "Clustering in causal attention masking".
    """
    beta = _positive(states, beta)
    scores = beta[..., None, None] * cosines(states)
    count = states.shape[-2]
    earlier = torch.ones(count, count, dtype=torch.bool, device=states.device).tril(-1)
    return scores.masked_fill(~earlier, -math.inf).logsumexp(-1) - beta.log()[..., None]


def _positive(states: Tensor, beta: float | Tensor) -> Tensor:
    beta = torch.as_tensor(beta, dtype=states.dtype, device=states.device)
    if not bool((beta > 0).all()):
        raise RestpointError("beta: an energy needs a positive inverse temperature; leave out those of 0 and below")
    return beta


# --- clusters ---


def clustered_share(states: Float[Tensor, "*batch tokens dim"], tau: float = 1e-3) -> Float[Tensor, "*batch"]:
    """Share of the pairs i != j with <x_i, x_j> > 1 - tau; 1 for a single token."""
    return adjacent_share(adjacency(cosines(states), tau)).to(states.dtype)


def cluster_count(states: Float[Tensor, "*batch tokens dim"], tau: float = 1e-3) -> Int[Tensor, "*batch"]:
    """Connected components of the graph that joins tokens with <x_i, x_j> > 1 - tau."""
    return component_count(adjacency(cosines(states), tau))


def cluster_labels(states: Float[Tensor, "*batch tokens dim"], tau: float = 1e-3) -> Int[Tensor, "*batch tokens"]:
    """For every token, the lowest index in its connected component.

    Tokens share a label if and only if a chain of neighbours with <x_i, x_j> > 1 - tau joins them.
    """
    return component_labels(adjacency(cosines(states), tau))


def cluster_rank(states: Float[Tensor, "*batch tokens dim"], tau: float = 1e-3) -> Int[Tensor, "*batch"]:
    """Rank of the 0/1 matrix [<x_i, x_j> > 1 - tau].

    It is the number of clusters where these are cliques, and above `cluster_count` where chains join tokens that are
    not neighbours themselves: the difference says that tau cuts through a cluster.
    """
    return adjacency_rank(adjacency(cosines(states), tau))


def adjacency(cosines: Float[Tensor, "*batch tokens tokens"], tau: float) -> Bool[Tensor, "*batch tokens tokens"]:
    """The graph that joins tokens with <x_i, x_j> > 1 - tau, and every token with itself.

    Raises:
        RestpointError: tau is no distance of unit vectors.
    """
    if not 0 < tau < 2:
        raise RestpointError(
            f"tau is {tau}; give a distance between 0 and 2, such as 1e-3: pairs above 1 - tau are near"
        )
    return (cosines > 1 - tau) | torch.eye(cosines.shape[-1], dtype=torch.bool, device=cosines.device)


def adjacent_share(adjacent: Bool[Tensor, "*batch tokens tokens"]) -> Float64[Tensor, "*batch"]:
    """Share of the pairs i != j that a graph joins; 1 for a single token."""
    count = adjacent.shape[-1]
    together = (adjacent.sum((-2, -1)) - count).double()
    return together / (count * (count - 1)) if count > 1 else together + 1


def component_count(adjacent: Bool[Tensor, "*batch tokens tokens"]) -> Int[Tensor, "*batch"]:
    """Connected components of a graph that joins every token with itself."""
    first = torch.arange(adjacent.shape[-1], device=adjacent.device)
    return (component_labels(adjacent) == first).sum(-1)


def component_labels(adjacent: Bool[Tensor, "*batch tokens tokens"]) -> Int[Tensor, "*batch tokens"]:
    """For every token, the lowest index in its connected component of a graph that joins every token with itself."""
    count = adjacent.shape[-1]
    labels = torch.arange(count, device=adjacent.device).expand(adjacent.shape[:-1]).clone()
    while True:
        offered = labels.unsqueeze(-2).expand(adjacent.shape).masked_fill(~adjacent, count).amin(-1)
        lowest = offered.gather(-1, offered)  # a label's own label: chains of any length take few rounds
        if torch.equal(lowest, labels):
            return labels
        labels = lowest


def adjacency_rank(adjacent: Bool[Tensor, "*batch tokens tokens"]) -> Int[Tensor, "*batch"]:
    """Rank of the 0/1 matrix of a graph that joins every token with itself.

    A token that nothing is joined to adds 1, so that the decomposition is of the others alone.
    """
    ranks = []
    for graph in adjacent.flatten(0, -3) if adjacent.ndim > 2 else adjacent[None]:
        joined = graph.sum(-1) > 1
        among = graph[joined][:, joined].double()
        ranks.append((~joined).sum() + torch.linalg.matrix_rank(among, hermitian=True))
    return torch.stack(ranks).view(adjacent.shape[:-2])


def merging_times(
    states: Float[Tensor, "times *batch tokens dim"], times: Float[Tensor, " times"], tau: float = 1e-3
) -> Float[Tensor, "*batch tokens tokens"]:
    """For every pair, the first recorded time from which <x_i, x_j> > 1 - tau at all later ones; inf if there is none.

    Args:
        states: one cloud for each time; one pair matrix is held at a time.
        times: increasing, in units of the simulation's time (or layers).
        tau: tokens nearer than this count as merged.
    """
    if states.shape[0] == 0:
        raise RestpointError("states: there is no time in them; record one at least")
    merged = torch.ones((), dtype=torch.bool, device=states.device)
    since = torch.full((), math.inf, dtype=times.dtype, device=states.device)
    for cloud, time in zip(states.flip(0), times.flip(0), strict=True):
        merged = merged & adjacency(cosines(cloud), tau)
        since = torch.where(merged, time.to(states.device), since)
    return since


def merging_time(
    states: Float[Tensor, "times *batch tokens dim"], times: Float[Tensor, " times"], tau: float = 1e-3
) -> Float[Tensor, "*batch"]:
    """The first recorded time from which all tokens are merged; inf if they never are."""
    return merging_times(states, times, tau).flatten(-2).amax(-1)


# --- centres ---


def strong_renyi_centres(states: Float[Tensor, "*batch tokens dim"], delta: float) -> Bool[Tensor, "*batch tokens"]:
    """Tokens whose angle to *every* earlier token exceeds delta: they hardly move while others gather around them.

    Of n tokens drawn uniformly on the circle, (1 - (1 - s)^n) / s are centres on average, with s = delta / pi.

    Args:
        states: tokens in causal order; their directions are used.
        delta: angle in radians; the paper's is 4 / sqrt(beta).

    Raises:
        RestpointError: delta is not between 0 and pi.

    Paper:
        Karagodin, Polyanskiy, Rigollet 2024, "Clustering in causal attention masking", section 5.
    """
    return ~_near(states, delta).tril(-1).any(-1)


def renyi_centres(states: Float[Tensor, "*batch tokens dim"], delta: float) -> Bool[Tensor, "*batch tokens"]:
    """Tokens whose angle to every earlier *centre* exceeds delta: Renyi's parking, one token after another.

    Every strong centre is one of them; these also cover what the strong ones leave, and move more.

    Raises:
        RestpointError: delta is not between 0 and pi.

    Paper:
        Karagodin, Polyanskiy, Rigollet 2024, "Clustering in causal attention masking", section 5; Renyi 1958.
    """
    near = _near(states, delta)
    centres = torch.zeros(states.shape[:-1], dtype=torch.bool, device=states.device)
    for token in range(states.shape[-2]):
        centres[..., token] = ~(near[..., token, :token] & centres[..., :token]).any(-1)
    return centres


def _near(states: Tensor, delta: float) -> Tensor:
    if not 0 < delta < math.pi:
        raise RestpointError(f"delta is {delta}; give an angle between 0 and pi, such as 4 / sqrt(beta)")
    return cosines(states) >= math.cos(delta)


# --- dimension ---


def effective_rank(states: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch"]:
    """Exp of the entropy of the normalised eigenvalues of the tokens' covariance: 1 on a line, dim for an even cloud.

    The states are taken as they are, not their directions. 0 where all tokens coincide.

    Paper:
        Roy, Vetterli 2007, "The effective rank".
    """
    shares = _spectrum(states)
    return torch.where(shares.sum(-1) > 0, torch.special.entr(shares).sum(-1).exp(), 0)


def participation_ratio(states: Float[Tensor, "*batch tokens dim"]) -> Float[Tensor, "*batch"]:
    """(tr C)² / tr C² of the tokens' covariance C: as `effective_rank`, with more weight on the large eigenvalues."""
    shares = _spectrum(states)
    return torch.where(shares.sum(-1) > 0, 1 / shares.square().sum(-1), 0)


def _spectrum(states: Tensor) -> Tensor:
    """Eigenvalues of the covariance over their sum; all 0 where tokens coincide up to rounding."""
    centred = states - states.mean(-2, keepdim=True)
    values = torch.linalg.svdvals(centred).square()
    total = values.sum(-1, keepdim=True)
    rounding = (torch.finfo(states.dtype).eps * states.square().sum((-2, -1)).sqrt()).square()[..., None]
    return torch.where(total > rounding, values / total, 0)
