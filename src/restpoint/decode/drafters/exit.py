"""Drafts read from an early layer, or from no layer at all, through a predictor of the rest state."""

import math

import torch
from torch import Tensor

from restpoint.decode.control import Controller
from restpoint.decode.draft import Draft, Drafter, TokenPath
from restpoint.decode.sampling import Sampler
from restpoint.decode.target import LayeredTarget
from restpoint.equilibrium.predictors import Predictor
from restpoint.errors import RestpointError
from restpoint.transport.variation import draw


class ExitDrafter(Drafter):
    """Runs the first E layers on each drafted token and predicts where it will come to rest.

    The state at the exit layer, with the rest state of the token before where the predictor wants it, gives a
    predicted rest state; the model's own head turns that into the law q of the next token. Keys, values and exit
    states are shared with the verification, which resumes at layer E. With E = 0 no layer runs.

    Args:
        target: the model that verifies; its cache is written to.
        predictor: from states of layers up to E to h_L.
        sampler: the processors that apply to draft and target alike.
        controller: how many tokens to draft.
        vocabulary: tokens that may be drafted (a frequent few make the head cheap); None for all. Verification stays
            exact: other tokens come from the residual and the bonus.

    Raises:
        RestpointError: the predictor's exit layer is not below the model's depth, or a draft vocabulary is asked of a
            model whose head has no direct form.
    """

    def __init__(
        self,
        target: LayeredTarget,
        predictor: Predictor,
        sampler: Sampler,
        controller: Controller,
        vocabulary: Tensor | None = None,
    ):
        layered = target.layered
        if predictor.exit_layer >= layered.depth:
            raise RestpointError(
                f"predictor: exit layer {predictor.exit_layer} is not below the model's {layered.depth} layers"
            )
        if vocabulary is not None and not layered.head.direct:
            raise RestpointError("vocabulary: this model's head cannot be cut to some tokens; leave it out")
        self.target = target
        self.predictor = predictor.to(layered.device, layered.dtype)
        self.sampler = sampler
        self.controller = controller
        self.vocabulary = None if vocabulary is None else vocabulary.to(layered.device)
        self._computed = 0
        self._rows = None if vocabulary is None else layered.head.rows(vocabulary)

    def propose(self, path: TokenPath, room: int) -> Draft:
        """See :meth:`Drafter.propose`; the controller decides, token by token."""
        controller, layer = self.controller, self.predictor.exit_layer
        room = min(room, controller.longest)
        tokens: list[int] = []
        laws: list[Tensor] = []
        confidences: list[float] = []
        exits: list[Tensor] = []
        rest, reach = path.rest, 1.0
        self._computed = 0
        while len(tokens) <= room:
            wanted = controller.another(len(tokens), reach, room)
            if not wanted and (not tokens or layer == 0):
                break
            states = self._states(
                tokens[-1] if tokens else path.pending, len(path.tokens) - 1 + len(tokens), len(tokens)
            )
            if layer > 0:
                exits.append(states[-1])
            if not wanted:
                break
            rest = self.predictor.predict([states[index] for index in self._reads], rest, len(tokens))
            token, confidence, law = self._next(rest, path.tokens + tokens)
            self._computed += 1
            if math.isnan(confidence):  # processors left no token that may be drafted
                break
            reach = controller.include(len(tokens), reach, confidence, room)
            if reach == 0.0:
                break
            confidences.append(confidence)
            tokens.append(token if law is None else int(draw(law, self.sampler.uniforms(1)[0])))
            if law is not None:
                laws.append(law)
        return Draft(
            tokens,
            torch.stack(laws) if laws else None,
            confidences,
            layer,
            torch.cat(exits, 1) if exits else None,
        )

    def observe(self, draft: Draft, accepted: int) -> None:
        """See :meth:`Drafter.observe`."""
        self.controller.observe(draft.confidences, accepted, self._computed)

    @property
    def _reads(self) -> tuple[int, ...]:
        return self.predictor.state_layers

    def _states(self, token: int, position: int, offset: int) -> list[Tensor]:
        """States of one new token at layers 0 .. E."""
        layered = self.target.layered
        ids = torch.tensor([[token]], device=layered.device)
        if self.predictor.exit_layer == 0:
            return [layered.embed(ids, position)]
        plan = layered.plan(ids, self.target.cache, offset=offset)
        states = [plan.hidden]
        layered.run(plan, stop=self.predictor.exit_layer, keep=states)
        return states

    def _next(self, rest: Tensor, prefix: list[int]) -> tuple[int, float, Tensor | None]:
        """The greedy token, its probability under the draft, and the draft's law where tokens are sampled."""
        layered, sampler = self.target.layered, self.sampler
        if self._rows is None:
            logits = layered.logits(rest)[0]
        else:
            head = layered.head
            logits = head.unembed(head.rest_state(rest), *self._rows)[0]
        if sampler.greedy and not sampler.by_prefix:
            confidence, best = torch.softmax(logits.float(), -1).max(-1)
            token = best if self.vocabulary is None else self.vocabulary[best]
            return int(token), float(confidence), None
        if self.vocabulary is not None:
            full = logits.new_full((1, layered.vocabulary_size), float("-inf"))
            logits = full.index_copy_(1, self.vocabulary, logits)
        law = sampler.law(logits, prefix)[0]
        confidence, best = law.max(-1)
        return int(best), float(confidence), None if sampler.greedy else law
