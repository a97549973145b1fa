"""Verification of a chain as one block."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from restpoint.decode.draft import Draft
from restpoint.decode.verifiers.base import LongestFirst, Stop
from restpoint.transport.siblings import Drawing


@dataclass(frozen=True)
class Block(LongestFirst):
    """Keep the longest prefix i of a chain with u_i <= h_i, where h_i = Z_i/(Z_i + 1 - P_i) and h_last = P_last.

    P_i = min(1, P_{i-1} p_i(x_i)/q_i(x_i)) with P_0 = 1 is what the prefix is worth, Z_i = sum (P_i p_{i+1} -
    q_{i+1})_+ what is left of it once the next token is refused; the token after a prefix that is cut short is drawn
    from norm((P_i p_{i+1} - q_{i+1})_+), after the whole chain from p. On average it keeps at least as many tokens as
    token-wise verification, and no verifier of a chain keeps more. Use it for every drawn chain.

    A node chosen without chance counts as drawn from the point mass at its token.

    It waits for the device twice and does one pass over all rows.

    Raises:
        RestpointError: from :meth:`verify`, where the draft is no chain or a node was drawn more than once.

    Paper:
        Sun, Mendlovic, Leviathan, Aharoni, Ro, Beirami, Suresh 2024, "Block Verification Accelerates Speculative
        Decoding".
    """

    name: str = "block"

    @property
    def drawn(self) -> Drawing:
        return "one"

    @property
    def chains_only(self) -> bool:
        return True

    def stops(self, p: Float[Tensor, "rows vocab"], draft: Draft) -> Iterator[Stop]:
        count = len(draft.tokens)
        p = p.double()
        p = p / p.sum(-1, keepdim=True)
        if not count:
            yield Stop(1.0, (), p[0])
            return
        tokens = torch.tensor(draft.tokens, device=p.device)
        q = torch.zeros_like(p[:count])
        for node in range(count):
            group = draft.drawn.get(node - 1)
            if group is None or not group.nodes:
                q[node, draft.tokens[node]] = 1.0
            else:
                q[node] = group.law.double() / group.law.double().sum()
        target, drafted = (law.gather(1, tokens[:, None])[:, 0] for law in (p[:count], q))
        ratio = torch.where(drafted > 0, target / drafted, torch.where(target > 0, torch.inf, 0.0))
        worth = [torch.ones_like(ratio[0])]
        for node in range(count):
            # A worthless prefix stays so, whatever follows it.
            worth.append(torch.where(worth[-1] > 0, (worth[-1] * ratio[node]).clamp_max(1.0), 0.0))
        worths = torch.stack(worth)
        left = (worths[:count, None] * p[:count] - q).clamp_min(0)
        remains = left.sum(-1)
        refused = remains + 1 - worths[:count]
        # Where the next token is hardly ever refused, what is left is rounding and has no direction.
        real = refused > 4 * torch.finfo(p.dtype).eps
        left = torch.where(real[:, None], left, p[:count])
        heights = torch.cat([torch.where(real, remains / refused, 1.0), worths[count:]]).tolist()
        yield Stop(heights[count], tuple(range(count)), p[count])
        for length in range(count - 1, 0, -1):
            yield Stop(heights[length], tuple(range(length)), left[length])
        yield Stop(1.0, (), left[0])  # as P_0 = 1
