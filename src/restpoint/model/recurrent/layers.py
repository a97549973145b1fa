"""What a recurrent-depth model is made of: its layers, what a pass hands to them, and the first state."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from restpoint.model.recurrent.cache import Chosen, RecurrentCache
from restpoint.model.recurrent.config import RecurrentDepthConfig
from restpoint.model.versions import CACHE

_BLOCK = 64
_SEEDS = 2**32


@dataclass(frozen=True, eq=False)
class LayerPass:
    """What a layer is given beside the states.

    Attributes:
        rotary: cosines and sines of the tokens' positions, each (batch or 1, seq, head size).
        mask: which slots each query sees, (batch, 1, seq, slots); None where that is all, or all up to itself.
        cache: where keys and values go, if anywhere: of the model, or of this layer.
    """

    rotary: tuple[Tensor, Tensor]
    mask: Tensor | None
    cache: Cache | CacheLayerMixin | None


@dataclass(frozen=True, eq=False)
class Pass(LayerPass):
    """What every layer of a pass is given beside the states; see `LayerPass`."""

    cache: RecurrentCache | None

    def of(self, chosen: Chosen | None) -> "Pass":
        """The same, for a rectangle of its tokens."""
        if chosen is None:
            return self
        cosines, sines = (
            (table if table.shape[0] == 1 else table.index_select(0, chosen.rows)).index_select(1, chosen.columns)
            for table in self.rotary
        )
        mask = self.mask
        if mask is not None:
            rows = mask if mask.shape[0] == 1 else mask.index_select(0, chosen.rows)
            mask = rows.index_select(2, chosen.columns)
        return Pass((cosines, sines), mask, self.cache)


class Norm(nn.RMSNorm):
    """x / rms(x) x weight, in the precision of the weight: under autocast, states are summed in half of it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class SandwichAttention(LlamaAttention):
    """Grouped-query attention with rotary positions; queries and keys may have a bias, and nothing else does."""

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        if config.qk_bias:
            self.q_proj = nn.Linear(self.q_proj.in_features, self.q_proj.out_features, bias=True)
            self.k_proj = nn.Linear(self.k_proj.in_features, self.k_proj.out_features, bias=True)


class SandwichLayer(GradientCheckpointingLayer):
    """x <- norm(x + attention(norm(x))), then x <- norm(x + mlp(norm(x))): norms before and after each sub-layer.

    The norm after the sum keeps an iterated state at one scale, however often it is iterated.
    """

    def __init__(self, config: RecurrentDepthConfig, layer_idx: int):
        super().__init__()
        self.self_attn = SandwichAttention(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.norm_1, self.norm_2, self.norm_3, self.norm_4 = (
            Norm(config.hidden_size, eps=config.rms_norm_eps) for _ in range(4)
        )

    def forward(self, hidden_states: Float[Tensor, "batch seq hidden"], passing: LayerPass) -> Tensor:
        attended, _ = self.self_attn(
            self.norm_1(hidden_states),
            position_embeddings=passing.rotary,
            attention_mask=passing.mask,
            **{CACHE: passing.cache},
        )
        hidden_states = self.norm_2(hidden_states + attended)
        return self.norm_4(hidden_states + self.mlp(self.norm_3(hidden_states)))


class StateNoise:
    """s_0 ~ N(0, std^2), cut off at three deviations, as a function of the position alone.

    So it is the same in every batch, beside any padding, however a text is cut into passes, on any device. Drawn in
    blocks of positions, each from a seed of its own, and kept: the table grows with the longest text.
    """

    def __init__(self, config: RecurrentDepthConfig):
        self.size, self.std, self.seed = config.hidden_size, config.state_std, config.state_seed
        self.table: Tensor | None = None  # not before it is needed: models are made on the meta device when loaded

    def at(self, positions: Int[Tensor, "rows seq"], like: Tensor) -> Float[Tensor, "rows seq hidden"]:
        """The states of these positions, in the dtype and on the device of ``like``."""
        needed, table = int(positions.max()) + 1, self.table
        if table is None or table.shape[0] < needed or table.device != like.device:
            kept = [] if table is None else [table.to(like.device)]
            first, last = (0 if table is None else table.shape[0]) // _BLOCK, -(-needed // _BLOCK)
            table = self.table = torch.cat(
                kept + [self._block(number).to(like.device) for number in range(first, last)]
            )
        return table[positions].to(like.dtype)

    def _block(self, number: int) -> Float[Tensor, "positions hidden"]:
        generator = torch.Generator().manual_seed((self.seed * 2654435761 + number) % _SEEDS)
        return cut_normal(torch.empty(_BLOCK, self.size, device="cpu"), self.std, generator)


def cut_normal(out: Tensor, std: float, generator: torch.Generator | None = None) -> Tensor:
    """Fill with N(0, std^2), cut off at three deviations."""
    if std == 0:
        return out.zero_()
    return nn.init.trunc_normal_(out, 0.0, std, -3 * std, 3 * std, generator=generator)
