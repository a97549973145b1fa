"""How often drafters' tokens stand, and what drafts and passes cost on this machine."""

import torch
from torch import Tensor

from restpoint.decode.acceptance import AcceptanceCounter
from restpoint.decode.costs import Costs, device_name, measure_drafts, measure_passes, name_of
from restpoint.decode.draft import ROOT, InstantDrafter, SteppedDrafter, TokenPath, Verified
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.target import NO_DRAFT, LayeredTarget
from restpoint.equilibrium.predictors import Predictor
from restpoint.fit.recording import Recording
from restpoint.profile import Calibrations, Measured
from restpoint.transport.variation import acceptance

_CHILDREN = 8
_ROOM = 8
_SEQUENCES = 24


class CostMeter:
    """Measures costs on this machine; the passes, which all drafters share, are timed once.

    Args:
        target: the model.
        trees: whether it can verify trees.
    """

    def __init__(self, target: LayeredTarget, trees: bool = True):
        self.target = target
        self.trees = trees
        self._verify = measure_passes(target)
        self._draft: dict[str, tuple[float, float]] = {}

    def of(self, drafter: SteppedDrafter) -> tuple[float, float]:
        """Seconds of a drafter's first and each later level."""
        self._draft[drafter.name] = measure_drafts(self.target, [drafter])
        return self._draft[drafter.name]

    def of_predictor(self, predictor: Predictor, vocabulary: Tensor | None) -> tuple[float, float]:
        """Seconds of the first and each later level of drafts by a predictor."""
        return self.of(ExitDrafter(self.target, predictor, vocabulary, trees=self.trees))

    def costs(self) -> Costs:
        """All that was measured."""
        layered = self.target.layered
        return Costs(device_name(layered.device), name_of(layered.dtype), self._verify, dict(self._draft))


def measure_instant(recorded: Recording, drafter: InstantDrafter) -> Calibrations:
    """How often an instant drafter's tokens stand, on the model's own held-out text.

    It goes through the text as if every token were a round of plain decoding, so what it can learn from drafts that
    were verified is missing.
    """
    counters = {kind: AcceptanceCounter(drafter.edges) for kind in ("greedy", "sampled")}
    read = dict.fromkeys(counters, 0)
    for index, tokens in recorded.held_out_tokens():
        own = recorded.own(index)
        kinds = [own] if own else [] if recorded.has_own_text else list(counters)
        kinds = [kind for kind in kinds if read[kind] < _SEQUENCES]
        if not kinds:
            continue
        outcomes = _outcomes(drafter, tokens, recorded.rests(index), recorded)
        for kind in kinds:
            read[kind] += 1
            for step, (confidences, stood) in enumerate(outcomes):
                counters[kind].add(step, torch.tensor(confidences), torch.tensor(stood))
    return Calibrations(counters["greedy"].calibration(), counters["sampled"].calibration())


def _outcomes(
    drafter: InstantDrafter, tokens: list[int], rests: Tensor, recorded: Recording
) -> list[tuple[list[float], list[float]]]:
    """Confidences, and whether the token stood, of first and of later candidates whose parent stood."""
    outcomes: list[tuple[list[float], list[float]]] = [([], []), ([], [])]
    logits = recorded.layered.logits(rests[None])[0]
    start = recorded.prompt_length
    drafter.begin(tokens[:start])
    for length in range(start, len(tokens)):
        path = TokenPath(tokens[:length], rests[None, length - 2 : length - 1])
        candidates = drafter.candidates(path, min(_ROOM, len(tokens) - length))
        places = {ROOT: length}  # for every candidate that stands, the place of the token after it
        for node, (token, parent) in enumerate(zip(candidates.tokens, candidates.parents, strict=True)):
            if (place := places.get(parent)) is None or place >= len(tokens):
                continue
            confidences, stood = outcomes[parent != ROOT]
            confidences.append(candidates.confidences[node])
            stood.append(float(tokens[place] == token))
            if tokens[place] == token:
                places[node] = place + 1
        drafter.learn(path, Verified(NO_DRAFT, logits[length - 1 : length], (), tokens[length]))
    return outcomes


