import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from restpoint.decode.draft import ROOT, Draft, Drawn
from restpoint.decode.verifiers.base import Outcome
from restpoint.decode.verifiers.block import Block
from restpoint.decode.verifiers.nodewise import NodeWise
from restpoint.decode.verifiers.registry import VERIFIERS, verifier
from restpoint.decode.verifiers.traversal import Traversal, _Left
from restpoint.errors import RestpointError
from restpoint.transport.couplings import MaximalCoupling, SiblingCoupling
from restpoint.transport.siblings import without
from restpoint.transport.variation import residual

VOCAB = 3
TRAVERSALS = {drawing: Traversal("traversal", drawing) for drawing in ("one", "independent", "without replacement")}


@dataclass(frozen=True)
class Remembered(SiblingCoupling):
    """A coupling that is asked once for each law and drafts: the same ones recur in many trees."""

    coupling: SiblingCoupling
    answers: dict

    def kernel(self, p, q, drafts):
        question = (*p.tolist(), *q.tolist(), *drafts)
        if question not in self.answers:
            self.answers[question] = self.coupling.kernel(p, q, drafts)
        return self.answers[question]

    def acceptance(self, p, q, count):
        return self.coupling.acceptance(p, q, count)


def remembering(way):
    if not isinstance(way, NodeWise):
        return way
    return NodeWise(way.name, Remembered(way.coupling.name, way.drawn, way.coupling, {}))


WAYS = {name: remembering(way) for name, way in VERIFIERS.items()}
EVERY = [*WAYS.values(), TRAVERSALS["independent"]]
Law = Callable[[tuple[int, ...]], torch.Tensor]


def label(value) -> str | None:
    if isinstance(value, Shape):
        return value.name
    return f"{value.name}-{value.drawn}" if hasattr(value, "drawn") else None


def model(seed: int, alpha: float = 0.5, vocab: int = VOCAB) -> Law:
    """A law of the next token for every text, different for each."""
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def law(text: tuple[int, ...]) -> torch.Tensor:
        if text not in known:
            weights = torch.from_numpy(np.random.default_rng([seed, *text]).dirichlet([alpha] * vocab))
            if sum(text) % 3 == 2:  # some tokens are impossible here and there
                weights[weights.argmin()] = 0.0
            known[text] = weights / weights.sum()
        return known[text]

    return law


@dataclass(frozen=True)
class Shape:
    """How a drafter grows a tree: below each depth so many drawn siblings and so many chosen without chance.

    Attributes:
        name: for the test's name.
        drawn: number of drawn siblings at each depth.
        chosen: number of chosen siblings at each depth: the likeliest of q.
        avoid: whether drawn ones avoid the chosen ones.
        first_only: whether only the first sibling has children.
    """

    name: str
    drawn: tuple[int, ...]
    chosen: tuple[int, ...]
    avoid: bool = False
    first_only: bool = False


CHAINS = [Shape("chain", (1, 1, 1), (0, 0, 0)), Shape("mixed-chain", (1, 0, 1), (0, 1, 0))]
SINGLE = [
    Shape("one-and-chosen", (1, 1), (1, 1)),
    Shape("one-beside-chosen", (1, 1), (2, 1), avoid=True),
    Shape("all-chosen", (0, 0), (2, 2)),
    Shape("chosen-then-drawn", (0, 1), (2, 0)),
]
TREES = [
    Shape("two-one", (2, 1), (0, 0)),
    Shape("two-and-chosen", (2, 1), (1, 0), first_only=True),
    Shape("two-two", (2, 2), (0, 0), first_only=True),
    Shape("deep", (2, 0, 1), (0, 1, 1), first_only=True),
    Shape("more-than-there-are", (3, 1), (0, 0), first_only=True),
]


def drafts(shape: Shape, q: Law, drawn: str) -> Iterator[tuple[float, Draft]]:
    """Every draft of this shape with its probability."""
    yield from grow(shape, q, drawn, 1.0, [(ROOT, ())], [], [], {})


