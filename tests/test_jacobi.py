"""Jacobi decoding: the tokens of transformers' own generate, and the trace against iteration without a cache."""

import random

import pytest
import torch
from transformers import PreTrainedModel

from decoding import PROMPT, model_and_target, native
from families import FAMILIES, REFUSED, build
from restpoint.decode.draft import TokenPath
from restpoint.decode.drafters.lookup import LookupDrafter
from restpoint.decode.jacobi import (
    DrafterGuess,
    Guess,
    JacobiDecoded,
    JacobiSettings,
    LastTokenGuess,
    PromptGuess,
    jacobi_decode,
)
from restpoint.decode.loop import Stopping
from restpoint.decode.target import LayeredTarget
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded

LENGTH = 28
CHAINS = [family for family in FAMILIES if "rollback" not in REFUSED.get(family, set())]


class Right(Guess):
    """Guesses the text that is to come, with mistakes at a rate."""

    def __init__(self, text: list[int], mistakes: float = 0.0) -> None:
        self.text, self.mistakes, self.random = text, mistakes, random.Random(0)

    def tokens(self, path: TokenPath, window: list[int], count: int) -> list[int]:
        place = len(path.tokens) + len(window)
        named = [*self.text, *[0] * 64][place : place + count]
        return [(token + (self.random.random() < self.mistakes)) % 96 for token in named]


def guesses(text: list[int]) -> dict[str, Guess]:
    return {
        "last": LastTokenGuess(),
        "prompt": PromptGuess(),
        "drafter": DrafterGuess(LookupDrafter()),
        "mistaken": Right(text, 0.3),
    }


def check_text(family: str, window: int, slide: bool, names: tuple[str, ...]) -> None:
    model, target = model_and_target(family)
    expected = native(model, PROMPT, LENGTH)
    for name in names:
        guess = guesses([*PROMPT, *expected])[name]
        found = jacobi_decode(target, PROMPT, Stopping(LENGTH), JacobiSettings(window, slide), guess)
        assert list(found.tokens) == expected
        assert len(found.rounds) - 1 <= LENGTH - 1
        check_trace(found, window, slide)


@pytest.mark.parametrize("family", CHAINS)
def test_text_is_generates_own(family: str) -> None:
    check_text(family, 5, True, ("mistaken",))


@pytest.mark.parametrize("slide", [True, False])
@pytest.mark.parametrize("window", [1, 6, 40])
def test_whatever_is_guessed(window: int, slide: bool) -> None:
    check_text("gpt2", window, slide, ("last", "prompt", "drafter", "mistaken"))


def check_trace(found: JacobiDecoded, window: int, slide: bool) -> None:
    """What the trace says of the passes must agree with the text and with itself."""
    trace, tokens = found.trace, list(found.tokens)
    assert len(trace.iterations) == len(found.rounds) - 1
    place = 1
    for iteration in trace.iterations:
        assert iteration.first == place
        assert len(iteration.guesses) <= window
        assert 1 <= iteration.fixed <= len(iteration.guesses) + 1
        # After j passes of a window its first j tokens are right, and the choices up to what was fixed are the text.
        shown = tokens[place : place + iteration.fixed]
        assert list(iteration.choices[: iteration.fixed])[: len(shown)] == shown
        place += iteration.fixed
    assert place >= len(tokens)
    for solved in trace.windows:
        assert solved.tokens == sum(solved.fixed)
        if not slide:
            assert solved.tokens <= window + 1
            assert solved.iterations <= window
    assert sum(solved.iterations for solved in trace.windows) == len(trace.iterations)


def jacobi_without_cache(model: PreTrainedModel, prompt: list[int], start: list[int]) -> list[list[int]]:
    """y <- argmax f(prompt, y) over the whole window until it stands still: the guesses of every pass."""
    rows = [list(start)]
    while True:
        ids = torch.tensor([[*prompt, *rows[-1]]])
        choices = model(input_ids=ids, use_cache=False).logits[0].argmax(-1).tolist()
        refined = choices[len(prompt) - 1 : -1]
        if refined == rows[-1]:
            return rows
        rows.append(refined)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mpt"])
