"""Attention sinks: positions that draw attention for where they stand and not for what they say.

With A the attention of a head, alpha_k = mean over the queries i >= k of A_ik, and Sink_k^e is the share of heads with
alpha_k > e. Sinks come together with values that are small (the head attends there to do nothing) and with a few
enormous coordinates of the residual stream. alpha falls with the length of the text by itself, so everything here is
measured on texts of one length.

Paper:
    Gu et al. 2024, "When attention sink emerges in language models"; Xiao et al. 2024, "Efficient streaming language
    models with attention sinks"; Guo et al. 2024, "Active-dormant attention heads"; Sun et al. 2024, "Massive
    activations in large language models".
"""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor, nn
from transformers import PreTrainedModel

from restpoint.errors import RestpointError
from restpoint.trajectory.attention import attention_of
from restpoint.trajectory.measure import Attention, Measure, Trajectory

LENGTH = 64
SINK = 0.3
DORMANT = 0.5
_PEAK = 100.0
_PEAK_TO_MEDIAN = 1000.0
_FEWEST_QUERIES = 16
_DOMAIN = "dormant."


def residual_peaks(states: Float[Tensor, "*batch hidden"]) -> Bool[Tensor, "*batch hidden"]:
    """Coordinates with |h| > 100 and |h| > 1000 times the median of |h| over all states of the same layer.

    Args:
        states: states of one text, (tokens, hidden) for one layer or (depth, tokens, hidden) for all; the median is
            over the last two axes.
    """
    size = states.abs()
    median = size.flatten(-2).median(-1).values[..., None, None]
    return (size > _PEAK) & (size > _PEAK_TO_MEDIAN * median)


def sink_rate(
    received: Float[Tensor, "*batch heads tokens"], threshold: float = SINK
) -> Float[Tensor, "*batch tokens"]:
    """Sink_k^e: the share of heads with alpha_k > e, for every position k."""
    return (received > threshold).to(received.dtype).mean(-2)