@torch.no_grad()
def measure(
    recorded: Recording, predictor: Predictor, vocabulary: Tensor | None, meter: CostMeter
) -> tuple[Calibrations, Measured]:
    """Acceptance on held-out text, calibration, and costs of one predictor.

    The confidence of a token is the probability q that the predictor gives it. Greedy decoding is calibrated on how
    often each of the eight most probable tokens is the model's choice, on what the model wrote greedily, along paths
    whose earlier tokens were among the eight; sampling on the probability that the model gives each, on what it
    sampled. Without its own text both are calibrated on the text read.
    """
    layered = recorded.layered
    counters = {"greedy": AcceptanceCounter(), "sampling": AcceptanceCounter()}
    totals = torch.zeros(2, 3, dtype=torch.float64)
    chain = torch.zeros(2, 2, dtype=torch.float64)
    has_own = recorded.has_own_text
    mapped = predictor.to(layered.device)
    for index in recorded.held_out:
        chunk = recorded.held_out_chunk(index)
        assert chunk.layers is not None
        states = [chunk.states[0, :, chunk.layers.index(layer)] for layer in predictor.state_layers]
        rest = chunk.rest[0]
        true = recorded.laws(rest)
        best = true.argmax(-1)
        own = recorded.own(index)
        previous, stands = rest, torch.ones(len(rest) - 1, dtype=torch.bool, device=rest.device)
        for step in range(3):
            first = step + 1
            predicted = mapped.predict([state[first:] for state in states], previous[:-1], step)
            law = recorded.laws(predicted)
            if vocabulary is not None:
                allowed = torch.zeros(law.shape[-1], device=law.device)
                allowed[vocabulary.to(law.device)] = 1
                law = law * allowed
                law = law / law.sum(-1, keepdim=True)
            confidences, named = law.topk(min(_CHILDREN, law.shape[-1]))
            right = named == best[first:, None]
            if step == 0:
                accepted = acceptance(law, true[first:])
                totals[int(own is not None)] += (
                    torch.stack([accepted.sum(), right[:, 0].sum(), torch.tensor(len(right))]).double().cpu()
                )
            if own == "greedy" or not has_own:
                counters["greedy"].add(step, confidences[stands].flatten(), right[stands].float().flatten())
                chain[min(step, 1)] += torch.stack([right[stands, 0].sum(), stands.sum()]).double().cpu()
            if own == "sampled" or not has_own:
                p = true[first:].gather(1, named)
                counters["sampling"].add(step, confidences.flatten(), p.flatten())
            stands = (stands & right.any(-1))[:-1]
            previous = predicted
    natural, own_totals = (row / row[2].clamp_min(1) for row in totals)
    seconds = meter.of_predictor(predictor, vocabulary)
    first, later = (float(row[0] / row[1].clamp_min(1)) for row in chain)
    measured = Measured(
        predictor=predictor.name,
        exit_layer=predictor.exit_layer,
        acceptance=float(natural[0]),
        top1=float(natural[1]),
        own_acceptance=float(own_totals[0]) if has_own else None,
        own_top1=float(own_totals[1]) if has_own else None,
        multiplications=predictor.parameters_read(),
        expected_speed=_chain_speed(first, later, seconds, meter.costs().verify),
    )
    return Calibrations(counters["greedy"].calibration(), counters["sampling"].calibration()), measured


def _chain_speed(first: float, later: float, draft: tuple[float, float], verify: tuple[float, ...]) -> float:
    """Rate of the best chain of one token or more over plain decoding, by tokens (1 + sum of reaches) over seconds."""
    tokens, reach, seconds, best = 1.0, 1.0, 0.0, 0.0
    for length in range(1, len(verify)):
        reach *= first if length == 1 else later
        tokens += reach
        seconds += draft[length > 1]
        best = max(best, tokens * verify[0] / (seconds + verify[length]))
    return best
