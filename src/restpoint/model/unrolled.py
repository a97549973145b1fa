"""A model that iterates a block, as the deep model that it unrolls to: each step's layers are layers of their own."""

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from restpoint.errors import RestpointError
from restpoint.model.cache import SlotCache
from restpoint.model.head import Head, require_finite
from restpoint.model.layered import LayeredModel
from restpoint.model.plan import Plan
from restpoint.model.recurrent.backbone import RecurrentDepthModel
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.deq import DeepEquilibriumForCausalLM
from restpoint.model.recurrent.layers import LayerPass
from restpoint.model.stack import LayerStack, Prelude
from restpoint.model.versions import causal_mask

_SOLVED = (
    "a solver decides how often its core runs, for all tokens of a pass together, so a block of several tokens ends "
    "elsewhere than they do one by one"
)


class UnrolledStack(LayerStack):
    """The layers of a recurrent-depth model in the order in which a token runs them, a core layer once for each step.

    Args:
        model: the model.
        steps: r.
    """

    def __init__(self, model: RecurrentDepthForCausalLM, steps: int):
        self.inner: RecurrentDepthModel = model.model
        self.model = model
        self.owner = self.backbone = self.inner
        self.layers: list[nn.Module] = [*self.inner.prelude, *[*self.inner.core] * steps, *self.inner.coda]
        self.argument_names = ["hidden_states", "attention_mask"]
        self.outputs = 0
        self.takes_positions = True
        self.cache_argument = "cache"

    @torch.no_grad()
    def prelude(
        self,
        ids: Int[Tensor, "batch seq"],
        positions: Int[Tensor, "batch seq"] | None,
        cache: Cache | None,
        mask: Tensor | None,
    ) -> Prelude:
        """Embeddings, and what the layers are given: rotary tables, the mask, the cache, and s_0 before the core."""
        inner, config = self.inner, self.inner.config
        hidden = inner.embed_tokens(ids) * config.embedding_scale
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device)[None]
        if mask is None or mask.ndim == 2:
            mask = causal_mask(config, hidden, mask, cache, positions)
        rotary = inner.rotary_emb(hidden, positions)
        arguments: list[dict[str, Any]] = [
            {"rotary": rotary, "attention_mask": mask, "cache": cache} for _ in self.layers
        ]
        zero = config.state_init == "zero"
        arguments[len(inner.prelude)]["state"] = torch.zeros_like(hidden) if zero else inner.noise.at(positions, hidden)
        return Prelude(hidden, arguments)

    @torch.no_grad()
    def injected_logits(self, hidden: Float[Tensor, "batch seq hidden"]) -> Float[Tensor, "batch seq vocab"]:
        """Logits of the last layer's output."""
        return self.model.lm_head(self.inner.norm(hidden))


