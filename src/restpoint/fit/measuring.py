"""How often a predictor's drafts stand, and what they cost on this machine."""

import torch
from torch import Tensor

from restpoint.decode.calibrate import AcceptanceCounter
from restpoint.decode.control import Calibration, Controller
from restpoint.decode.costs import Costs, measure_costs
from restpoint.decode.draft import Path
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.equilibrium.predictors import Predictor
from restpoint.fit.recording import Recording
from restpoint.profile import Drafting, Measured
from restpoint.transport.variation import acceptance


def measure_drafting(target: LayeredTarget, predictor: Predictor, vocabulary: Tensor | None) -> Costs:
    """Seconds of passes and of one drafted token with this predictor, on this machine."""
    flat = Calibration((), ((1.0,), (1.0,)), ((1.0,), (1.0,)))
    unlimited = Controller(Costs("", "", (1.0,) * 9, 0.0), flat, fixed=1)
    drafter = ExitDrafter(target, predictor, Sampler(SamplingSettings()), unlimited, vocabulary)
    layered = target.layered
    rest = torch.zeros(1, 1, layered.hidden_size, dtype=layered.dtype, device=layered.device)
    path = Path([1 % layered.vocabulary_size] * 129, rest)
    return measure_costs(target, lambda: drafter.propose(path, 1), predictor.exit_layer)


@torch.no_grad()
def measure(recorded: Recording, predictor: Predictor, vocabulary: Tensor | None) -> tuple[Drafting, Measured]:
    """Acceptance on held-out text, calibration, and costs of one predictor.

    Greedy decoding is calibrated on what the model wrote greedily, along paths whose earlier drafts all stood; sampling
    on what it sampled. Without its own text both are calibrated on the text read.
    """
    layered = recorded.layered
    counters = {"greedy": AcceptanceCounter(), "sampling": AcceptanceCounter()}
    totals = torch.zeros(2, 3, dtype=torch.float64)
    has_own = {recorded.own(index) for index in recorded.held_out} >= {"greedy", "sampled"}
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
            confidence, guess = law.max(-1)
            agrees = guess == best[first:]
            accepted = acceptance(law, true[first:])
            if step == 0:
                totals[int(own is not None)] += (
                    torch.stack([accepted.sum(), agrees.sum(), torch.tensor(len(agrees))]).double().cpu()
                )
            if own == "greedy" or not has_own:
                counters["greedy"].add(step, confidence[stands], agrees[stands].float())
            if own == "sampled" or not has_own:
                counters["sampling"].add(step, confidence, accepted)
            stands = (stands & agrees)[:-1]
            previous = predicted
    drafting = Drafting(
        counters["greedy"].calibration(),
        counters["sampling"].calibration(),
        measure_drafting(LayeredTarget(layered), predictor, vocabulary),
    )
    controller = Controller(drafting.costs, drafting.greedy)
    rates = [
        controller.expected_tokens(drafted) / controller.seconds(drafted) for drafted in range(controller.longest + 1)
    ]
    natural, own_totals = (row / row[2].clamp_min(1) for row in totals)
    return drafting, Measured(
        predictor=predictor.name,
        exit_layer=predictor.exit_layer,
        acceptance=float(natural[0]),
        top1=float(natural[1]),
        own_acceptance=float(own_totals[0]) if has_own else None,
        own_top1=float(own_totals[1]) if has_own else None,
        multiplications=predictor.parameters_read(),
        expected_speed=max(rates) / rates[0],
    )
