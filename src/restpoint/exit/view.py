"""What can be known of tokens at a layer where they might stop: the way so far, and where it seems to lead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from restpoint.equilibrium.predictors import IdentityPredictor, Predictor
from restpoint.errors import RestpointError
from restpoint.model.layered import LayeredModel


class Readout:
    """From states after a layer to the law of the next token: a predictor of the rest state, then the model's head.

    Args:
        layered: the model.
        predictors: by layer. Each reads states of layers up to that one; a layer without one is read by the logit lens.
        vocabulary: tokens that an exit may emit, so that the head is read in part; None for all. Laws are over these.

    Raises:
        RestpointError: a predictor belongs to another layer, or reads the rest state of the token before, which an
            exit leaves unknown; or a vocabulary is given for a model whose head has no direct form.
    """

    def __init__(
        self,
        layered: LayeredModel,
        predictors: Mapping[int, Predictor] | None = None,
        vocabulary: Int[Tensor, " tokens"] | None = None,
    ):
        self.layered = layered
        self.vocabulary = None
        if vocabulary is not None:
            if not layered.head.direct:
                raise RestpointError("vocabulary: this model's head cannot be cut to some tokens; leave it out")
            self.vocabulary = vocabulary.to(layered.device)
            self._rows = layered.head.rows(self.vocabulary)
            self._places = torch.full((layered.vocabulary_size,), -1, device=layered.device)
            self._places[self.vocabulary] = torch.arange(len(vocabulary), device=layered.device)
        self.predictors: dict[int, Predictor] = {}
        for layer, predictor in (predictors or {}).items():
            if predictor.exit_layer != layer or not layer < layered.depth:
                raise RestpointError(
                    f"predictors: {predictor.name} reads layer {predictor.exit_layer} and is given for layer {layer} "
                    f"of {layered.depth}; give it for the layer that it reads"
                )
            if predictor.recurrent:
                raise RestpointError(
                    f"predictors: {predictor.name} reads the rest state of the token before, which is not known after "
                    "an exit; give the lens, an affine or a Monge predictor"
                )
            self.predictors[layer] = predictor.to(layered.device, layered.dtype)

    def predictor(self, layer: int) -> Predictor:
        """Who reads that layer."""
        return self.predictors.get(layer) or IdentityPredictor((layer,))

    def logits(self, rest: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows vocab"]:
        """The model's own head on (predicted) rest states, over the tokens that may be emitted, in float32."""
        if self.vocabulary is None:
            return self.layered.logits(rest[None])[0].float()
        head = self.layered.head
        return head.unembed(head.rest_state(rest[None]), *self._rows)[0].float()

    def tokens(self, places: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Ids of tokens, by their places among those that may be emitted."""
        return places if self.vocabulary is None else self.vocabulary[places]

    def places(self, tokens: Int[Tensor, "*batch"]) -> Int[Tensor, "*batch"]:
        """Places of tokens among those that may be emitted; -1 where one is not among them."""
        return tokens if self.vocabulary is None else self._places[tokens]

    def over_all(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows all"]:
        """Logits of the whole vocabulary: minus infinity for tokens that are not emitted."""
        if self.vocabulary is None:
            return logits
        whole = logits.new_full((logits.shape[0], self.layered.vocabulary_size), float("-inf"))
        return whole.index_copy_(1, self.vocabulary, logits)


@dataclass(eq=False)
class View:
    """Some tokens at a candidate layer. What costs time is computed when it is asked for, and once.

    Attributes:
        layer: layers that the tokens have passed.
        states: h_0 .. h_layer of the tokens.
        readout: how states are read.
        earlier: the same tokens at the candidate layer before; None at the first one.
    """

    layer: int
    states: Sequence[Float[Tensor, "rows hidden"]]
    readout: Readout
    earlier: "View | None" = None

    @property
    def state(self) -> Float[Tensor, "rows hidden"]:
        """h_layer."""
        return self.states[self.layer]

    def step(self, back: int = 0) -> Float[Tensor, "rows hidden"]:
        """h_l - h_{l-1}, l = layer - back."""
        return self.states[self.layer - back] - self.states[self.layer - back - 1]

    @cached_property
    def rest(self) -> Float[Tensor, "rows hidden"]:
        """The predicted rest states."""
        predictor = self.readout.predictor(self.layer)
        return predictor.predict([self.states[layer] for layer in predictor.state_layers])

    @cached_property
    def logits(self) -> Float[Tensor, "rows vocab"]:
        """Of the law that an exit here would emit."""
        return self.readout.logits(self.rest)

    @cached_property
    def law(self) -> Float[Tensor, "rows vocab"]:
        """The law that an exit here would emit, over the tokens that may be emitted."""
        return self.logits.softmax(-1)

    @cached_property
    def log_law(self) -> Float[Tensor, "rows vocab"]:
        """That law's logarithm."""
        return self.logits.log_softmax(-1)

    @cached_property
    def entropy(self) -> Float[Tensor, " rows"]:
        """Of that law, in nats."""
        return torch.special.entr(self.law).sum(-1)

    @cached_property
    def lead(self) -> tuple[Float[Tensor, "rows 2"], Int[Tensor, "rows 2"]]:
        """The two largest logits, and their places."""
        values, places = self.logits.topk(2, -1)
        return values, places

    @cached_property
    def tokens(self) -> Int[Tensor, " rows"]:
        """Ids of the most probable tokens."""
        return self.readout.tokens(self.lead[1][:, 0])

    @cached_property
    def top_two(self) -> Float[Tensor, "rows 2"]:
        """Probabilities of the two most probable tokens."""
        return self.law.gather(-1, self.lead[1])

    def select(self, rows: Int[Tensor, " some"]) -> "View":
        """The same view of some of the tokens, nothing computed yet."""
        earlier = None if self.earlier is None else self.earlier.select(rows)
        return View(self.layer, [state[rows] for state in self.states], self.readout, earlier)


def views(states: Float[Tensor, "rows levels hidden"], layers: Sequence[int], readout: Readout) -> list[View]:
    """Views at several layers of tokens whose states h_0 .. h_{levels-1} are all known, as in a recording."""
    levels = list(states.unbind(1))
    seen: list[View] = []
    for layer in layers:
        seen.append(View(layer, levels[: layer + 1], readout, seen[-1] if seen else None))
    return seen