@pytest.mark.parametrize("mistakes", [0.0, 0.2, 1.0])
def test_one_window_follows_jacobi_iteration_without_a_cache(family: str, mistakes: float) -> None:
    """Rows of the trace are the iterates of the whole window, as far as they are not certain yet."""
    model, target = model_and_target(family)
    window = 12
    text = native(model, PROMPT, window + 1)
    guess = Right([*PROMPT, *text], mistakes)
    found = jacobi_decode(target, PROMPT, Stopping(window + 2), JacobiSettings(window, False), guess)
    own = [one for one in found.trace.iterations if one.window == 1]
    rows = jacobi_without_cache(model, [*PROMPT, text[0]], list(own[0].guesses))
    assert len(own[0].guesses) == window
    for row, iteration in zip(rows, own, strict=False):
        assert list(iteration.guesses) == row[iteration.first - 1 :]
    assert rows[-1] == text[1:]
    # A cached pass sees that a guess stands in the pass that it is put in, so it needs no pass to find nothing changed.
    assert len(rows) - 1 <= len(own) <= len(rows)
    for number, row in enumerate(rows):
        assert row[:number] == text[1 : 1 + number]


@pytest.mark.parametrize("slide", [True, False])
def test_right_guesses_take_the_fewest_passes(slide: bool) -> None:
    model, target = model_and_target("llama")
    text = native(model, PROMPT, 31)
    found = jacobi_decode(target, PROMPT, Stopping(31), JacobiSettings(4, slide), Right([*PROMPT, *text]))
    assert [one.fixed for one in found.trace.iterations] == [5] * 6
    assert found.tokens_per_pass == 5.0
    assert bool((found.trace.right_after(found.tokens)[found.trace.matrix() >= 0] == 0).all())


@pytest.mark.parametrize("slide", [True, False])
def test_right_after_counts_refinements(slide: bool) -> None:
    """Against a walk over every position's own history."""
    model, target = model_and_target("llama")
    text = native(model, PROMPT, 60)
    guess = Right([*PROMPT, *text], 0.4)
    found = jacobi_decode(target, PROMPT, Stopping(60), JacobiSettings(6, slide), guess)
    matrix, right = found.trace.matrix().tolist(), found.trace.right_after(found.tokens).tolist()
    seen = set()
    for place in range(len(matrix[0])):
        history = [row[place] for row in matrix if row[place] >= 0]
        truth = found.tokens[place] if place < len(found.tokens) else None
        marks = [mark for row, mark in zip(matrix, (own[place] for own in right), strict=True) if row[place] >= 0]
        settled = len(history)
        while settled and history[settled - 1] == truth:
            settled -= 1
        assert marks == [-1] * settled + [settled] * (len(history) - settled)
        seen |= set(marks)
    assert {-1, 0} <= seen
    assert max(seen) > 1


def test_an_end_token_stops_it() -> None:
    model, target = model_and_target("llama")
    text = native(model, PROMPT, 20)
    end = text[9]
    found = jacobi_decode(target, PROMPT, Stopping(20, frozenset([end])), JacobiSettings(6), Right([*PROMPT, *text]))
    assert list(found.tokens) == text[: text.index(end) + 1]


def test_guesses() -> None:
    path = TokenPath([3, 4, 5], None)
    assert LastTokenGuess().tokens(path, [], 3) == [5, 5, 5]
    assert LastTokenGuess().tokens(path, [8, 9], 2) == [9, 9]
    prompt = PromptGuess()
    prompt.begin([3, 4, 5])
    assert [*prompt.tokens(path, [], 2), *prompt.tokens(path, [3, 4], 3)] == [3, 4, 5, 3, 4]
    lookup = DrafterGuess(LookupDrafter())
    repeated = [1, 2, 3, 4, 5, 6, 1, 2, 3]
    lookup.begin(repeated)
    assert list(lookup.tokens(TokenPath(repeated, None), [], 3)) == [4, 5, 6]
    assert list(lookup.tokens(TokenPath(repeated, None), [4], 2)) == [5, 6]
    lookup.begin([1, 2, 3])
    assert list(lookup.tokens(TokenPath([1, 2, 3], None), [], 2)) == [3, 3]


def test_no_window_is_refused() -> None:
    with pytest.raises(RestpointError, match=r"^window is 0"):
        JacobiSettings(0)


@pytest.mark.slow
def test_the_bundled_model_too(reference: Loaded) -> None:
    target = LayeredTarget(LayeredModel(reference.model))
    prompt = reference.tokenizer.encode("def area(width, height):\n    return")
    expected = native(reference.model, prompt, 32)
    found = jacobi_decode(target, prompt, Stopping(32), JacobiSettings(8), DrafterGuess(LookupDrafter()))
    assert list(found.tokens) == expected


def test_models_of_recurrent_state_are_refused() -> None:
    from restpoint.decode.target import NativeTarget

    with pytest.raises(RestpointError, match="drafter"):
        jacobi_decode(NativeTarget(LayeredModel(build("mamba"))), PROMPT)
