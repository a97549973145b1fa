"""Which drafted tokens stand, so that the text keeps the model's own law."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import ROOT, Draft, Verified
from restpoint.decode.sampling import Sampler
from restpoint.decode.verifiers.base import Outcome, Verifier
from restpoint.errors import RestpointError


def verify(
    logits: Float[Tensor, "rows vocab"], draft: Draft, text: Sequence[int], sampler: Sampler, verifier: Verifier
) -> Verified:
    """Hold a draft against the target: greedy text is the target's own, sampled text follows its law exactly.

    Greedy: from the root on, the child that holds the target's argmax stands. Sampling: the verifier decides.

    Args:
        logits: the target's, after the pending token and after each drafted node.
        draft: the tree, with the laws that its random tokens were drawn from.
        text: all tokens up to the pending one.
        sampler: processors and random numbers.
        verifier: the coupling of draft and target; greedy decoding needs none.

    Raises:
        RestpointError: the target's logits contain NaN, or processors leave no token at a position.
    """
    if sampler.greedy:
        best = sampler.best(logits, lambda: draft.prefixes(text))
        *targets, finite = torch.cat([best, torch.isfinite(logits.amax()).long()[None]]).tolist()
        _require(bool(finite))
        outcome = _follow(draft, targets)
    else:
        p = sampler.law(logits, lambda: draft.prefixes(text))
        _require(bool(torch.isfinite(p[:, 0]).all()))
        outcome = verifier.verify(p, draft, sampler.uniforms)
    return Verified(draft, logits, outcome.nodes, outcome.next_token)


def _follow(draft: Draft, targets: list[int]) -> Outcome:
    children = draft.children()
    nodes: list[int] = []
    node = ROOT
    while (following := children[node + 1].get(targets[node + 1])) is not None:
        nodes.append(following)
        node = following
    return Outcome(tuple(nodes), targets[node + 1])


def _require(finite: bool) -> None:
    if not finite:
        raise RestpointError(
            "model: its logits are NaN or infinite at this prompt; check the weights, or load in float32 (dtype)"
        )