class Sinks(Measure):
    """Where attention goes to rest, on texts of one length.

    Trajectories must come with their attention, measured on exactly ``length`` tokens: cut texts to that many before
    they are read. Others are passed over and counted. Attention layers are those that the trajectory has, in order.

    Results ("share" and "mean" are over texts):
        "texts", "skipped": how many were measured, and how many had another length.
        "received.first" (layers, heads): mean alpha_0.
        "sink_rate" (layers,): mean Sink_0^e.
        "dispersed" (layers,): mean number of positions k > 0 with alpha_k > e in some head. Only positions that 16
            queries or more see are looked at: the last token alone would be a sink of every head that looks at itself.
        "dispersed.ids", "dispersed.counts", "dispersed.rates": the ids that most often are such sinks in some layer,
            at most 16, how often they are, and of how many of their occurrences. Empty where texts carry no ids.
        "massive" (): mean number of positions where some layer's residual stream peaks.
        "massive.received" (layers,): the weight that heads give these positions together, sum of alpha_k; mean over
            heads.
        "value_drain" (layers,): ‖v_0‖ over the text's median of ‖v_k‖; mean over heads. Below 1, the sink says little.
        "entropy" (layers, heads): mean entropy of a query's weights in nats.
        "peaks" (depth,): mean number of coordinates that peak, as `residual_peaks` has it.
        "peaks.positions" (depth, length), "peaks.dimensions" (depth, hidden): how often each position and each
            dimension holds one, in number of texts and of positions.
        "magnitude" (depth,): mean of the largest |h| over the median; a text whose median is 0 counts as 0.
        "dormant.DOMAIN" (layers, heads): for each domain, the share of its texts on which a head is dormant, i.e. gives
            more than half of its weight to the first position, alpha_0 > 0.5. A head that is dormant in one domain
            and active in another has specialised.

    Args:
        length: tokens of every text that is measured; 64 in the paper, and figures of different lengths do not compare.
        threshold: e.
        vocabulary: number of token ids, to tell which tokens are dispersed sinks; 0 where they are not told.

    Raises:
        RestpointError: an argument is out of its range, or a text of the right length comes without attention.
    """

    name: ClassVar[str] = "sinks"
    needs_attention: ClassVar[bool] = True
    papers: ClassVar[tuple[str, ...]] = (
        "Gu et al. 2024, When attention sink emerges in language models: an empirical view",
        "Xiao, Tian, Chen, Han, Lewis 2024, Efficient streaming language models with attention sinks",
        "Guo et al. 2024, Active-dormant attention heads: mechanistically demystifying extreme-token phenomena",
        "Sun, Chen, Kolter, Liu 2024, Massive activations in large language models",
    )

    def __init__(self, length: int = LENGTH, threshold: float = SINK, vocabulary: int = 0):
        super().__init__()
        if length < 2:
            raise RestpointError(f"length is {length}; give 2 tokens at least, and 64 to compare with the paper")
        if not 0 < threshold < 1:
            raise RestpointError(f"threshold is {threshold}; give a share of attention between 0 and 1, such as 0.3")
        if vocabulary < 0:
            raise RestpointError(f"vocabulary is {vocabulary}; give the number of token ids, or 0 to leave them out")
        self.length = length
        self.threshold = threshold
        self.vocabulary = vocabulary

    @torch.no_grad()
    def add(self, trajectory: Trajectory) -> None:
        """Measure one text, or count that it has another length."""
        fits = trajectory.states.shape[1] == self.length
        self._add("skipped", torch.tensor(int(not fits)))
        if not fits:
            return
        if trajectory.attention is None:
            raise RestpointError("trajectory: it has no attention; record it with the attention of every layer")
        self._add("texts", torch.tensor(1))
        self._add_received(trajectory, trajectory.attention)
        self._add_dispersed(trajectory, trajectory.attention)
        self._add_peaks(trajectory, trajectory.attention)

    def _add_received(self, trajectory: Trajectory, attention: Attention) -> None:
        first = attention.received[..., 0]
        norms = attention.value_norms.double()
        median = norms.median(-1).values
        drain = torch.where(median > 0, norms[..., 0] / median, 1)  # values that are nothing hold no one back
        self._add("first", first)
        self._add("sinks", sink_rate(attention.received, self.threshold)[:, 0])
        self._add("entropy", attention.entropy)
        self._add("drain", drain.mean(-1))
        self._add(f"{_DOMAIN}{trajectory.domain}", (first > DORMANT).long())
        self._add(f"texts.{trajectory.domain}", torch.tensor(1))

    def _add_dispersed(self, trajectory: Trajectory, attention: Attention) -> None:
        sinks = (attention.received > self.threshold).any(1).cpu()
        sinks[:, 0] = False
        sinks[:, max(1, self.length - _FEWEST_QUERIES + 1) :] = False
        self._add("dispersed", sinks.sum(-1))
        if self.vocabulary and trajectory.ids is not None:
            ids = trajectory.ids.cpu()
            if not bool((ids < self.vocabulary).all()):
                raise RestpointError(
                    f"vocabulary is {self.vocabulary} and a text has the id {int(ids.max())}; give more"
                )
            looked_at = ids[1 : max(1, self.length - _FEWEST_QUERIES + 1)]
            self._add("ids", torch.bincount(looked_at, minlength=self.vocabulary))
            self._add("ids.sinks", torch.bincount(ids[sinks.any(0)], minlength=self.vocabulary))

    def _add_peaks(self, trajectory: Trajectory, attention: Attention) -> None:
        peaks = residual_peaks(trajectory.states)
        massive = peaks.any(-1).any(0)
        size = trajectory.states.double().abs().flatten(-2)
        median = size.median(-1).values
        self._add("peaks", peaks.sum((-2, -1)))
        self._add("peaks.positions", peaks.any(-1).long())
        self._add("peaks.dimensions", peaks.sum(-2))
        self._add("magnitude", torch.where(median > 0, size.amax(-1) / median, 0))
        self._add("massive", massive.sum())
        self._add("massive.received", attention.received[..., massive.to(attention.received.device)].sum(-1).mean(-1))

    def results(self) -> dict[str, Float64[Tensor, "..."]]:
        """As the class says; of texts that were all passed over, only how many."""
        sums = {name: value.double() for name, value in self.sums.items()}
        if "texts" not in sums:
            return {"skipped": sums["skipped"]} if sums else {}
        texts = sums["texts"]
        results = {
            "texts": texts,
            "skipped": sums["skipped"],
            "received.first": sums["first"] / texts,
            "sink_rate": sums["sinks"] / texts,
            "dispersed": sums["dispersed"] / texts,
            "massive": sums["massive"] / texts,
            "massive.received": sums["massive.received"] / texts,
            "value_drain": sums["drain"] / texts,
            "entropy": sums["entropy"] / texts,
            "peaks": sums["peaks"] / texts,
            "peaks.positions": sums["peaks.positions"],
            "peaks.dimensions": sums["peaks.dimensions"],
            "magnitude": sums["magnitude"] / texts,
        }
        if "ids" in sums:
            results |= _most_frequent(sums["ids.sinks"], sums["ids"])
        for name, value in sums.items():
            if name.startswith(_DOMAIN):
                results[name] = value / sums[f"texts.{name.removeprefix(_DOMAIN)}"]
        return results


