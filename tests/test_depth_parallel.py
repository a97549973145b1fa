"""Sweeps over a model's depth: against the plain pass, one token at a time over a cache, and greedy text."""

import pytest
import torch
from torch import Tensor

from decoding import PROMPT, costs, model_and_target, native, sees_trees, tokens_of
from families import FAMILIES, build
from restpoint.decode.control import Control
from restpoint.decode.draft import TokenPath
from restpoint.decode.drafters.depth_parallel import DepthParallelDrafter
from restpoint.decode.fusion import Fusion
from restpoint.decode.joint import joint_sweeps
from restpoint.decode.loop import Stopping, decode
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import Kept, LayeredTarget
from restpoint.equilibrium.depth import sweep_depth
from restpoint.equilibrium.depth_starts import start_from_first, start_from_previous
from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.depth import head_bytes, layer_bytes, layer_functions, sweep_bytes, tokens_alone
from restpoint.model.layered import LayeredModel

TEXT = [5, 17, 40, 3, 88, 21, 9, 60]
TREES = [family for family in FAMILIES if sees_trees(family)]


def read(layered: LayeredModel, tokens: list[int]) -> tuple[SlotCache, Tensor]:
    """A cache that has read the tokens, and h_0 .. h_L of all of them."""
    cache = layered.cache()
    kept = [(plan := layered.plan(torch.tensor([tokens]), cache)).hidden]
    layered.run(plan, keep=kept)
    cache.commit([len(tokens)])
    return cache, torch.cat(kept)


@pytest.mark.parametrize("family", TREES)
def test_tokens_alone_are_what_decoding_meets(family: str) -> None:
    """Every token's sweeps, all at once, are those of the token by itself over the cache of the tokens before it."""
    layered = LayeredModel(build(family))
    together = tokens_alone(layered, torch.tensor([TEXT]))
    reference = layered.model(torch.tensor([TEXT]), use_cache=False, output_hidden_states=True).hidden_states
    for level in range(layered.depth):  # transformers' last one is behind the final norm
        torch.testing.assert_close(together.states[level], reference[level][0], rtol=1e-4, atol=1e-4)
    first, previous = together.states[0, 1:], together.states[:, :-1]
    start = torch.cat(
        (start_from_first(together.states[0, :1], layered.depth), start_from_previous(first, previous)), 1
    )
    found = list(sweep_depth(together.layers, together.states[0], start))
    for token in range(1, len(TEXT)):
        cache, states = read(layered, TEXT[:token])
        plan = layered.plan(torch.tensor([TEXT[token : token + 1]]), cache)
        alone = sweep_depth(
            layer_functions(layered, plan), plan.hidden, start_from_previous(plan.hidden, states[:, None, -1:])
        )
        for swept, own in zip(found, alone, strict=True):
            torch.testing.assert_close(swept.states[:, token], own.states[:, 0, 0], rtol=2e-3, atol=2e-3)
    for swept in found:
        exact = slice(1, swept.exact + 1)
        torch.testing.assert_close(swept.states[: swept.exact], together.states[exact], rtol=1e-3, atol=1e-3)


def test_bytes() -> None:
    layered = LayeredModel(build("llama"))
    sizes = layer_bytes(layered)
    state = layered.model.state_dict()
    for layer, size in enumerate(sizes):
        prefix = f"model.layers.{layer}."
        assert size == 4 * sum(value.numel() for name, value in state.items() if name.startswith(prefix))
    assert head_bytes(layered) == 4 * state["lm_head.weight"].numel()
    assert sweep_bytes(layered, 1) == sum(sizes)
    assert sweep_bytes(layered, 3) == 9 * sizes[0]
    assert sweep_bytes(layered, 99) == 10 * sizes[0]
    ids = torch.tensor([[3]])
    before = layered.work.layer_calls
    plan = layered.plan(ids, layered.cache())
    for _ in zip(range(3), sweep_depth(layer_functions(layered, plan), plan.hidden), strict=False):
        pass
    assert (layered.work.layer_calls - before) * sizes[0] == sweep_bytes(layered, 3)


