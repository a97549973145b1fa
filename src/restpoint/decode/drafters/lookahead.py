"""Lookahead decoding: guesses refined by Jacobi iteration, and a pool of the n-grams that came up on the way."""

import random
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from restpoint.decode.draft import ROOT, Candidates, InstantDrafter, TokenPath, Verified
from restpoint.errors import RestpointError


@dataclass(frozen=True)
class LookaheadSettings:
    """How much lookahead decoding guesses and remembers."""

    window: int = 5
    """W: future tokens that are guessed and refined; 0 for the pool alone."""
    longest: int = 5
    """N: tokens of an n-gram; N - 1 of them can be drafted from one."""
    guesses: int = 16
    """n-grams kept, and offered, for each first token."""
    capacity: int = 65536
    """n-grams kept in all; the one seen longest ago goes first."""
    from_prompt: bool = True
    """Whether the n-grams of the prompt enter the pool."""
    keep_pool: bool = False
    """Whether the pool outlives a text: for texts that are alike, since n-grams of others crowd out a text's own."""
    seed: int = 0
    """Seed of the tokens that the window is filled with; every text begins with it."""

    def __post_init__(self) -> None:
        if self.window < 0:
            raise RestpointError(f"window is {self.window}; give 0 for the pool alone, or a positive number of guesses")
        if self.longest < 2:
            raise RestpointError(f"longest is {self.longest}; an n-gram needs at least 2 tokens to draft one of them")
        if self.guesses < 1:
            raise RestpointError(f"guesses is {self.guesses}; keep at least 1 n-gram for each first token")
        if self.capacity < self.guesses:
            raise RestpointError(
                f"capacity is {self.capacity}, below the {self.guesses} guesses of one token; raise it or lower guesses"
            )


class NgramPool:
    """The n-grams seen latest, found by their first token.

    Args:
        guesses: n-grams kept for each first token.
        capacity: n-grams kept in all.
    """

    def __init__(self, guesses: int, capacity: int) -> None:
        self.guesses, self.capacity = guesses, capacity
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._after: dict[int, OrderedDict[tuple[int, ...], int]] = {}

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, ngram: Sequence[int]) -> None:
        """An n-gram of two tokens or more was seen; where there is no room, the one seen longest ago goes."""
        whole = tuple(ngram)
        followers = self._after.setdefault(whole[0], OrderedDict())
        followers[whole[1:]] = followers.get(whole[1:], 0) + 1
        followers.move_to_end(whole[1:])
        self._seen[whole] = None
        self._seen.move_to_end(whole)
        if len(followers) > self.guesses:
            self._forget((whole[0], *next(iter(followers))))
        if len(self._seen) > self.capacity:
            self._forget(next(iter(self._seen)))

    def after(self, token: int) -> list[tuple[tuple[int, ...], int]]:
        """What followed a token, the latest first, and how often each was seen since it came in."""
        return list(reversed(self._after.get(token, OrderedDict()).items()))

    def prolong(self, text: Sequence[int], overlap: int) -> tuple[tuple[int, ...], int]:
        """How the n-gram goes on that begins as the text ends, and how often it was seen; nothing and 0 if none does.

        The longest overlap counts, up to ``overlap`` tokens, and the latest n-gram with that overlap.
        """
        for shared in range(min(overlap, len(text)), 0, -1):
            first, *more = text[-shared:]
            begun = tuple(more)
            for ngram, count in self.after(first):
                if len(ngram) >= shared and ngram[: shared - 1] == begun:
                    return ngram[shared - 1 :], count
        return (), 0

    def _forget(self, ngram: tuple[int, ...]) -> None:
        followers = self._after[ngram[0]]
        del self._seen[ngram], followers[ngram[1:]]
        if not followers:
            del self._after[ngram[0]]


