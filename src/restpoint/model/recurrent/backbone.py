"""From embeddings to last hidden states: a prelude, a core that is iterated, a coda."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as initialise
from transformers.cache_utils import Cache
from transformers.modeling_outputs import ModelOutput
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.utils.generic import can_return_tuple

from restpoint.equilibrium.exits import ExitCriterion, RelativeStep
from restpoint.equilibrium.solvers.method import Method
from restpoint.errors import RestpointError
from restpoint.model.recurrent.cache import RecurrentCache, refuse_other
from restpoint.model.recurrent.config import RecurrentDepthConfig
from restpoint.model.recurrent.exits import Rest, iterate_until_exit
from restpoint.model.recurrent.layers import Norm, Pass, SandwichLayer, StateNoise, cut_normal
from restpoint.model.recurrent.starts import Start
from restpoint.model.versions import causal_mask


@dataclass
class RecurrentModelOutput(ModelOutput):
    """What a pass through the inner model came to.

    Attributes:
        last_hidden_state: what logits are read from.
        cache: where keys and values were stored, if they were.
        steps: core steps that each token ran, (batch, seq).
        computed: tokens that the core was given, summed over its steps.
        states: s_0, s_1, .., each (batch, seq, hidden), with ``output_states``.
        injected: e, likewise.
    """

    last_hidden_state: Tensor | None = None
    cache: Cache | None = None
    steps: Tensor | None = None
    computed: int | None = None
    states: tuple[Tensor, ...] | None = None
    injected: Tensor | None = None


class RecurrentPreTrainedModel(PreTrainedModel):
    """How models that iterate a block are loaded, saved and initialised."""

    config: RecurrentDepthConfig
    config_class = RecurrentDepthConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SandwichLayer"]  # noqa: RUF012 (the names are transformers')
    _skip_keys_device_placement = ["cache"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SandwichLayer):
            range_ = cast(float, self.config.initializer_range)
            std = range_ / math.sqrt(2 * self.config.effective_depth)
            for writing in (module.self_attn.o_proj, module.mlp.down_proj):
                initialise.normal_(writing.weight, mean=0.0, std=std)


class RecurrentDepthModel(RecurrentPreTrainedModel):
    """Embeddings to last hidden states; see `RecurrentDepthForCausalLM`."""

    def __init__(self, config: RecurrentDepthConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        first, last = config.prelude_layers, config.prelude_layers + config.core_layers
        self.prelude, self.core, self.coda = (
            nn.ModuleList(SandwichLayer(config, index) for index in range(*bounds))
            for bounds in ((0, first), (first, last), (last, config.num_hidden_layers))
        )
        self.adapter = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=config.adapter_bias)
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)  # type: ignore[arg-type]
        self.noise = StateNoise(config)
        self.gradient_checkpointing = False
        self.post_init()

    def new_cache(self, *, budget: int | None = None, capacity: int = 256) -> RecurrentCache:
        """An empty cache; see `RecurrentCache`."""
        first = self.config.prelude_layers
        core = range(first, first + self.config.core_layers)
        return RecurrentCache(self.config.num_hidden_layers, core, budget=budget, capacity=capacity)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        num_steps: int | None = None,
        gradient_steps: int | None = None,
        initial_state: Tensor | None = None,
        exits: ExitCriterion | None = None,
        start: Start | None = None,
        solver: Method | None = None,
        output_states: bool = False,
        unembedding: nn.Module | None = None,
        **kwargs: Any,
    ) -> RecurrentModelOutput:
        if inputs_embeds is None:
            if input_ids is None:
                raise RestpointError("input_ids: neither they nor inputs_embeds are given; give one of the two")
            inputs_embeds = self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        self._refuse_exits(exits)
        self._refuse_start(start, initial_state)
        num_steps = self._steps(num_steps)
        batch, count = inputs_embeds.shape[:2]
        padding = None
        if attention_mask is not None and attention_mask.ndim == 2:
            padding = attention_mask[:, -count:] == 0
        if use_cache is None:
            use_cache = self.config.use_cache and not torch.is_grad_enabled()
        if cache is None and (use_cache or exits is not None):
            cache = self.new_cache()
        if cache is not None and not isinstance(cache, RecurrentCache):
            refuse_other(cache)
        if solver is not None:
            self._refuse_solver(solver, cache)
            exits = RelativeStep(threshold=0.0) if exits is None else exits
        past = 0 if cache is None else cache.get_seq_length()
        if position_ids is None:
            position_ids = _positions(attention_mask, past, count, inputs_embeds.device)
        mask = causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
        if mask is None and count > 1 and exits is not None:  # a part of the tokens needs its own rows of it
            slots = torch.arange(past + count, device=inputs_embeds.device)
            mask = (slots[past:, None] >= slots)[None, None]
        if cache is not None:
            cache.open(batch, count, self._stored_steps(num_steps), inputs_embeds.device, padding)
        embedded = inputs_embeds * self.config.embedding_scale
        passing = Pass(self.rotary_emb(embedded, position_ids), mask, cache)
        injected = embedded
        for layer in self.prelude:
            injected = layer(injected, passing)
        state = self._first_state(injected, position_ids, initial_state)
        if start is not None:
            state = start.first(state, injected, None if cache is None else cache.last_state)

        def read(state: Tensor, passing: Pass) -> Tensor:
            if unembedding is None:
                raise RestpointError("exits: this criterion reads logits; give it to the model with the language head")
            return unembedding(self.finish(state, passing))

        if exits is not None:
            rest = iterate_until_exit(
                self.step,
                read,
                state,
                injected,
                passing,
                exits,
                num_steps,
                padding,
                keep_states=output_states,
                solver=solver if count == 1 else None,
            )
        else:
            rest = self.iterate(state, injected, passing, num_steps, gradient_steps, padding, output_states)
        hidden = self.finish(rest.state, passing)
        if cache is not None:
            cache.remember(rest.state.detach(), padding)
            ran = rest.steps if padding is None else rest.steps.masked_fill(padding, num_steps)
            cache.close(num_steps if exits is None else int(ran.min()))
        return RecurrentModelOutput(
            last_hidden_state=hidden,
            cache=cache if use_cache else None,
            steps=rest.steps,
            computed=rest.computed,
            states=None if rest.states is None else tuple(rest.states),
            injected=injected if output_states else None,
        )

    def step(self, state: Tensor, injected: Tensor, passing: Pass) -> Tensor:
        """s_k = core(adapter[s_{k-1}, e])."""
        hidden = self.adapter(torch.cat((state, injected), dim=-1))
        for layer in self.core:
            hidden = layer(hidden, passing)
        return hidden

    def iterate(
        self,
        state: Float[Tensor, "batch seq hidden"],
        injected: Float[Tensor, "batch seq hidden"],
        passing: Pass,
        num_steps: int,
        gradient_steps: int | None,
        padding: Bool[Tensor, "batch seq"] | None,
        keep_states: bool,
    ) -> Rest:
        """Run the core ``num_steps`` times; gradients flow through the last ``gradient_steps`` of them."""
        kept = self.config.gradient_steps if gradient_steps is None else gradient_steps
        if kept < 1:
            raise RestpointError(f"gradient_steps is {kept}; it must be at least 1, or None for the config's")
        states = [state]
        for number in range(num_steps):
            if passing.cache is not None:
                passing.cache.enter(number)
            with nullcontext() if number >= num_steps - kept else torch.no_grad():
                state = self.step(state, injected, passing)
            if keep_states:
                states.append(state)
        if passing.cache is not None:
            passing.cache.leave()
        steps = torch.full(state.shape[:2], num_steps, device=state.device)
        return Rest(state, steps, num_steps * steps.numel(), states if keep_states else None)

    def finish(self, state: Tensor, passing: Pass) -> Tensor:
        """What logits are read from: the norm, the coda and the same norm again."""
        hidden = self.norm(state)
        for layer in self.coda:
            hidden = layer(hidden, passing)
        return self.norm(hidden)

    def _steps(self, num_steps: int | None) -> int:
        """r: as given, or drawn in training, or the config's mean."""
        if num_steps is None:
            return (
                draw_steps(float(self.config.mean_recurrence), self.config.recurrence_spread)
                if self.training
                else self.config.mean_recurrence
            )
        if num_steps < 1:
            raise RestpointError(f"num_steps is {num_steps}; it must be at least 1, or None for the config's mean")
        return num_steps

    def _stored_steps(self, num_steps: int) -> int:
        """Steps of which a cache keeps keys and values."""
        return num_steps

    def _refuse_exits(self, exits: ExitCriterion | None) -> None:
        if exits is not None and torch.is_grad_enabled():
            raise RestpointError("exits: tokens that stop give no gradients; call the model under torch.no_grad()")

    def _refuse_start(self, start: Start | None, initial_state: Tensor | None) -> None:
        if start is not None and initial_state is not None:
            raise RestpointError("start: initial_state already says where to begin; give one of the two")
        if start is not None and torch.is_grad_enabled():
            raise RestpointError("start: it is for decoding and gives no gradients; call the model under no_grad()")

    def _refuse_solver(self, solver: Method, cache: RecurrentCache | None) -> None:
        if torch.is_grad_enabled():
            raise RestpointError("solver: it gives no gradients; call the model under torch.no_grad()")
        if cache is None or cache.budget != 1:
            raise RestpointError(
                "solver: the map must be the same at every step, so earlier tokens must be seen at their last one; "
                "give cache=new_cache(budget=1)"
            )

    def _first_state(self, injected: Tensor, positions: Tensor, given: Tensor | None) -> Tensor:
        if given is not None:
            if given.shape != injected.shape:
                raise RestpointError(
                    f"initial_state has the shape {tuple(given.shape)}; this pass needs {tuple(injected.shape)}"
                )
            return given.to(injected)
        if self.config.state_init == "zero":
            return torch.zeros_like(injected)
        if self.training:
            return cut_normal(torch.empty_like(injected, requires_grad=False), self.config.state_std)
        return self.noise.at(positions, injected).expand(injected.shape)


def draw_steps(mean: float, spread: float) -> int:
    """Draw r ~ 1 + Poisson(rate), log rate ~ N(log mean - spread^2 / 2, spread^2): mostly short, now and then deep."""
    rate = math.log(mean) - spread**2 / 2 + spread * torch.randn(())
    return int(torch.poisson(rate.exp())) + 1


def _positions(mask: Tensor | None, past: int, count: int, device: torch.device) -> Int[Tensor, "rows seq"]:
    """Of each token among those of its row that are no padding."""
    if mask is not None and mask.ndim == 2:
        return (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -count:]
    return torch.arange(past, past + count, device=device)[None]