class UnrolledModel(LayeredModel):
    """e = prelude(x); s_k = core(adapter[s_{k-1}, e]), k = 1..r: l_P + r l_R + l_C layers that share weights.

    At a fixed r that is what the model is, so all that is done with layers holds of it: a token's step k sees the keys
    that earlier tokens wrote at their step k, which are those of one of these layers. Drafts, trees, batches and
    resumption at any step need nothing of their own. States between layers are those of the residual stream: before
    layer l_P e, within the core s_k, before the coda s_r without its norm. Entering the core the state becomes s_0, and
    e is kept: with the pass, and for every token in the last layer of the cache, which holds no keys, so that a pass
    may resume at any step. The adapter belongs to a step's first layer, and is left out with it.

    Args:
        model: in evaluation mode.
        num_steps: r; the config's mean if None.

    Attributes:
        steps: r.

    Raises:
        RestpointError: the number of steps is below 1, or the model's core is solved instead of iterated r times.

    Paper:
        Geiping et al. 2025, "Scaling up test-time compute with latent reasoning: a recurrent depth approach".
    """

    stack: UnrolledStack

    def __init__(self, model: RecurrentDepthForCausalLM, num_steps: int | None = None):
        if isinstance(model, DeepEquilibriumForCausalLM):
            raise RestpointError(f"model: {_SOLVED}; it has no layers that could be named")
        self.steps = model.config.mean_recurrence if num_steps is None else num_steps
        if self.steps < 1:
            raise RestpointError(f"num_steps is {num_steps}; it must be at least 1, or None for the config's mean")
        super().__init__(model)
        self.forward_arguments = {"num_steps": self.steps}

    def cache(self, batch: int = 1, capacity: int = 256) -> SlotCache:
        """An empty cache for ``batch`` rows, with a layer more than the model, which e is kept in."""
        return SlotCache(self.depth + 1, batch, capacity)

    def after_step(self, step: int) -> int:
        """The layer before which the state is s_k.

        Raises:
            RestpointError: there is no such step.
        """
        if not 0 < step <= self.steps:
            raise RestpointError(f"step is {step}; this model runs steps 1 to {self.steps}")
        return self._first + step * self._width

    def layers_of(self, steps: int) -> int:
        """Layers that a token runs through in so many steps."""
        return self._first + steps * self._width + self.depth - self._last

    def steps_of(self, layers: float) -> float:
        """Steps in which a token runs through so many layers."""
        return (layers - self.layers_of(0)) / self._width

    def later_steps(self, step: int) -> tuple[int, ...]:
        """The layers of all steps after step k: without them, the model at r = k."""
        return tuple(range(self.after_step(step), self.after_step(self.steps)))

    def without_some(self, ids: Int[Tensor, "batch seq"]) -> tuple[frozenset[int], Tensor]:
        """See :meth:`LayeredModel.without_some`: half of the steps, by the model's own forward of so many."""
        kept = max(1, self.steps // 2)
        return frozenset(self.later_steps(kept)), self.model(input_ids=ids, use_cache=False, num_steps=kept).logits

    @torch.no_grad()
    def run(
        self,
        plan: Plan,
        start: int = 0,
        stop: int | None = None,
        hidden: Float[Tensor, "batch seq hidden"] | None = None,
        *,
        skip: Collection[int] = (),
        keep: list[Tensor] | None = None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """See :meth:`LayeredModel.run`.

        Raises:
            RestpointError: it begins within the core of a pass without a cache that has not run up to there.
        """
        stop = self.depth if stop is None else stop
        state = plan.hidden if hidden is None else hidden
        if plan.cache is not None:
            plan.cache.address = plan.address
        tokens = state.shape[0] * state.shape[1]
        for index in range(start, stop):
            state = self._enter(plan, index, state)
            if index in skip:
                continue
            state = self._layer(plan, index, state)
            self.work.layer_calls += 1
            self.work.token_layers += tokens
            if keep is not None:
                keep.append(state)
        if stop == self.depth == self._last and start < stop:  # without a coda, its norm has no layer to stand before
            state = self.stack.inner.norm(state)
        return state

    @property
    def _first(self) -> int:
        """First layer of the core."""
        return len(self.stack.inner.prelude)

    @property
    def _last(self) -> int:
        """First layer after the core."""
        return self.depth - len(self.stack.inner.coda)

    @property
    def _width(self) -> int:
        return len(self.stack.inner.core)

    def _enter(self, plan: Plan, index: int, state: Tensor) -> Tensor:
        """What the state becomes where a layer begins the core or the coda."""
        if index == self._first:
            own = plan.arguments[index]
            own["injected"] = state
            if plan.cache is not None:
                kept = state.unsqueeze(1)
                plan.cache.slot_layers[self.depth].update(kept, kept[..., :0])
            return own["state"].expand_as(state)
        return self.stack.inner.norm(state) if index == self._last else state

    def _layer(self, plan: Plan, index: int, state: Tensor) -> Tensor:
        if self._first <= index < self._last and (index - self._first) % self._width == 0:
            state = self.stack.inner.adapter(torch.cat((state, self._injected(plan)), dim=-1))
        given = plan.arguments[index]
        cache = None if plan.cache is None else plan.cache.slot_layers[index]
        return self.stack.layers[index](state, LayerPass(given["rotary"], given["attention_mask"], cache))

    def _injected(self, plan: Plan) -> Tensor:
        """The e of a pass's tokens: its own, or where it resumes what an earlier pass has kept."""
        own = plan.arguments[self._first]
        if "injected" not in own:
            if plan.cache is None:
                raise RestpointError("plan: its tokens have not run the layers before the core; run it from layer 0")
            own["injected"] = plan.cache.slot_layers[self.depth].written()[0].squeeze(1)
        return own["injected"]

    def _take_apart(self, model: PreTrainedModel) -> UnrolledStack:
        if not isinstance(model, RecurrentDepthForCausalLM):
            raise RestpointError(f"model: {type(model).__name__} iterates no block; use LayeredModel")
        return UnrolledStack(model, self.steps)

    @torch.no_grad()
    def _calibrate(self) -> Head:
        """The head, checked on a small pass: logits are read from what the coda returns, through the norm."""
        entering: list[Tensor] = []
        norm = self.stack.inner.norm
        hook = norm.register_forward_pre_hook(lambda _module, args: entering.append(args[0]))
        try:
            logits = self.model(input_ids=self._some_ids, use_cache=False, num_steps=self.steps).logits
        finally:
            hook.remove()
        require_finite(logits)
        return Head(self.stack, entering[-1], [norm], logits, logits)


class SolvedModel(UnrolledModel):
    """A deep equilibrium model: decoded by its own forward alone, and taken apart no further than that needs.

    Args:
        model: in evaluation mode.
    """

    refusal = _SOLVED

    def __init__(self, model: DeepEquilibriumForCausalLM):
        self.steps = 1
        LayeredModel.__init__(self, model)

    def layers_run(self, output: Any) -> int:
        """Layers that a pass of the model itself has run: as many steps of the core as its solver took."""
        return self._first + self._width * int(output.steps.max()) + self.depth - self._last

    @torch.no_grad()
    def _calibrate(self) -> Head:
        require_finite(self.model(input_ids=self._some_ids, use_cache=False).logits)
        hidden = torch.zeros(1, 5, self.hidden_size, dtype=self.dtype, device=self.device)
        norm = self.stack.inner.norm
        return Head(self.stack, hidden, [norm], self.stack.injected_logits(hidden), self.stack.injected_logits(hidden))


def stack_of(model: PreTrainedModel) -> LayerStack:
    """The layers of a causal LM in the order in which a token runs them; those of a solved core once."""
    if isinstance(model, DeepEquilibriumForCausalLM):
        return UnrolledStack(model, 1)
    if isinstance(model, RecurrentDepthForCausalLM):
        return UnrolledStack(model, model.config.mean_recurrence)
    return LayerStack(model)


def layered_model(model: PreTrainedModel) -> LayeredModel:
    """A causal LM, one layer at a time; one that iterates a block as what it unrolls to.

    Raises:
        RestpointError: see :class:`LayeredModel`.
    """
    if isinstance(model, DeepEquilibriumForCausalLM):
        return SolvedModel(model)
    return UnrolledModel(model) if isinstance(model, RecurrentDepthForCausalLM) else LayeredModel(model)
