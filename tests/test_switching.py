"""Foreign states put into a run: against hooks on the model's own forward, and what must follow by construction."""

import itertools
import math

import pytest
import torch

from families import VOCABULARY, build
from restpoint import bundled
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.measure import Trajectory
from restpoint.trajectory.record import states_of
from restpoint.trajectory.switching import inject, measure_switching
from restpoint.trajectory.task_examples import Examples, TaskExamples


def some_ids(length: int = 10, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed))


def hooked(model, ids: torch.Tensor, layer: int, state: torch.Tensor) -> list[int]:
    """Top tokens of the last position from ``layer`` on, when the model's own forward gets the foreign state."""
    seen: list[torch.Tensor] = []

    def replace(_module, arguments, keywords):
        hidden = arguments[0].clone()
        hidden[0, -1] = state
        seen.append(hidden)
        return (hidden, *arguments[1:]), keywords

    layers = model.model.layers
    hooks = [layers[layer].register_forward_pre_hook(replace, with_kwargs=True)]
    hooks += [each.register_forward_hook(lambda _m, _a, output: seen.append(output)) for each in layers[layer:]]
    final = model(input_ids=ids[None]).logits[0, -1].argmax()
    for hook in hooks:
        hook.remove()
    top = [int(model.lm_head(model.model.norm(hidden[0, -1])).argmax()) for hidden in seen]
    assert top[-1] == int(final)
    return top


@pytest.mark.parametrize("layer", [0, 2, 3])
@torch.no_grad()
def test_injection_is_that_of_a_hook_in_the_models_own_forward(layer: int) -> None:
    model = build("llama")
    layered = LayeredModel(model)
    ids = some_ids()
    states = torch.randn(40, 32, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 60, 40)[:, None]
    found = inject(layered, ids, layer, states)
    emitted = int(model(input_ids=ids[None]).logits[0, -1].argmax())
    for run, state in enumerate(states):
        top = hooked(model, ids, layer, state)
        assert bool(found.switched[run]) == (len(set(top)) == 1)
        assert bool(found.carried[run]) == (top[0] == top[-1])
        assert bool(found.kept[run]) == (top[-1] == emitted)
    assert {*found.carried.tolist()} == {True, False}


@torch.no_grad()
def test_a_texts_own_state_changes_nothing() -> None:
    layered = LayeredModel(build("llama"))
    ids = some_ids()
    states = states_of(layered, ids[None], (0, 1, 2, 3))[0, -1]
    for layer in range(4):
        assert inject(layered, ids, layer, states[layer : layer + 1]).kept.tolist() == [True]


def settling(seed: int, scale: float) -> torch.Tensor:
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(seed)) * scale


def test_states_too_large_to_be_moved_switch_and_tiny_ones_do_not() -> None:
    """A state that dwarfs whatever layers add keeps its top token; one near zero has none of its own."""
    layered = LayeredModel(build("llama"))
    count = torch.arange(6)
    examples = Examples(
        torch.cat([settling(0, 1e5), settling(1, 1e-6)]),
        torch.tensor([2] * 6 + [1] * 6),
        torch.cat([count, count]),
        torch.zeros(12, dtype=torch.long),
    )
    texts = [some_ids(seed=seed) for seed in range(6)]
    found = measure_switching(layered, texts, examples, runs=6)
    assert found.runs % 6 == 0
    assert found.runs > 0
    assert (found.switched, found.carried) == (1, 1)
    assert found.control_switched < 0.5
    assert found == measure_switching(layered, texts, examples, runs=6)


def test_arguments_are_refused_by_name() -> None:
    layered = LayeredModel(build("llama"))
    with pytest.raises(RestpointError, match=r"^layer is 4"):
        inject(layered, some_ids(), 4, torch.zeros(1, 32))
    two = torch.arange(2)
    lopsided = Examples(torch.zeros(2, 32), two + 1, two, two)
    with pytest.raises(RestpointError, match=r"^examples: they are not as many"):
        measure_switching(layered, [some_ids()], lopsided)
    even = Examples(torch.zeros(2, 32), two + 1, 0 * two, two)
    with pytest.raises(RestpointError, match=r"^texts: the last token of none"):
        measure_switching(layered, [], even)


@pytest.mark.slow
def test_bundled_model_switches_more_often_than_the_control(reference) -> None:
    layered = LayeredModel(reference.model)
    documents = [
        torch.tensor(reference.tokenizer(text)["input_ids"][:48]) for text in itertools.islice(bundled.fit_texts(), 40)
    ]
    sample = TaskExamples(lambda state: layered.logits(state[None])[0], tasks=2, capacity=40, tokens=32)
    for index, ids in enumerate(documents[:20]):
        states = states_of(layered, ids[None], tuple(range(layered.depth)))[0].transpose(0, 1).float()
        sample.add(Trajectory(states, index))
    found = measure_switching(layered, documents[20:], sample.balanced(), runs=8)
    noise = math.sqrt(0.5 / found.runs)  # at most: one standard deviation of the difference of two shares
    assert found.switched > found.control_switched + 3 * noise
