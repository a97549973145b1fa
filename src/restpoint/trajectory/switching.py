"""Does a state carry the task? Put the state of a later task where the first one is at work, and see what follows.

A token at layer b < l_1 still looks for its top token. Its state there is replaced by a foreign one, and the
remaining layers run. If the task goes by the state and not by the layer, a foreign state whose own top token was
settled (task 2) makes the layers go on with the next rank: the top token that is read at layer b stays to the end. A
foreign state of task 1 is the control: it too is foreign, and too is put at layer b, but its top token is open.

Paper:
    Lioubashevski, Schlank, Stanovsky, Goldstein 2024, "Looking beyond the top-1: transformers determine top tokens in
    order".
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel
from restpoint.trajectory.saturation import saturation_layers, top_tokens
from restpoint.trajectory.task_examples import Examples


@dataclass(frozen=True, eq=False)
class Injection:
    """What followed after states were put into one text, each into a run of its own.

    Attributes:
        switched: the top token read from the foreign state at once is the one emitted in the end, and at all layers
            between: the run does not look for it any more.
        carried: the token emitted in the end is the foreign state's top token at the layer where it went in; like
            `switched`, but the layers between may differ.
        kept: the token emitted is the one that the text emits without the injection: nothing switched.
    """

    switched: Bool[Tensor, " runs"]
    carried: Bool[Tensor, " runs"]
    kept: Bool[Tensor, " runs"]


@dataclass(frozen=True)
class Switching:
    """How often behaviour switches, in shares of the runs.

    Attributes:
        runs: injections of each kind.
        switched, carried, kept: as in `Injection`, for states of task 2.
        control_switched, control_carried, control_kept: for states of task 1, into the same places.
    """

    runs: int
    switched: float
    carried: float
    kept: float
    control_switched: float
    control_carried: float
    control_kept: float


@torch.no_grad()
def inject(
    layered: LayeredModel, ids: Int[Tensor, " tokens"], layer: int, states: Float[Tensor, "runs hidden"]
) -> Injection:
    """Replace h_layer of a text's last token by each of several states, and run the layers after it.

    Earlier tokens stay as they are: only the last token's own state is foreign.

    Args:
        layered: the model.
        ids: the text.
        layer: 0 to L - 1; the state is what enters layer number ``layer``, counted from 0.
        states: one for each run; the runs are one batch.

    Raises:
        RestpointError: there is no such layer.
    """
    if not 0 <= layer < layered.depth:
        raise RestpointError(f"layer is {layer} and the model has {layered.depth}; give one from 0 on, below that")
    own = layered.plan(ids[None])
    before = layered.run(own, 0, layer)  # once: up to there the runs are the same
    emitted = layered.logits(layered.run(own, layer, hidden=before)[:, -1:])[0, 0].argmax()
    plan = layered.plan(ids.expand(len(states), -1))
    hidden = before.expand(len(states), -1, -1).clone()
    hidden[:, -1] = states.to(hidden)
    kept = [hidden]
    layered.run(plan, layer, hidden=hidden, keep=kept)
    top = top_tokens(torch.stack([state[:, -1] for state in kept]), partial(_lens, layered), 1)
    first, last = top[0, :, 0], top[-1, :, 0]
    return Injection(saturation_layers(top)[:, 0] == 0, first == last, last == emitted)


@torch.no_grad()
def measure_switching(
    layered: LayeredModel, texts: Iterable[Int[Tensor, "_"]], examples: Examples, runs: int = 8, seed: int = 0
) -> Switching:
    """Inject states of task 2 into texts whose last token is at task 1, and as many of task 1 for comparison.

    For each text the layer b < l_1 is drawn evenly, so without an injection the top token always changes later on. The
    two kinds of states come in pairs from one layer, so they differ in their task and not in size or depth.

    Args:
        layered: the model.
        texts: token ids; an effect on the last token is measured. Those whose top token never changes are passed over.
        examples: balanced, as `TaskExamples.balanced` gives them; of other texts.
        runs: injections of each kind into one text.
        seed: of what is drawn.

    Raises:
        RestpointError: the examples are not balanced or have no task 2, or no text was at task 1.
    """
    later, first = (_by_layer(examples, task) for task in (2, 1))
    if not len(later) or not torch.equal(examples.layers[later], examples.layers[first]):
        raise RestpointError(
            "examples: they are not as many of task 1 as of task 2 at every layer; pass TaskExamples.balanced()"
        )
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(2, 3, dtype=torch.int64)
    total = 0
    for ids in texts:
        states: list[Tensor] = []
        plan = layered.plan(ids[None])
        layered.run(plan, keep=states)
        own = torch.stack([state[0, -1:] for state in (plan.hidden, *states)])
        settled = int(saturation_layers(top_tokens(own, partial(_lens, layered), 1)))
        if settled == 0:
            continue
        layer = int(torch.randint(settled, (), generator=generator))
        drawn = torch.randint(len(later), (runs,), generator=generator)
        chosen = torch.cat([later[drawn], first[drawn]])
        found = inject(layered, ids, layer, examples.states[chosen])
        shown = torch.stack([found.switched, found.carried, found.kept], -1).cpu()
        counts += shown.view(2, runs, 3).sum(1)
        total += runs
    if not total:
        raise RestpointError("texts: the last token of none was at task 1 with a layer to spare; pass more texts")
    switched, control = (counts.double() / total).tolist()
    return Switching(total, *switched, *control)


def _by_layer(examples: Examples, task: int) -> Int[Tensor, " count"]:
    rows = (examples.tasks == task).nonzero()[:, 0]
    return rows[examples.layers[rows].argsort(stable=True)]


def _lens(layered: LayeredModel, states: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocabulary"]:
    return layered.logits(states[None])[0]