PARENTS, TOKENS = [-1, -1, 0, 1, 1], [11, 12, 13, 14, 15]


@pytest.mark.parametrize("start", [None, start_from_previous])
def test_as_many_sweeps_as_layers_are_the_targets_law(start) -> None:
    layered = LayeredModel(build("llama"))
    cache, states = read(layered, TEXT[:-1])
    drafter = DepthParallelDrafter(layered, lambda: cache, layered.depth, start=start)
    drafter.begin(TEXT[:-1])
    drafter.on_states(states[:, -1])
    rows = [drafter.start(TokenPath(TEXT, None))]
    rows += [drafter.extend(PARENTS[:2], TOKENS[:2]), drafter.extend(PARENTS[2:], TOKENS[2:])]
    paths: list[list[int]] = [[]]
    for parent, token in zip(PARENTS, TOKENS, strict=True):
        paths.append([*paths[parent + 1], token])
    for row, path in zip(torch.cat(rows), paths, strict=True):
        expected = layered.model(torch.tensor([TEXT + path]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-3)
    assert cache.lengths == [len(TEXT) - 1]


def text_with(target: LayeredTarget, sweeps: int) -> list:
    """Rounds of greedy decoding, drafted for by so many sweeps."""
    drafter = DepthParallelDrafter(target.layered, lambda: target.cache, sweeps, start=start_from_previous)

    def on_kept(kept: Kept) -> None:
        assert kept.last is not None
        drafter.on_states(kept.last)

    target.watcher = on_kept
    made = costs()
    made.draft["depth-parallel"] = (0.01, 0.01)
    fusion = Fusion([], drafter, Sampler(SamplingSettings()), Control.alone(made), None)
    return list(decode(target, PROMPT, Sampler(SamplingSettings()), Stopping(24), fusion))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sweeps", [1, 2, 4])
def test_greedy_text_is_the_targets_own(family: str, sweeps: int) -> None:
    model, target = model_and_target(family)
    rounds = text_with(target, sweeps)
    assert tokens_of(rounds) == native(model, PROMPT, 24)
    assert sum(turn.drafted for turn in rounds) > 0
    if sweeps == 4:  # as many as layers: drafts are right
        assert all(turn.accepted for turn in rounds if turn.drafted)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("guessed", [False, True])
def test_joint_sweeps_end_in_the_greedy_text(family: str, guessed: bool) -> None:
    """Position j is exact after (j + 1) L sweeps at most, and stays, whatever was guessed."""
    layered = LayeredModel(build(family))
    text, count = native(layered.model, TEXT, 4), 3
    cache, states = read(layered, TEXT[:-1])
    start = text[:count] if guessed else [0] * count
    sweeps = joint_sweeps(layered, cache, TEXT[-1], start, states[:, -1])
    found = [next(sweeps) for _ in range(layered.depth * (count + 1) + 2)]
    for number, tokens in enumerate(found, 1):
        right = min(number // layered.depth, count + 1)
        assert tokens[:right] == text[:right]
    assert found[-1] == text
    assert any(tokens != text for tokens in found)
    assert cache.lengths == [len(TEXT) - 1]


def test_mistakes_are_told() -> None:
    layered = LayeredModel(build("llama"))
    with pytest.raises(RestpointError, match=r"^sweeps is 0"):
        DepthParallelDrafter(layered, layered.cache, 0)
    chains = DepthParallelDrafter(layered, layered.cache, 1, trees=False)
    chains.start(TokenPath(TEXT, None))
    with pytest.raises(RestpointError, match=r"^drafter: this model family"):
        chains.extend([-1, -1], [3, 4])
    with pytest.raises(RestpointError, match=r"^cache: it holds 2 texts"):
        next(joint_sweeps(layered, layered.cache(2), 3, [4]))
    with pytest.raises(RestpointError, match=r"^ids: there is no token"):
        tokens_alone(layered, torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(RestpointError, match=r"^layered: its layers take no attention mask"):
        tokens_alone(LayeredModel(build("mamba")), torch.tensor([TEXT]))
