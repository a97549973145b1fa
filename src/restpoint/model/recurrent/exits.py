"""Iterating a core for as long as each token needs."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from restpoint.equilibrium.exits import ExitCriterion, Iterate
from restpoint.equilibrium.solvers.method import Method, State
from restpoint.model.recurrent.cache import Chosen
from restpoint.model.recurrent.layers import Pass


@dataclass(frozen=True, eq=False)
class Rest:
    """Where the core left the tokens.

    Attributes:
        state: the last state of each.
        steps: core steps that each token ran.
        computed: tokens that the core was given, summed over its steps.
        states: s_0 and every iterate, where they were asked for.
    """

    state: Float[Tensor, "batch seq hidden"]
    steps: Int[Tensor, "batch seq"]
    computed: int
    states: list[Tensor] | None = None


def iterate_until_exit(
    step: Callable[[Tensor, Tensor, Pass], Tensor],
    read: Callable[[Tensor, Pass], Tensor],
    state: Float[Tensor, "batch seq hidden"],
    injected: Float[Tensor, "batch seq hidden"],
    passing: Pass,
    exits: ExitCriterion,
    num_steps: int,
    padding: Bool[Tensor, "batch seq"] | None = None,
    *,
    keep_states: bool = False,
    solver: Method | None = None,
) -> Rest:
    """Run the core until every token has stopped by itself, or has run ``num_steps`` steps.

    A token that has stopped keeps its state; later steps see its keys and values of its last step. Rows and columns
    of which no token is left are computed no more. What a token does depends on itself and on earlier tokens only, so
    a text may be cut into passes anywhere; where the criterion reads logits that holds for passes of one token, since
    in a longer one the coda sees earlier tokens at the states that they have by then.

    Args:
        step: s_k of s_{k-1}, the injected input and the pass.
        read: logits of states in the midst of the iteration.
        state: s_0.
        injected: e.
        passing: of all tokens; its cache is open.
        exits: the criterion.
        num_steps: at most.
        padding: tokens that are no text, which are not iterated.
        keep_states: keep every iterate.
        solver: for passes of one token: the next step begins where this method extrapolates to, not at the iterate.
            What is kept, and what the criterion sees, is still the core's image and the point that it is of.
    """
    cache = passing.cache
    assert cache is not None
    assert solver is None or state.shape[1] == 1
    live = torch.ones(state.shape[:2], dtype=torch.bool, device=state.device) if padding is None else ~padding
    state, steps, computed = state.clone(), live.new_zeros(live.shape, dtype=torch.int64), 0
    states = [state.clone()] if keep_states else None
    whole = padding is None or not bool(padding.any())
    memory = exits.init(state[live])
    points = state if solver is None else state.clone()
    history = None if solver is None else solver.init(_wide(state[live]))
    stopped = False
    for number in range(num_steps):
        rows, columns = (live.any(axis).nonzero().squeeze(-1) for axis in (1, 0))
        if not rows.shape[0]:
            break
        chosen = None if whole and not stopped else Chosen(rows, columns, live[rows[:, None], columns])
        cache.enter(number, chosen, frozen=stopped)
        narrowed = passing.of(chosen)
        before = points if chosen is None else chosen.of(points)
        mask = live if chosen is None else chosen.live
        after = step(before, injected if chosen is None else chosen.of(injected), narrowed)
        after = torch.where(mask.unsqueeze(-1), after, before)
        if chosen is None:
            state = after
        else:
            chosen.put(state, after)
        if solver is None:
            points = state
        steps += live
        computed += mask.numel()
        if states is not None:
            states.append(state.clone())
        if number + 1 == num_steps:
            break

        def logits(after: Tensor = after, narrowed: Pass = narrowed, mask: Tensor = mask) -> Tensor:
            return read(after, narrowed)[mask]

        stop = exits.stop(memory, Iterate(number + 1, after[mask], before[mask], logits))
        if solver is not None and history is not None:
            points[live] = _extrapolated(solver, history, before[mask], after[mask])
        if bool(stop.any()):
            stopped = True
            kept = (~stop).nonzero().squeeze(-1)
            memory.keep(kept)
            if history is not None:
                history.keep(kept)
            live = live.masked_scatter(live, ~stop)
    cache.leave()
    return Rest(state, steps, computed, states)


def _extrapolated(
    solver: Method, history: State, before: Float[Tensor, "rows hidden"], after: Float[Tensor, "rows hidden"]
) -> Float[Tensor, "rows hidden"]:
    """Where the method goes on from a point and its image; to the image itself where it finds nothing finite."""
    point, image = _wide(before), _wide(after)
    forget = torch.zeros(point.shape[0], dtype=torch.bool, device=point.device)
    proposal = solver.step(history, point, image - point, forget)
    return torch.where(proposal.isfinite().all(-1, keepdim=True), proposal, image).to(after.dtype)


def _wide(state: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
    """At least in float32: secants are differences of what is nearly equal."""
    return state.to(torch.promote_types(state.dtype, torch.float32))