def grow(shape, q, drawn, probability, waiting, tokens, parents, groups) -> Iterator[tuple[float, Draft]]:
    if not waiting:
        yield probability, Draft(tuple(tokens), tuple(parents), dict(groups))
        return
    (node, text), *waiting = waiting
    depth = len(text)
    law = q(text)
    chosen = law.argsort(descending=True)[: shape.chosen[depth]].tolist()
    if shape.avoid:
        law = without(law, chosen)
    count = shape.drawn[depth] if float(law.sum()) > 0 else 0
    for weight, found in sequences(law, count, drawn):
        held = list(dict.fromkeys([*found, *chosen]))
        place = {token: len(tokens) + index for index, token in enumerate(held)}
        after = dict(groups)
        if found:
            after[node] = Drawn(law, tuple(place[token] for token in found))
        grown = held[:1] if shape.first_only else held
        deeper = [(place[token], (*text, token)) for token in grown if depth + 1 < len(shape.drawn)]
        yield from grow(
            shape,
            q,
            drawn,
            probability * weight,
            [*waiting, *deeper],
            tokens + held,
            parents + [node] * len(held),
            after,
        )


def sequences(law: torch.Tensor, count: int, drawn: str) -> Iterator[tuple[float, tuple[int, ...]]]:
    if count == 0 or float(law.sum()) == 0:
        yield 1.0, ()
        return
    for token, weight in enumerate(law.tolist()):
        if weight > 0:
            rest = without(law, [token]) if drawn == "without replacement" else law
            for more, others in sequences(rest, count - 1, drawn):
                yield weight * more, (token, *others)


def rows(p: Law, draft: Draft) -> torch.Tensor:
    return torch.stack([p(tuple(text)) for text in draft.prefixes([])])


def block_law(way, shape: Shape, p: Law, q: Law, vocab: int = VOCAB) -> tuple[torch.Tensor, float, float]:
    """The joint law of the first tokens of the text, the mean number of nodes that stand, all probability."""
    length = len(shape.drawn) + 1
    law = torch.zeros([vocab] * length, dtype=torch.float64)
    accepted, total = 0.0, 0.0
    for probability, draft in drafts(shape, q, way.drawn):
        for possible in way.outcomes(rows(p, draft), draft):
            nodes, token = possible.outcome.nodes, possible.outcome.next_token
            text = (*(draft.tokens[node] for node in nodes), token)
            weight = probability * possible.probability
            total += weight
            accepted += weight * len(nodes)
            law[text] += weight * continued(p, text, length)
    return law, accepted, total


@functools.cache
def continued(p: Law, text: tuple[int, ...], length: int) -> torch.Tensor:
    """The law of the tokens from a text on, up to a length, by plain decoding."""
    if len(text) == length:
        return torch.ones((), dtype=torch.float64)
    law = p(text)
    return torch.stack([weight * continued(p, (*text, token), length) for token, weight in enumerate(law)])


def distance(way, shape: Shape, p: Law, q: Law) -> float:
    law, _, total = block_law(way, shape, p, q)
    assert total == pytest.approx(1.0, abs=1e-9)
    return float((law - continued(p, (), len(shape.drawn) + 1)).abs().sum() / 2)


def takes(way, shape: Shape) -> bool:
    if way.chains_only:
        return shape in CHAINS
    return way.drawn != "one" or shape not in TREES


CASES = [(way, shape) for way in [*EVERY, TRAVERSALS["one"]] for shape in CHAINS + SINGLE + TREES if takes(way, shape)]


# --- exactness ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("way", "shape"), CASES, ids=label)
def test_the_text_has_the_law_of_the_target(way, shape):
    for alpha in (0.5, 2.0) if shape in CHAINS else (1.0,):
        assert distance(way, shape, model(1, alpha), model(11, alpha)) < 1e-9


@pytest.mark.parametrize("way", EVERY, ids=label)
def test_a_perfect_draft_and_a_hopeless_one(way):
    shape = CHAINS[0]
    p = model(3, 2.0)
    first = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    law, accepted, _ = block_law(way, shape, p, p)
    torch.testing.assert_close(law, continued(p, (), 4), atol=1e-9, rtol=0)
    assert accepted == pytest.approx(3.0, abs=1e-6)
    law, accepted, _ = block_law(way, shape, lambda _: first, lambda _: first.flip(0))
    assert float(law[0, 0, 0, 0]) == pytest.approx(1.0, abs=1e-12)
    assert accepted == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("way", [WAYS["token-wise"], WAYS["block"], TRAVERSALS["one"]], ids=label)
def test_longer_vocabulary_and_nothing_drafted(way):
    p, q = model(5, 0.5, 4), model(6, 0.5, 4)
    law, _, _ = block_law(way, CHAINS[0], p, q, 4)
    assert float((law - continued(p, (), 4)).abs().sum()) < 1e-9
    plain = way.outcomes(p(())[None], Draft())
    assert {x.outcome.next_token: x.probability for x in plain} == pytest.approx(
        {token: weight for token, weight in enumerate(p(()).tolist()) if weight > 0}
    )


