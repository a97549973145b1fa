"""Jacobi decoding: greedy text as a fixed point in token space, with a trace of how it is reached."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

from restpoint.decode.draft import ROOT, Draft, InstantDrafter, Speculator, TokenPath, Verified
from restpoint.decode.jacobi_trace import Iteration, JacobiTrace
from restpoint.decode.loop import Round, Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import NO_DRAFT, Target
from restpoint.errors import RestpointError


class Guess(ABC):
    """Where the first guess of a token comes from, when its position enters the window."""

    def begin(self, prompt: Sequence[int]) -> None:  # noqa: B027  # most have nothing to do
        """A new text begins."""

    @abstractmethod
    def tokens(self, path: TokenPath, window: Sequence[int], count: int) -> Sequence[int]:
        """Guesses of the ``count`` tokens after the pending one and the ``window`` of guesses that follow it."""

    def learn(self, path: TokenPath, verified: Verified) -> None:  # noqa: B027
        """A pass is over; ``path`` is the text before it."""


class LastTokenGuess(Guess):
    """The last guess in the window again, or the pending token: text stands still."""

    def tokens(self, path: TokenPath, window: Sequence[int], count: int) -> Sequence[int]:
        """See :meth:`Guess.tokens`."""
        return [window[-1] if window else path.pending] * count


class PromptGuess(Guess):
    """The prompt's tokens in order, from its first on, over and over."""

    def begin(self, prompt: Sequence[int]) -> None:
        """See :meth:`Guess.begin`."""
        self._prompt = list(prompt)
        self._next = 0

    def tokens(self, path: TokenPath, window: Sequence[int], count: int) -> Sequence[int]:
        """See :meth:`Guess.tokens`."""
        first = self._next
        self._next += count
        return [self._prompt[place % len(self._prompt)] for place in range(first, first + count)]


class DrafterGuess(Guess):
    """What a drafter says of the token so far ahead, along its surest path; the last token where it says nothing.

    Args:
        drafter: it learns from every pass.
    """

    def __init__(self, drafter: InstantDrafter) -> None:
        self.drafter = drafter

    def begin(self, prompt: Sequence[int]) -> None:
        """See :meth:`Guess.begin`."""
        self.drafter.begin(prompt)

    def tokens(self, path: TokenPath, window: Sequence[int], count: int) -> Sequence[int]:
        """See :meth:`Guess.tokens`."""
        named = self.drafter.candidates(path, len(window) + count)
        children: dict[int, list[int]] = {}
        for node, parent in enumerate(named.parents):
            children.setdefault(parent, []).append(node)
        chain, node = list[int](), ROOT
        while node in children:
            node = max(children[node], key=lambda child: named.confidences[child])
            chain.append(named.tokens[node])
        chain = chain[len(window) : len(window) + count]
        last = chain[-1] if chain else window[-1] if window else path.pending
        return chain + [last] * (count - len(chain))

    def learn(self, path: TokenPath, verified: Verified) -> None:
        """See :meth:`Guess.learn`."""
        self.drafter.learn(path, verified)


