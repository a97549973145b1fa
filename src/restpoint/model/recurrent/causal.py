"""A language model that iterates one block: every depth in one checkpoint."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.utils.generic import can_return_tuple

from restpoint.equilibrium.exits import ExitCriterion
from restpoint.equilibrium.solvers.method import Method
from restpoint.errors import RestpointError
from restpoint.model.recurrent.backbone import RecurrentDepthModel, RecurrentPreTrainedModel
from restpoint.model.recurrent.cache import RecurrentCache
from restpoint.model.recurrent.config import RecurrentDepthConfig
from restpoint.model.recurrent.starts import Start
from restpoint.model.versions import CACHE


@dataclass
class RecurrentOutput(ModelOutput):
    """What a pass came to.

    Attributes:
        loss: of the labels, shifted by one, where there are any.
        logits: of the next token.
        cache: where keys and values were stored, if they were.
        steps: core steps that each token ran, (batch, seq).
        computed: tokens that the core was given, summed over its steps.
        states: s_0, s_1, .., each (batch, seq, hidden), with ``output_states``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: Cache | None = None
    steps: Tensor | None = None
    computed: int | None = None
    states: tuple[Tensor, ...] | None = None


class RecurrentDepthForCausalLM(RecurrentPreTrainedModel, GenerationMixin):
    """e = prelude(x); s_k = core(adapter[s_{k-1}, e]) for k = 1..r; logits = head(norm(coda(norm(s_r)))).

    One model of every depth: r is an argument of each call. Forward takes, beside what language models of
    ``transformers`` take:

    * ``num_steps``: r; in training drawn anew for each pass if None, otherwise the config's mean.
    * ``gradient_steps``: last steps that gradients flow through; the config's if None.
    * ``initial_state``: s_0, (batch, seq, hidden). By default it is noise that depends on the position alone, or 0.
    * ``exits``: stops each token by itself, see `restpoint.equilibrium.exits`; needs ``torch.no_grad()``.
    * ``start``: where tokens begin instead, see `restpoint.model.recurrent.starts`; needs ``torch.no_grad()``.
    * ``solver``: extrapolates between steps in passes of one token, such as `Anderson`; longer ones iterate plainly.
      Needs ``torch.no_grad()`` and a cache of budget 1, with which earlier tokens are seen at their last step.
    * ``output_states``: return s_0 .. s_r.

    and ``generate`` hands them on. ``cache`` is a `RecurrentCache`, made by ``new_cache``;
    ``past_key_values`` is its name in ``transformers`` before 5.24.

    Raises:
        RestpointError: a number is below 1, a state of the wrong shape, a cache of another kind or with another batch,
            or gradients are asked for where there are none.

    Paper:
        Geiping et al. 2025, "Scaling up test-time compute with latent reasoning: a recurrent depth approach".
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 (the name is transformers')
    model: RecurrentDepthModel

    def __init__(self, config: RecurrentDepthConfig):
        super().__init__(config)
        self.model = self._inner(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _inner(self, config: Any) -> RecurrentDepthModel:
        return RecurrentDepthModel(config)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate leaves the cache to forward

    def new_cache(self, *, budget: int | None = None, capacity: int = 256) -> RecurrentCache:
        """An empty cache; see `RecurrentCache`."""
        return self.model.new_cache(budget=budget, capacity=capacity)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        updated = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if outputs.cache is not None:
            updated[CACHE] = outputs.cache  # before 5.24 it is looked for under another name
        return updated

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_steps: int | None = None,
        gradient_steps: int | None = None,
        initial_state: Tensor | None = None,
        exits: ExitCriterion | None = None,
        start: Start | None = None,
        solver: Method | None = None,
        output_states: bool = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> RecurrentOutput:
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            num_steps=num_steps,
            gradient_steps=gradient_steps,
            initial_state=initial_state,
            exits=exits,
            start=start,
            solver=solver,
            output_states=output_states,
            unembedding=self.lm_head,
            return_dict=True,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return RecurrentOutput(loss, logits, output.cache, output.steps, output.computed, output.states)


@torch.no_grad()
def recurrent_states(
    model: RecurrentDepthForCausalLM, ids: Int[Tensor, "batch seq"], num_steps: int | None = None
) -> Float[Tensor, "depth batch seq hidden"]:
    """s_0 .. s_r of the core, before any norm: depth = r + 1.

    For a `DeepEquilibriumForCausalLM`, the first state and the fixed point.

    Raises:
        RestpointError: the model is in training mode, where s_0 and r are random.
    """
    if model.training:
        raise RestpointError("model: it is in training mode, so its states would be random; call eval()")
    output = model.model(ids, num_steps=num_steps, use_cache=False, output_states=True)
    return torch.stack(output.states)


AutoConfig.register(RecurrentDepthConfig.model_type, RecurrentDepthConfig, exist_ok=True)
AutoModelForCausalLM.register(RecurrentDepthConfig, RecurrentDepthForCausalLM, exist_ok=True)