class WrongCoupling(MaximalCoupling):
    def kernel(self, p, q, drafts):
        kernel = super().kernel(p, q, drafts)
        kept = kernel[drafts[0]].clone()
        kernel = (1 - kept) * without(p, drafts)  # instead of norm((p - q)_+)
        kernel[drafts[0]] = kept
        return kernel


class WrongBlock(Block):
    def stops(self, p, draft):
        for stop in super().stops(p, draft):
            row = stop.nodes[-1] + 1 if stop.nodes else 0
            law = stop.law if len(stop.nodes) == len(draft.tokens) else p[row]
            yield type(stop)(stop.probability, stop.nodes, law)


@pytest.mark.parametrize("way", [NodeWise("wrong", WrongCoupling()), WrongBlock()], ids=label)
def test_a_wrong_residual_is_noticed(way):
    assert distance(way, CHAINS[0], model(1), model(11)) > 1e-3


def test_a_wrong_rest_in_the_traversal_is_noticed(monkeypatch):
    shape = TREES[0]
    way = TRAVERSALS["without replacement"]
    assert distance(way, shape, model(1), model(11)) < 1e-9
    monkeypatch.setattr(_Left, "after_drawn", lambda self, q: self._rest(self.measure * 0.9))
    assert distance(way, shape, model(1), model(11)) > 1e-3


def test_siblings_drawn_otherwise_are_noticed():
    way = TRAVERSALS["independent"]
    p, q = model(1), model(11)
    law = torch.zeros([VOCAB] * 3, dtype=torch.float64)
    for probability, draft in drafts(TREES[0], q, "without replacement"):
        for possible in way.outcomes(rows(p, draft), draft):
            text = (*(draft.tokens[node] for node in possible.outcome.nodes), possible.outcome.next_token)
            law[text] += probability * possible.probability * continued(p, text, 3)
    assert float((law - continued(p, (), 3)).abs().sum()) > 1e-3


# --- the draw is the law --------------------------------------------------------------------------


@pytest.mark.parametrize("way", EVERY, ids=label)
def test_verify_draws_from_the_stated_outcomes(way):
    shape = CHAINS[0] if way.chains_only else (SINGLE[0] if way.drawn == "one" else TREES[1])
    p, q = model(4, 2.0), model(14, 2.0)
    _, draft = max(drafts(shape, q, way.drawn), key=lambda pair: (len(pair[1].tokens), pair[0]))
    table = rows(p, draft)
    expected: dict[Outcome, float] = {}
    for possible in way.outcomes(table, draft):
        expected[possible.outcome] = expected.get(possible.outcome, 0.0) + possible.probability
    generator = torch.Generator().manual_seed(1)
    number = 200
    seen = dict.fromkeys(expected, 0)
    for _ in range(number):
        seen[way.verify(table, draft, lambda count: torch.rand(count, generator=generator))] += 1
    frequent = [outcome for outcome, weight in expected.items() if number * weight > 5]
    found = [seen[outcome] for outcome in frequent]
    wanted = [number * expected[outcome] for outcome in frequent]
    rest = number - sum(wanted)
    if rest > 1:
        found, wanted = [*found, number - sum(found)], [*wanted, rest]
    scale = sum(found) / sum(wanted)
    assert chisquare(found, [weight * scale for weight in wanted]).pvalue > 1e-3


def test_single_precision_is_enough():
    p, q = model(4, 2.0), model(14, 2.0)
    for way in EVERY:
        for _, draft in itertools.islice(drafts(CHAINS[0], q, way.drawn), 5):
            table = rows(p, draft)
            narrow = {node: Drawn(group.law.float(), group.nodes) for node, group in draft.drawn.items()}
            rounded = Draft(draft.tokens, draft.parents, narrow)
            exact = {x.outcome: x.probability for x in way.outcomes(table, draft)}
            found = {x.outcome: x.probability for x in way.outcomes(table.float(), rounded)}
            for outcome in exact.keys() | found.keys():
                assert found.get(outcome, 0.0) == pytest.approx(exact.get(outcome, 0.0), abs=1e-5)


# --- how much stands ------------------------------------------------------------------------------


def mean_accepted(way, shape: Shape, seed: int) -> float:
    return block_law(way, shape, model(seed, 1.0), model(seed + 50, 1.0))[1]


@pytest.mark.parametrize("shape", CHAINS, ids=label)
def test_block_verification_keeps_at_least_as_much_as_token_wise(shape):
    gains = [
        mean_accepted(WAYS["block"], shape, seed) - mean_accepted(WAYS["token-wise"], shape, seed) for seed in range(3)
    ]
    assert min(gains) > -1e-12
    assert max(gains) > 1e-2