class LookaheadDrafter(InstantDrafter):
    """Drafts n-grams that the target itself came up with while it was asked about guesses.

    Greedy decoding solves y_i = F(y_1 .. y_{i-1}) for all i, F the target's choice. Jacobi iteration guesses all y and
    puts the guesses into the right-hand sides at once: one pass refines them all, and after n passes the first n are
    exact. Here the W guesses after the pending token are offered as a chain; where they were drafted, the target's
    choice after each guess becomes the guess one position on. The chain seldom stands as it is, but what follows what
    along the iterations, (y_i, F(.. y_i), F(.. F(.. y_i)), ..), are n-grams of the target's own, and they are kept. So
    are those that rejected nodes of anyone's draft begin (the node, the target's choice after it, and on along the
    tree), and those of the text. Candidates are the n-grams that begin with the pending token, and the chain.

    Use it where a text repeats itself or the model does, and beside other drafters, whose rejected nodes feed the pool
    for nothing. Do not use the window where every further token of a pass costs time (a CPU, large batches): a guess
    stands one time in thirty, and what its n-grams add seldom pays for it; set ``window=0`` there. Guesses that are
    never verified are never refined: whoever chooses what to verify by the confidences alone leaves them out.

    Args:
        settings: defaults of :class:`LookaheadSettings` if None.

    Paper:
        Fu et al. 2024, "Break the Sequential Dependency of LLM Inference Using Lookahead Decoding"; Santilli et al.
        2023, "Accelerating Transformer Inference for Translation via Parallel Decoding" (Jacobi decoding).
    """

    name = "lookahead"
    edges: ClassVar[tuple[float, ...]] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    """Edges of calibration bins on the scale of the confidences."""
    prior: ClassVar[tuple[float, ...]] = (0.03, 0.08, 0.22, 0.33, 0.45, 0.67, 0.8, 0.87, 0.95)
    """Acceptance of each bin until outcomes are known."""

    def __init__(self, settings: LookaheadSettings | None = None) -> None:
        self.settings = settings or LookaheadSettings()
        self.pool = NgramPool(self.settings.guesses, self.settings.capacity)
        self._trails: list[tuple[int, ...]] = []
        self._random = random.Random(self.settings.seed)

    @property
    def window(self) -> list[int]:
        """The guesses, from the token after the pending one on; `candidates` fills it."""
        return [trail[-1] for trail in self._trails]

    def begin(self, prompt: Sequence[int]) -> None:
        """Forget the window and, unless it is to be kept, the pool."""
        if not self.settings.keep_pool:
            self.pool = NgramPool(self.settings.guesses, self.settings.capacity)
        self._random = random.Random(self.settings.seed)
        if self.settings.from_prompt:
            self._pool_text(prompt)
        self._trails = []

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        """The pool's n-grams that begin with the pending token, the most seen one prolonged; and the window.

        A token's confidence is n_i / (1 + sum_j n_j), n_i how often the n-grams through it were seen, the sum over its
        siblings and itself; a token that only the window proposes has 0.
        """
        self._fill(path.tokens)
        tree = _Tree(room)
        ngrams = self.pool.after(path.pending)
        for ngram, seen in ngrams:
            tree.add([(token, seen) for token in ngram])
        if ngrams:
            ngram, _seen = max(ngrams, key=lambda entry: entry[1])
            chain = [(token, 0) for token in ngram]
            while len(chain) < room:
                text = [path.pending, *(token for token, _ in chain)]
                more, seen = self.pool.prolong(text, self.settings.longest - 1)
                if not more:
                    break
                chain += [(token, seen) for token in more]
            tree.add(chain)
        tree.add([(token, 0) for token in self.window])
        return tree.candidates()

    def learn(self, path: TokenPath, verified: Verified) -> None:
        """Pool what the target said of every node, and refine the window where it was drafted."""
        choices = verified.logits.argmax(-1).tolist()
        children = verified.draft.children()
        accepted = set(verified.nodes)
        for node in range(len(verified.draft.tokens)):
            if node not in accepted:
                self.pool.add(self._choices_after(node, verified.draft.tokens[node], choices, children))
        trails: list[tuple[int, ...]] = [(choices[0],)]
        node = ROOT
        for trail in self._trails:
            found = children[node + 1].get(trail[-1])
            if found is None:
                break
            node = found
            trails.append((*trail, choices[node + 1])[-self.settings.longest :])
            self.pool.add(trails[-1])
        gained = verified.new_tokens
        self._trails = [*trails, *self._trails[len(trails) :]][len(gained) :][: self.settings.window]
        self._pool_text([*path.tokens[1 - self.settings.longest :], *gained])

    def _pool_text(self, text: Sequence[int]) -> None:
        for start in range(len(text) - self.settings.longest + 1):
            self.pool.add(text[start : start + self.settings.longest])

    def _choices_after(
        self, node: int, token: int, choices: Sequence[int], children: Sequence[Mapping[int, int]]
    ) -> list[int]:
        """A token and what the target chose after it, and after that, as far as the tree tells."""
        ngram = [token]
        following: int | None = node
        while following is not None and len(ngram) < self.settings.longest:
            ngram.append(choices[following + 1])
            following = children[following + 1].get(ngram[-1])
        return ngram

    def _fill(self, text: Sequence[int]) -> None:
        """New guesses at the window's end: what the pool knows to follow, else a token of the text at random."""
        while text and len(self._trails) < self.settings.window:
            more, _seen = self.pool.prolong([text[-1], *self.window], self.settings.longest - 1)
            self._trails.append((more[0] if more else self._random.choice(text),))


class _Tree:
    """Chains of tokens merged into one tree, with how often the n-grams through each node were seen."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.seen: list[int] = []
        self._children: dict[tuple[int, int], int] = {}

    def add(self, chain: Sequence[tuple[int, int]]) -> None:
        """Walk a chain of tokens and counts from the root, adding the nodes that are missing."""
        node = ROOT
        for token, seen in chain[: self.room]:
            key = node, token
            if key not in self._children:
                self._children[key] = len(self.tokens)
                self.tokens.append(token)
                self.parents.append(node)
                self.seen.append(0)
            node = self._children[key]
            self.seen[node] += seen

    def candidates(self) -> Candidates:
        """The tree, each node's confidence being its share of what was seen after its parent, and of one more."""
        totals: dict[int, int] = {}
        for parent, seen in zip(self.parents, self.seen, strict=True):
            totals[parent] = totals.get(parent, 0) + seen
        shares = [seen / (totals[parent] + 1) for parent, seen in zip(self.parents, self.seen, strict=True)]
        return Candidates(tuple(self.tokens), tuple(self.parents), shares)
