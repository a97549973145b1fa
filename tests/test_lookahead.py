"""Lookahead: the pool against a search of all it was told, the window against Jacobi iteration, the tree's form."""

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from drafts import check_tree
from restpoint.decode.draft import ROOT, Candidates, Draft, TokenPath, Verified
from restpoint.decode.drafters.lookahead import LookaheadDrafter, LookaheadSettings, NgramPool
from restpoint.errors import RestpointError

LETTERS = 6
Choice = Callable[[Sequence[int]], int]


def hashed(context: int) -> Choice:
    """A deterministic model: the next token is a hash of the last ``context`` tokens."""

    def choice(text: Sequence[int]) -> int:
        return random.Random(str(list(text[-context:]))).randrange(LETTERS)

    return choice


def by_position(text: Sequence[int]) -> int:
    """A model that does not care what the tokens are: Jacobi iteration is exact after one pass."""
    return (len(text) * 5 + len(text) // 4) % LETTERS


def verify(choice: Choice, path: TokenPath, draft: Draft) -> Verified:
    """What a greedy target makes of a draft."""
    choices = [choice(text) for text in draft.prefixes(path.tokens)]
    children, nodes = draft.children(), [ROOT]
    while (following := children[nodes[-1] + 1].get(choices[nodes[-1] + 1])) is not None:
        nodes.append(following)
    logits = torch.nn.functional.one_hot(torch.tensor(choices), LETTERS).float()
    return Verified(draft, logits, nodes[1:], choices[nodes[-1] + 1])


def random_tree(draw: random.Random, nodes: int) -> Draft:
    tokens: list[int] = []
    parents: list[int] = []
    while len(tokens) < nodes:
        parent, token = draw.randrange(-1, len(tokens)), draw.randrange(LETTERS)
        if (parent, token) not in zip(parents, tokens, strict=True):
            parents.append(parent)
            tokens.append(token)
    return Draft(tokens, parents)


def held(pool: NgramPool) -> set[tuple[int, ...]]:
    return {(token, *ngram) for token in range(LETTERS) for ngram, _ in pool.after(token)}


# --- the pool -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guesses", "capacity"), [(1, 4), (3, 8), (4, 1000)])
def test_pool_against_a_list(guesses: int, capacity: int) -> None:
    draw = random.Random(capacity)
    pool = NgramPool(guesses, capacity)
    latest: list[tuple[int, ...]] = []  # the one seen longest ago first
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(400):
        ngram = tuple(draw.randrange(LETTERS) for _ in range(draw.randrange(2, 5)))
        pool.add(ngram)
        seen[ngram] = seen.get(ngram, 0) + 1
        latest = [*(known for known in latest if known != ngram), ngram]
        same = [known for known in latest if known[0] == ngram[0]]
        for gone in same[: len(same) - guesses] if len(same) > guesses else latest[: max(0, len(latest) - capacity)]:
            latest.remove(gone)
            del seen[gone]
        for token in range(LETTERS):
            expected = [(known[1:], seen[known]) for known in reversed(latest) if known[0] == token]
            assert pool.after(token) == expected
        assert len(pool) == len(latest) <= capacity


def test_prolonging_against_a_search() -> None:
    draw = random.Random(5)
    found = 0
    for _ in range(150):
        pool, added = NgramPool(99, 999), []
        for _ in range(draw.randrange(8)):
            added.append(tuple(draw.randrange(4) for _ in range(draw.randrange(2, 5))))
            pool.add(added[-1])
        text, overlap = [draw.randrange(4) for _ in range(draw.randrange(6))], draw.randrange(1, 4)
        best: tuple[int, tuple[int, ...]] = (0, ())
        for ngram in added:
            for shared in range(1, min(overlap, len(text), len(ngram) - 1) + 1):
                if list(ngram[:shared]) == text[-shared:] and shared >= best[0]:
                    best = (shared, ngram)
        more, seen = pool.prolong(text, overlap)
        assert more == best[1][best[0] :]
        assert seen == added.count(best[1])
        found += bool(more)
    assert found > 50


# --- what is learnt -------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [hashed(1), hashed(3), by_position], ids=["one", "three", "position"])
@pytest.mark.parametrize("window", [1, 4, 7])
def test_the_window_is_refined_as_jacobi_iteration_does(choice: Choice, window: int) -> None:
    """y_i <- F(text, y_1 .. y_{i-1}) for all i at once, from the definition; and greedy text comes out."""
    drafter = LookaheadDrafter(LookaheadSettings(window=window, longest=3))
    text, rounds = [1, 4, 2, 2], 0
    drafter.begin(text[:-1])
    plain = list(text)
    while len(plain) < 44:
        plain.append(choice(plain))
    while len(text) < 44:
        path = TokenPath(list(text), None)
        drafter.candidates(path, 16)
        guesses = drafter.window
        assert len(guesses) == window
        refined = [choice([*text, *guesses[:index]]) for index in range(window + 1)]
        verified = verify(choice, path, Draft.chain(guesses))
        drafter.learn(path, verified)
        gained = verified.new_tokens
        assert drafter.window == refined[len(gained) :][:window]
        assert refined[: len(gained)] == gained  # what stands is the iteration's fixed part
        text += gained
        rounds += 1
        assert len(text) - 4 >= rounds  # n passes fix n tokens at least
    assert text[:44] == plain
    if choice is by_position:
        assert rounds <= 2 + 40 // (window // 2 + 1)


def test_a_window_that_was_not_drafted_moves_on_unrefined() -> None:
    drafter = LookaheadDrafter(LookaheadSettings(window=4))
    path = TokenPath([1, 4, 2], None)
    drafter.begin([1, 4])
    drafter.candidates(path, 4)
    guesses = drafter.window
    drafter.learn(path, verify(lambda _text: 5, path, Draft()))
    assert drafter.window == guesses[1:]
    cut = TokenPath([1, 4, 2, 5], None)
    drafter.candidates(cut, 4)
    guesses = drafter.window
    other = (guesses[0] + 1) % LETTERS  # the target's choice: the first guess falls, the second node is not drafted
    drafter.learn(cut, verify(lambda _text: other, cut, Draft.chain(guesses[:1])))
    assert drafter.window == [other, *guesses[2:]]


def test_the_pool_learns_iterations_rejected_nodes_and_text() -> None:
    """Every n-gram from its definition, on random trees that hold some of the window."""
    longest, choice, draw = 4, hashed(2), random.Random(3)
    drafter = LookaheadDrafter(LookaheadSettings(window=5, longest=longest, guesses=10**4, capacity=10**6))
    text = [1, 4, 2, 2, 0]
    drafter.begin(text[:-1])
    expected = {tuple(text[:-1])}
    origins: dict[int, tuple[int, ...]] = {}  # position: the guesses one before, two before, .., that led to its guess
    for _ in range(40):
        path = TokenPath(list(text), None)
        drafter.candidates(path, 5)
        guesses, start = drafter.window, len(text)
        drawn = random_tree(draw, draw.randrange(1, 12))
        keep = draw.randrange(6)  # so much of the window, beside the random nodes
        tree = Draft.chain(guesses[:keep])
        merged, at = dict(zip(zip(tree.parents, tree.tokens, strict=True), range(keep), strict=True)), {ROOT: ROOT}
        for node, key in enumerate(zip(drawn.parents, drawn.tokens, strict=True)):
            at[node] = merged.setdefault((at[key[0]], key[1]), len(merged))
        draft = Draft([token for _, token in merged], [parent for parent, _ in merged])
        verified = verify(choice, path, draft)
        prefixes = draft.prefixes(text)
        known = {tuple(prefix) for prefix in prefixes}
        for node, prefix in enumerate(prefixes[1:]):
            ngram, grown = [draft.tokens[node]], list(prefix)
            while tuple(grown) in known and len(ngram) < longest:
                grown.append(choice(grown))
                ngram.append(grown[-1])
            if node not in verified.nodes:
                expected.add(tuple(ngram))
        led: dict[int, tuple[int, ...]] = {}
        for index, guess in enumerate(guesses):
            if (*text, *guesses[: index + 1]) not in known:
                led |= {start + later: origins.get(start + later, ()) for later in range(index + 1, len(guesses))}
                break
            led[start + index + 1] = (*origins.get(start + index, ()), guess)[1 - longest :]
            expected.add((*led[start + index + 1], choice([*text, *guesses[: index + 1]])))
        origins = led
        text += verified.new_tokens
        expected |= {tuple(text[end - longest : end]) for end in range(start + 1, len(text) + 1)}
        drafter.learn(path, verified)
        assert held(drafter.pool) == expected
    assert {len(ngram) for ngram in expected} == {2, 3, 4}


def test_texts_share_the_pool_only_if_told() -> None:
    for keep, prompt in ((True, True), (True, False), (False, True)):
        drafter = LookaheadDrafter(LookaheadSettings(keep_pool=keep, from_prompt=prompt, longest=2))
        drafter.begin([1, 2])
        drafter.begin([3, 4])
        assert held(drafter.pool) == ({(1, 2)} if keep and prompt else set()) | ({(3, 4)} if prompt else set())
        path = TokenPath([3, 4, 5], None)
        again = LookaheadDrafter(LookaheadSettings(from_prompt=prompt, longest=2))
        again.begin([3, 4])
        drafter.candidates(path, 3)
        again.candidates(path, 3)
        assert drafter.window == again.window or keep  # a text's window does not depend on the texts before


# --- candidates -----------------------------------------------------------------------------------


def paths(found: Candidates) -> list[tuple[int, ...]]:
    texts: list[tuple[int, ...]] = []
    for token, parent in zip(found.tokens, found.parents, strict=True):
        texts.append((*(() if parent == ROOT else texts[parent]), token))
    return texts


@pytest.mark.parametrize("window", [0, 3])
def test_candidates_are_trees_that_hold_the_pool_and_the_window(window: int) -> None:
    draw = random.Random(window)
    deepest = 0
    for _ in range(60):
        drafter = LookaheadDrafter(LookaheadSettings(window=window, longest=draw.randrange(2, 5), guesses=5))
        text = [draw.randrange(LETTERS) for _ in range(draw.randrange(1, 40))]
        drafter.begin(text[:-1])
        for room in (0, 1, 2, 9):
            found = drafter.candidates(TokenPath(text, None), room)
            check_tree(found, room)
            texts = paths(found)
            chains = [ngram for ngram, _ in drafter.pool.after(text[-1])] + [tuple(drafter.window)]
            assert {chain[:room] for chain in chains} <= {(), *texts}
            deepest = max(deepest, max((len(path) for path in texts), default=0))
    assert deepest == 9


def test_confidences_are_shares_of_what_was_seen() -> None:
    drafter = LookaheadDrafter(LookaheadSettings(window=0, longest=3))
    for ngram in ([0, 1, 2], [0, 1, 2], [0, 1, 3], [0, 4, 5]):
        drafter.pool.add(ngram)
    found = drafter.candidates(TokenPath([0], None), 8)
    shares = dict(zip(paths(found), found.confidences, strict=True))
    assert shares == {(4,): 1 / 5, (4, 5): 1 / 2, (1,): 3 / 5, (1, 3): 1 / 4, (1, 2): 2 / 4}


def test_a_loop_is_drafted_as_deep_as_there_is_room() -> None:
    drafter = LookaheadDrafter(LookaheadSettings(window=0, longest=3))
    loop = [0, 1, 2, 0, 3] * 4
    drafter.begin(loop)
    found = drafter.candidates(TokenPath([*loop, 0], None), 12)
    assert tuple((loop * 2)[1:13]) in paths(found)  # 0 -> 1 and 0 -> 3 are told apart by the token before


def test_settings_errors() -> None:
    for wrong, message in (
        ({"window": -1}, "window is -1; give 0"),
        ({"longest": 1}, "longest is 1; an n-gram needs"),
        ({"guesses": 0}, "guesses is 0"),
        ({"guesses": 9, "capacity": 8}, "capacity is 8, below the 9"),
    ):
        with pytest.raises(RestpointError, match=message):
            LookaheadSettings(**wrong)
    assert len(LookaheadDrafter.prior) == len(LookaheadDrafter.edges) + 1
    assert list(LookaheadDrafter.prior) == sorted(LookaheadDrafter.prior)