@pytest.mark.parametrize("shape", CHAINS, ids=label)
def test_on_chains_traversal_is_block_verification(shape):
    p, q = model(8), model(18)
    for _, draft in drafts(shape, q, "one"):
        block, tree = (
            {x.outcome: x.probability for x in way.outcomes(rows(p, draft), draft)}
            for way in (WAYS["block"], WAYS["traversal"])
        )
        for outcome in block.keys() | tree.keys():
            assert tree.get(outcome, 0.0) == pytest.approx(block.get(outcome, 0.0), abs=1e-12)


@pytest.mark.parametrize("shape", [TREES[0], TREES[2], SINGLE[0], SINGLE[1]], ids=label)
@pytest.mark.parametrize("drawn", ["independent", "without replacement"])
def test_traversal_keeps_at_least_as_much_as_node_by_node(shape, drawn):
    walk = WAYS["recursive" if drawn == "without replacement" else "recursive-iid"]
    gains = [mean_accepted(TRAVERSALS[drawn], shape, seed) - mean_accepted(walk, shape, seed) for seed in range(2)]
    assert min(gains) > -1e-12
    assert max(gains) > 1e-3


def test_one_level_deep_the_optimum_keeps_most():
    shape = Shape("star", (2,), (0,))
    for seed in range(3):
        kept = {way.name: mean_accepted(way, shape, seed) for way in WAYS.values() if way.drawn != "one"}
        assert kept["optimal"] >= max(kept.values()) - 1e-7
        assert kept["optimal-iid"] >= max(kept["recursive-iid"], kept["k-seq"]) - 1e-7
        assert kept["traversal"] == pytest.approx(kept["recursive"], abs=1e-12)


# --- choice and refusals --------------------------------------------------------------------------


def test_verifiers_by_name():
    names = ["token-wise", "block", "k-seq", "recursive", "recursive-iid", "optimal", "optimal-iid", "traversal"]
    assert list(VERIFIERS) == names
    assert all(verifier(name).name == name for name in names)
    with pytest.raises(RestpointError, match=r"did you mean 'traversal'\?.*token-wise, block"):
        verifier("traverse")


UNIFORM = torch.full((4,), 0.25)
CHAIN = Draft.chain([0, 1], UNIFORM.expand(2, -1))
TWICE = Draft((0,), (-1,), {ROOT: Drawn(UNIFORM, (0, 0))})
PAIR = Draft((0, 1), (-1, -1), {ROOT: Drawn(UNIFORM, (0, 1))})


@pytest.mark.parametrize(
    ("name", "p", "draft", "words"),
    [
        ("block", UNIFORM.expand(2, -1), CHAIN, "2 rows for 2 nodes"),
        ("block", UNIFORM.half().expand(3, -1), CHAIN, "cannot hold a distribution"),
        ("block", UNIFORM.expand(3, -1), PAIR, "this draft branches"),
        ("token-wise", UNIFORM.expand(3, -1), PAIR, "one drawn token"),
        ("block", UNIFORM.expand(2, -1), TWICE, "one drawn token"),
        ("recursive", UNIFORM.expand(2, -1), TWICE, "recursive-iid"),
        ("traversal", UNIFORM.expand(2, -1), TWICE, "without replacement"),
        ("traversal", torch.full((3, 5), 0.2), CHAIN, "target's vocabulary"),
        ("optimal", UNIFORM.expand(3, -1), Draft((0, 1), (-1, 0), {0: Drawn(UNIFORM, (0,))}), "their parents differ"),
    ],
)
def test_what_cannot_be_verified_is_refused(name, p, draft, words):
    with pytest.raises(RestpointError, match=words):
        verifier(name).verify(p, draft, torch.rand)
    with pytest.raises(RestpointError, match=words):
        verifier(name).outcomes(p, draft)


def test_the_token_after_a_refused_first_draft_comes_from_the_residual():
    p, q = torch.tensor([[0.6, 0.4, 0.0], [0.2, 0.2, 0.6]]), torch.tensor([0.2, 0.0, 0.8])
    draft = Draft.chain([2], q[None])
    for way in EVERY:
        outcomes = {x.outcome: x.probability for x in way.outcomes(p, draft)}
        expected = residual(p[0], q).tolist()
        assert outcomes == pytest.approx(
            {Outcome((), token): weight for token, weight in enumerate(expected) if weight}, abs=1e-6
        )
