"""How Jacobi iteration came to a text: the guesses of every pass, and when each of them became right."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

NO_GUESS = -1
"""Stands where a position was not in the window of a pass."""


@dataclass(frozen=True)
class Iteration:
    """One pass. Positions count new tokens from 0, the prompt's pass having given the first.

    Attributes:
        window: number of the window, from 1; a sliding one stays the same until all its guesses stood at once.
        first: position of the first guess.
        guesses: what was put in, from ``first`` on.
        choices: what the target chose at the same positions, and at the one after them.
        fixed: tokens that this pass made certain: the guesses that stood, and the choice after them.
    """

    window: int
    first: int
    guesses: tuple[int, ...]
    choices: tuple[int, ...]
    fixed: int


@dataclass(frozen=True)
class Solved:
    """One window from its first guesses to its last pass.

    Attributes:
        first: position of its first guess.
        tokens: tokens fixed by it.
        fixed: tokens fixed by each of its passes.
    """

    first: int
    tokens: int
    fixed: tuple[int, ...]

    @property
    def iterations(self) -> int:
        """Passes that it took."""
        return len(self.fixed)


@dataclass(frozen=True)
class JacobiTrace:
    """All passes of one text, in order."""

    iterations: list[Iteration] = field(default_factory=list)

    @property
    def windows(self) -> list[Solved]:
        """Every window and how long it took."""
        grouped: dict[int, list[Iteration]] = {}
        for iteration in self.iterations:
            grouped.setdefault(iteration.window, []).append(iteration)
        solved = []
        for passes in grouped.values():
            fixed = tuple(one.fixed for one in passes)
            solved.append(Solved(passes[0].first, sum(fixed), fixed))
        return solved

    def matrix(self) -> Int[Tensor, "passes positions"]:
        """The guess at each position in each pass; -1 where it was not in the window."""
        width = max((one.first + len(one.guesses) for one in self.iterations), default=0)
        found = torch.full((len(self.iterations), width), NO_GUESS, dtype=torch.long)
        for row, one in enumerate(self.iterations):
            found[row, one.first : one.first + len(one.guesses)] = torch.tensor(one.guesses, dtype=torch.long)
        return found

    def right_after(self, tokens: Sequence[int]) -> Int[Tensor, "passes positions"]:
        """For every guess that is right to stay, how many refinements it took; -1 where it is wrong or there is none.

        0: right as it entered the window. j: right from the j-th pass on that it was refined by.

        Args:
            tokens: the new tokens of the text, all of them; positions beyond them have no right guess.
        """
        guesses = self.matrix()
        truth = torch.full((guesses.shape[1],), NO_GUESS - 1, dtype=torch.long)
        known = torch.tensor(list(tokens[: len(truth)]), dtype=torch.long)
        truth[: len(known)] = known
        inside = guesses != NO_GUESS
        right = (guesses == truth) & inside
        # Right to stay: no wrong guess at that position in this pass or any later one.
        stays = right & ~((inside & ~right).flip(0).cumsum(0).flip(0) > 0)
        wrong = (inside & ~stays).sum(0)
        return torch.where(stays, wrong.expand_as(guesses), torch.full_like(guesses, NO_GUESS))
