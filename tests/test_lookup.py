"""Copying from the text: the longest match, against a search of all of it; and taking turns without a changed token."""

import random

import pytest
import torch

from families import VOCABULARY, build
from restpoint.decode.control import Calibration, Controller, Pace
from restpoint.decode.costs import Costs
from restpoint.decode.draft import Draft, TokenPath
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.drafters.lookup import LONGEST_MATCH, MATCH_EDGES, LookupDrafter, SuffixIndex, match_confidences
from restpoint.decode.drafters.turns import TakingTurns
from restpoint.decode.loop import Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.equilibrium import IdentityPredictor
from restpoint.model.layered import LayeredModel

COSTS = Costs("here", "float32", (1.0, 1.2, 1.2, 1.25, 1.25, 1.3, 1.3, 1.35), (0.05, 0.05))
FLAT = Calibration((), ((0.5,), (0.5,)), ((1.0,), (1.0,)))
BY_MATCH = Calibration(
    MATCH_EDGES,
    ((0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9), (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)),
    ((1 / 7,) * 7, (1 / 7,) * 7),
)


def longest_by_search(tokens: list[int]) -> tuple[int, int]:
    """Start and length of the longest earlier match of the end, the latest of equally long ones."""
    best = (0, 0)
    for start in range(1, len(tokens)):
        length = 0
        while length < min(LONGEST_MATCH, start) and tokens[start - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= 2 and length >= best[1]:
            best = (start, length)
    return best


@pytest.mark.parametrize("letters", [2, 4, 9])
def test_longest_match_against_a_search(letters: int) -> None:
    draw = random.Random(letters)
    for _ in range(60):
        tokens = [draw.randrange(letters) for _ in range(draw.randrange(2, 17))]
        index = SuffixIndex()
        for stop in range(1, len(tokens) + 1):
            index.extend(tokens[:stop])
            copied, length = index.longest(3)
            start, expected = longest_by_search(tokens[:stop])
            assert length == expected
            if expected:
                text = tokens[:stop]
                for token in copied:
                    assert token == text[start + len(text) - stop]
                    text.append(token)


def test_copies_repeat_where_the_match_overlaps() -> None:
    index = SuffixIndex()
    index.extend([1, 2, 3, 1, 2, 3, 1, 2])
    copied, length = index.longest(7)
    assert copied == [3, 1, 2, 3, 1, 2, 3]
    assert length == 5
    assert match_confidences(15, 3) == [15 / 16, 1.0, 1.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_taking_turns_changes_nothing_and_uses_both(temperature: float) -> None:
    """Greedy output is plain decoding's; the law of sampled output is test_decode's matter."""
    layered = LayeredModel(build("llama"))
    target = LayeredTarget(layered)
    sampler = Sampler(SamplingSettings(temperature=temperature))
    prompt = [5, 17, 33, 5, 17, 33, 5, 17]
    pace = Pace()
    lookup = LookupDrafter(Controller(COSTS, BY_MATCH, pace=pace))
    predictor = ExitDrafter(target, IdentityPredictor((3,)), sampler, Controller(COSTS, FLAT, pace=pace))
    seen: list[type] = []

    class Watched(TakingTurns):
        def propose(self, path: TokenPath, room: int) -> Draft:
            draft = super().propose(path, room)
            seen.append(type(self._drafted_by))
            return draft

    stopping = Stopping(max_tokens=60)
    rounds = list(decode(target, prompt, sampler, stopping, Watched(lookup, predictor)))
    tokens = [token for turn in rounds for token in turn.tokens]
    assert len(tokens) == 60
    assert all(0 <= token < VOCABULARY for token in tokens)
    if temperature == 0:
        assert set(seen) == {LookupDrafter, ExitDrafter}
        plain = [t for turn in decode(target, prompt, sampler, stopping) for t in turn.tokens]
        assert tokens == plain


def test_lookup_alone_is_exact_and_pays_on_a_loop() -> None:
    """A text that repeats itself is copied in blocks."""
    layered = LayeredModel(build("llama"))
    with torch.no_grad():
        for layer in layered.stack.layers:
            layer.mlp.down_proj.weight.mul_(0.0)  # the next token depends on the last one only: greedy text is a loop
            layer.self_attn.o_proj.weight.mul_(0.0)
    target, sampler = LayeredTarget(layered), Sampler(SamplingSettings())
    prompt, stopping = [5, 17, 33], Stopping(max_tokens=80)
    plain = [t for turn in decode(target, prompt, sampler, stopping) for t in turn.tokens]
    rounds = list(decode(target, prompt, sampler, stopping, LookupDrafter(Controller(COSTS, BY_MATCH))))
    assert [t for turn in rounds for t in turn.tokens] == plain
    assert len(rounds) < 50