@dataclass(frozen=True)
class JacobiSettings:
    """How many tokens are guessed at once, and how the window moves."""

    window: int = 8
    """n: tokens after the pending one that are guessed and iterated together."""
    slide: bool = True
    """Let new guesses enter as soon as tokens are fixed; else a window is solved to its end before the next begins."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise RestpointError(f"window is {self.window}; guess at least 1 token, or decode plainly")


class JacobiSpeculator(Speculator):
    """Offers its window of guesses as a chain and takes the target's choices for the next guesses.

    Greedy text solves y_i = F(x, y_1 .. y_{i-1}) for all i, F the target's argmax. One pass over the window evaluates
    all right-hand sides at the guesses of the pass before: y <- F(x, y). **After j passes the first j tokens are
    right**: F(x) does not depend on a guess, so y_1 is right after one pass; and once y_1 .. y_{j-1} are right, the
    next pass makes y_j = F(x, y_1 .. y_{j-1}) right, and leaves the ones before as they are. So n passes solve a
    window of n. What is right and known to be right (the leading guesses that the target chose too) goes to the cache
    and is not computed again; every pass fixes at least one token, as plain decoding does.

    When to use: to see how far ahead a model's text is settled; for models trained to converge in few passes
    (consistency models). When not: for speed on a stock model, where a guess that was made without knowing the tokens
    before it is seldom right; see the benchmark. `LookaheadDrafter` keeps the n-grams that such passes come up with.

    Args:
        settings: defaults of :class:`JacobiSettings` if None.
        guess: first guesses; :class:`LastTokenGuess` if None.

    Attributes:
        trace: every pass of the text being decoded.

    Paper:
        Santilli et al. 2023, "Accelerating Transformer Inference for Translation via Parallel Decoding"; Song et al.
        2021, "Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving".
    """

    def __init__(self, settings: JacobiSettings | None = None, guess: Guess | None = None) -> None:
        self.settings = settings or JacobiSettings()
        self.guess = guess or LastTokenGuess()
        self.trace = JacobiTrace()
        self._window: list[int] = []
        self._windows = self._prompt = 0

    def begin(self, prompt: Sequence[int]) -> None:
        """See :meth:`Speculator.begin`."""
        self.trace, self._window, self._windows, self._prompt = JacobiTrace(), [], 0, len(prompt)
        self.guess.begin(prompt)

    def propose(self, path: TokenPath, room: int) -> Draft:
        """The window, filled up with new guesses, as far as there is room."""
        wanted = min(self.settings.window, room)
        missing = wanted - len(self._window)
        new = not self._window
        if new:
            self._windows += 1
        if missing > 0 and (self.settings.slide or new):
            self._window += self.guess.tokens(path, self._window, missing)
        return Draft.chain(self._window[:wanted]) if wanted > 0 else NO_DRAFT

    def observe(self, path: TokenPath, verified: Verified) -> None:
        """Note the pass, and take the target's choices for the guesses."""
        guesses = tuple(verified.draft.tokens)
        choices = tuple(verified.logits.argmax(-1).tolist())
        first = len(path.tokens) - self._prompt
        fixed = len(verified.nodes) + 1
        self.trace.iterations.append(Iteration(self._windows, first, guesses, choices, fixed))
        # The choice after the last guess lies beyond the window: it enters a sliding one, and is the pending token
        # where all guesses stood.
        refined = choices[fixed : len(choices) if self.settings.slide else len(guesses)]
        self._window = [*refined, *self._window[len(guesses) + self.settings.slide :]]
        self.guess.learn(path, verified)


@dataclass(frozen=True)
class JacobiDecoded:
    """A text by Jacobi decoding.

    Attributes:
        tokens: the new tokens, the model's own greedy ones.
        rounds: the prompt's, then one for every pass.
        trace: of every pass after the prompt's.
    """

    tokens: tuple[int, ...]
    rounds: tuple[Round, ...] = field(repr=False)
    trace: JacobiTrace = field(repr=False)

    @property
    def tokens_per_pass(self) -> float:
        """Tokens after the first, which the prompt's pass gives, for each further pass; 1.0 is plain decoding."""
        passes = len(self.rounds) - 1
        return (len(self.tokens) - 1) / passes if passes else 1.0


def jacobi_decode(
    target: Target,
    prompt: Sequence[int],
    stopping: Stopping | None = None,
    settings: JacobiSettings | None = None,
    guess: Guess | None = None,
) -> JacobiDecoded:
    """Continue a prompt greedily by Jacobi iteration: the tokens of plain decoding, in as many passes or fewer.

    Args:
        target: the model, on a cache that can roll back.
        prompt: token ids.
        stopping: when to stop; 128 new tokens if None.
        settings: see :class:`JacobiSettings`.
        guess: first guesses; the last token if None.

    Raises:
        RestpointError: see :func:`~restpoint.decode.loop.decode`; or the target cannot verify drafts.
    """
    speculator = JacobiSpeculator(settings, guess)
    sampler = Sampler(SamplingSettings(), device=target.layered.device)
    rounds = tuple(decode(target, list(prompt), sampler, stopping or Stopping(), speculator))
    return JacobiDecoded(tuple(token for turn in rounds for token in turn.tokens), rounds, speculator.trace)
