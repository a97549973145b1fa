"""How often a predictor's drafts stand, and what they cost on this machine."""

import torch
from torch import Tensor

from restpoint.decode.calibrate import AcceptanceCounter
from restpoint.decode.control import Calibration, Controller
from restpoint.decode.costs import Costs, device_name, measure_drafts, measure_passes, name_of
from restpoint.decode.draft import TokenPath
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.drafters.lookup import MATCH_EDGES, SuffixIndex, match_confidences
from restpoint.decode.sampling import Sampler
from restpoint.decode.settings import SamplingSettings
from restpoint.decode.target import LayeredTarget
from restpoint.equilibrium.predictors import Predictor
from restpoint.fit.recording import Recording
from restpoint.profile import Drafting, Measured
from restpoint.transport.variation import acceptance


class CostMeter:
    """Measures costs on this machine; passes that several predictors share are timed once.

    Args:
        target: the model.
    """

    def __init__(self, target: LayeredTarget):
        self.target = target
        self._passes: dict[int, tuple[float, ...]] = {}

    def passes(self, exit_layer: int) -> tuple[float, ...]:
        """Seconds of passes that resume at a layer."""
        if exit_layer not in self._passes:
            self._passes[exit_layer] = measure_passes(self.target, exit_layer)
        return self._passes[exit_layer]

    def of_lookup(self) -> Costs:
        """Costs of drafts that take no time."""
        return self._costs(0, (0.0, 0.0))

    def of(self, predictor: Predictor, vocabulary: Tensor | None) -> Costs:
        """Costs of drafting by a predictor."""
        flat = Calibration((), ((1.0,), (1.0,)), ((1.0,), (1.0,)))
        controller = Controller(Costs("", "", (1.0,) * 9, (0.0, 0.0)), flat, fixed=1)
        drafter = ExitDrafter(self.target, predictor, Sampler(SamplingSettings()), controller, vocabulary)
        layered = self.target.layered
        rest = torch.zeros(1, 1, layered.hidden_size, dtype=layered.dtype, device=layered.device)
        path = TokenPath([1 % layered.vocabulary_size] * 129, rest)

        def draft(count: int) -> None:
            controller.fixed = count
            drafter.propose(path, count)

        return self._costs(predictor.exit_layer, measure_drafts(self.target, draft))

    def _costs(self, exit_layer: int, draft: tuple[float, float]) -> Costs:
        layered = self.target.layered
        return Costs(device_name(layered.device), name_of(layered.dtype), self.passes(exit_layer), draft)


def measure_lookup(recorded: Recording, meter: CostMeter) -> Drafting:
    """How often tokens copied from the text stand, on the model's own held-out text, and what passes cost."""
    counters = {kind: AcceptanceCounter(MATCH_EDGES) for kind in ("greedy", "sampled")}
    for index, tokens in recorded.held_out_tokens():
        own = recorded.own(index)
        kinds = [own] if own else [] if recorded.has_own_text else ["greedy", "sampled"]
        suffixes = SuffixIndex()
        for length in range(1, len(tokens)):
            suffixes.extend(tokens[:length])
            copied, match = suffixes.longest(min(6, len(tokens) - length))
            for step, confidence in enumerate(match_confidences(match, len(copied))):
                stands = copied[step] == tokens[length + step]
                for kind in kinds if length >= recorded.prompt_length else ():
                    counters[kind].add(step, torch.tensor([confidence]), torch.tensor([float(stands)]))
                if not stands:
                    break
    return Drafting(counters["greedy"].calibration(), counters["sampled"].calibration(), meter.of_lookup())


@torch.no_grad()
def measure(
    recorded: Recording, predictor: Predictor, vocabulary: Tensor | None, meter: CostMeter
) -> tuple[Drafting, Measured]:
    """Acceptance on held-out text, calibration, and costs of one predictor.

    Greedy decoding is calibrated on what the model wrote greedily, along paths whose earlier drafts all stood; sampling
    on what it sampled. Without its own text both are calibrated on the text read.
    """
    layered = recorded.layered
    counters = {"greedy": AcceptanceCounter(), "sampling": AcceptanceCounter()}
    totals = torch.zeros(2, 3, dtype=torch.float64)
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
        meter.of(predictor, vocabulary),
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
