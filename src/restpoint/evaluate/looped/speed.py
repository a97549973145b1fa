"""Time per token in decoding: one text, cached, one token a pass, every way in turn with the full count."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median

import torch
from jaxtyping import Int
from torch import Tensor

from restpoint.equilibrium.exits import ExitCriterion
from restpoint.evaluate.looped.warm import Way
from restpoint.evaluate.statistics import Ratio, paired_ratio
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.progress import Progress


@dataclass(frozen=True)
class Timed:
    """What a way took.

    Attributes:
        name: of the way.
        setting: of its criterion.
        milliseconds: per token, median over texts.
        full_milliseconds: of the full count, likewise, in the runs beside these.
        speed: times the full count's rate, in pairs.
        steps: core steps per decoded token.
    """

    name: str
    setting: float
    milliseconds: float
    full_milliseconds: float
    speed: Ratio
    steps: float


@torch.no_grad()
def decode_greedily(
    model: RecurrentDepthForCausalLM,
    prompt: Int[Tensor, "1 prompt"],
    new_tokens: int,
    num_steps: int,
    exits: ExitCriterion | None,
    way: Way,
) -> tuple[list[int], list[int], float]:
    """Tokens, the steps of each pass, and seconds per token; the pass over the prompt is not in the time."""
    cache = model.new_cache(budget=way.budget, capacity=prompt.shape[1] + new_tokens)

    def pass_over(ids: Tensor) -> tuple[Tensor, Tensor]:
        output = model(
            ids,
            cache=cache,
            num_steps=num_steps,
            exits=exits,
            start=way.start,
            solver=way.solver,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].argmax(-1, keepdim=True), output.steps

    token, _ = pass_over(prompt)
    tokens, steps = [int(token)], []
    begun = time.perf_counter()
    for _ in range(new_tokens):
        token, ran = pass_over(token)
        tokens.append(int(token))
        steps.append(int(ran))
    return tokens, steps, (time.perf_counter() - begun) / new_tokens


def time_decoding(
    model: RecurrentDepthForCausalLM,
    ids: Int[Tensor, "texts length"],
    num_steps: int,
    timed: Mapping[str, tuple[float, ExitCriterion, Way]],
    progress: Progress,
) -> list[Timed]:
    """Decode the second half of each text from its first, each way right after the full count.

    The first text is run once before anything is timed. Ratios are of runs beside each other, so that a busy machine
    slows both.

    Args:
        model: the model.
        ids: texts.
        num_steps: the full count.
        timed: by name, the setting, the criterion and the way.
        progress: called after each text.
    """
    given = ids.shape[1] // 2
    new_tokens = ids.shape[1] - given
    for _, exits, way in [(0.0, None, Way()), *timed.values()]:
        decode_greedily(model, ids[:1, :given], new_tokens, num_steps, exits, way)
    own: dict[str, dict[str, list[float]]] = {name: {} for name in timed}
    full: dict[str, dict[str, list[float]]] = {name: {} for name in timed}
    steps: dict[str, list[float]] = {name: [] for name in timed}
    for number, text in enumerate(ids):
        progress("time decoding", number, len(ids))
        prompt = text[None, :given]
        for name, (_, exits, way) in timed.items():
            _, _, seconds = decode_greedily(model, prompt, new_tokens, num_steps, None, Way())
            full[name][str(number)] = [1 / seconds]
            _, ran, seconds = decode_greedily(model, prompt, new_tokens, num_steps, exits, way)
            own[name][str(number)] = [1 / seconds]
            steps[name].append(float(mean(ran)))
    progress("time decoding", len(ids), len(ids))
    return [
        Timed(
            name,
            setting,
            _typical(own[name]),
            _typical(full[name]),
            paired_ratio(own[name], full[name]),
            mean(steps[name]),
        )
        for name, (setting, _, _) in timed.items()
    ]


def _typical(rates: Mapping[str, list[float]]) -> float:
    return 1000 * median(1 / rate for own in rates.values() for rate in own)
