"""What a set of left-out layers is worth, measured on a text under the very conditions of drafting."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.decode.drafters.skips import SkipSet
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.layered import LayeredModel
from restpoint.model.masks import Tree
from restpoint.model.plan import Plan
from restpoint.transport.variation import acceptance


@dataclass(frozen=True)
class SkipQuality:
    """How drafts without some layers fare, by place in the drafted chain.

    Attributes:
        skip: the layers left out.
        kept_share: share of the layers that run.
        agreement: for each place, how often the most probable token is the full model's.
        acceptance: for each place, the mean of 1 - TV between the two laws at temperature 1.
        positions: how many positions each figure is the mean of, at least.
    """

    skip: SkipSet
    kept_share: float
    agreement: tuple[float, ...]
    acceptance: tuple[float, ...]
    positions: int

    def tokens(self, drafted: int, greedy: bool = True) -> float:
        """Expected tokens of a round, 1 + sum_i prod_{j<=i} a_j, if so many are drafted."""
        expected, reach = 1.0, 1.0
        for rate in (self.agreement if greedy else self.acceptance)[:drafted]:
            reach *= rate
            expected += reach
        return expected

    def gain(self, drafted: int, greedy: bool = True, block_cost: float = 0.0) -> float:
        """Expected tokens for the cost of one plain pass; plain decoding has 1.

        Args:
            drafted: number of tokens drafted.
            greedy: judge by agreement, else by acceptance.
            block_cost: what each further token adds to a verifying pass, as a share of a plain pass.
        """
        return self.tokens(drafted, greedy) / (1 + drafted * (self.kept_share + block_cost))

    def best_length(self, greedy: bool = True, block_cost: float = 0.0) -> int:
        """The number of drafted tokens with the largest gain; 0 where plain decoding is best."""
        return max(range(len(self.agreement) + 1), key=lambda drafted: self.gain(drafted, greedy, block_cost))


class SkipJudge:
    """Measures sets of left-out layers by teacher forcing, with the text's keys and values from the full model.

    A draft of d tokens runs in slots behind a text that the full model has read. So the text is read once in full; then
    it is cut into blocks of d tokens, and each runs without the layers in question as a branch that leaves the text
    where it begins: it sees the full model's keys of the text before it and its own of the tokens in it. Place j of a
    block is place j of a drafted chain, which one pass of the short model over the whole text would not show: there,
    all the text's keys are its own. All blocks of a text run in one pass.

    Memory: logits over the vocabulary for every token of the texts, and their keys and values twice.

    Args:
        layered: the model, of a family that can see trees (``check(layered).tree``).
        texts: token ids of each text, best some hundred; best what the model itself wrote, or will have to go on from.
        longest: tokens in a block, so the longest chain that is judged.

    Raises:
        RestpointError: no text is longer than a block.
    """

    def __init__(self, layered: LayeredModel, texts: Sequence[Sequence[int]], longest: int = 8):
        if longest < 1:
            raise RestpointError(f"longest={longest} judges nothing; give at least 1")
        self.layered = layered
        self.longest = longest
        self.texts = [ReadText(layered, text, longest) for text in texts if len(text) > longest]
        if not self.texts:
            raise RestpointError(f"texts: none of them is longer than {longest} tokens; give longer ones")

    def judge(self, skip: SkipSet) -> SkipQuality:
        """Measure one set."""
        skip.check(self.layered.depth)
        agreed = torch.zeros(self.longest, dtype=torch.float64)
        accepted = torch.zeros(self.longest, dtype=torch.float64)
        for text in self.texts:
            drafted = self.layered.logits(self.layered.run(text.blocks, skip=frozenset(skip.layers)))[0].float()
            q, p = torch.softmax(drafted, -1), torch.softmax(text.logits.float(), -1)
            agreed += (q.argmax(-1) == p.argmax(-1)).double().view(-1, self.longest).sum(0).cpu()
            accepted += acceptance(p, q).double().view(-1, self.longest).sum(0).cpu()
        blocks = sum(len(text.logits) for text in self.texts) // self.longest
        rates = [tuple((total / blocks).tolist()) for total in (agreed, accepted)]
        return SkipQuality(skip, skip.kept_share(self.layered.depth), rates[0], rates[1], blocks)


class ReadText:
    """A text that the full model has read, and blocks of it that leave it as branches of a tree.

    Attributes:
        ids: its tokens.
        cache: the full model's keys and values of it; nothing is committed.
        blocks: the plan of a pass over all blocks, to be run any number of times.
        logits: the full model's, after each token of the blocks.
    """

    def __init__(self, layered: LayeredModel, tokens: Sequence[int], longest: int):
        count = (len(tokens) - 1) // longest * longest
        length = count + 1
        self.ids: Int[Tensor, "1 length"] = torch.tensor([list(tokens[:length])], device=layered.device)
        self.cache: SlotCache = layered.cache(capacity=length + count)
        states = layered.run(layered.plan(self.ids, self.cache))
        self.logits: Float[Tensor, "drafted vocab"] = layered.logits(states)[0, 1:]
        text = range(-1, length - 1)
        branches = (place if place % longest == 0 else length + place - 1 for place in range(count))
        tree = Tree((*text, *branches))
        self.blocks: Plan = layered.plan(self.ids[:, 1:], self.cache, offset=length, tree=tree)