def _most_frequent(sinks: Tensor, seen: Tensor, count: int = 16) -> dict[str, Tensor]:
    ids = sinks.argsort(descending=True, stable=True)[:count]
    ids = ids[sinks[ids] > 0]
    return {
        "dispersed.ids": ids.double(),
        "dispersed.counts": sinks[ids],
        "dispersed.rates": sinks[ids] / seen[ids],
    }


@dataclass(frozen=True, eq=False)
class RepeatedToken:
    """What attention does with a text of one token only, repeated.

    All h_0 are equal there where positions enter by rotation (or by a bias of scores) and not by embedding. Any
    weights then average equal values, so all states stay equal at every depth, whatever attention does: no position
    can be told from the first, and no sink can form by content.

    Attributes:
        received_first: alpha_0.
        uniform: alpha_0 of uniform attention, H_T / T: 0.0741 for 64 tokens.
        sink_rate: Sink_0^0.3.
        spread: the largest distance of a state from the text's first one over that one's norm; rounding where
            positions are not embedded.
    """

    received_first: Float[Tensor, "layers heads"]
    uniform: float
    sink_rate: Float[Tensor, " layers"]
    spread: Float[Tensor, " depth"]


@torch.no_grad()
def repeated_token_check(model: PreTrainedModel, token: int = 0, length: int = LENGTH) -> RepeatedToken:
    """Read one token, repeated, and see whether the sink of the first position is there without a first word.

    The attention is uniform, and alpha_0 = H_T / T, where scores do not depend on the distance either. Rotations do
    make them depend on it, alike for all queries, so single heads are above and below; what rotations forbid is that
    the first position is preferred.

    Raises:
        RestpointError: the model's attention cannot be observed, or the token is not in its vocabulary.

    Paper:
        Gu et al. 2024, "When attention sink emerges in language models", section 3 and appendix B.
    """
    size = int(cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0])
    if not 0 <= token < size:
        raise RestpointError(f"token is {token} and the vocabulary has {size} tokens; give one of them")
    ids = torch.full((1, length), token, device=model.device)
    attention = attention_of(model, ids)[0]
    states = torch.stack(model.base_model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states)
    states = states[:, 0].double()
    distance = (states - states[:, :1]).norm(dim=-1).amax(-1)
    uniform = sum(1 / count for count in range(1, length + 1)) / length
    first = attention.received[..., 0]
    return RepeatedToken(first, uniform, sink_rate(attention.received)[:, 0], distance / states[:, 0].norm(dim=-1))
