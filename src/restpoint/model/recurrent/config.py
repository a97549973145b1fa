"""Settings of the language models that iterate one block."""

from typing import Any, no_type_check

from transformers import PreTrainedConfig

from restpoint.errors import RestpointError


# transformers replaces the __init__ of its configs, which the shape checker of the tests would wrap by the wrong one.
@no_type_check
class RecurrentDepthConfig(PreTrainedConfig):
    """A prelude, a core that is iterated r times, and a coda.

    Attributes:
        vocab_size: tokens.
        hidden_size: width of the states.
        intermediate_size: width inside the gated MLP.
        prelude_layers: l_P, run once on the embeddings: e.
        core_layers: l_R, of one step s -> core(adapter[s, e]).
        coda_layers: l_C, run once on the last state.
        mean_recurrence: r where forward is given no number of steps; its mean where training draws it.
        recurrence_spread: sigma of the log-normal rate of the Poisson law that training draws r from.
        gradient_steps: last steps that gradients flow through.
        state_init: s_0: "noise" is N(0, state_std^2) cut off at three deviations, "zero" is 0.
        state_std: deviation of s_0.
        state_seed: of the noise at inference, which depends on it and on the position alone; training draws afresh.
        embedding_scale: factor of the embeddings.
        num_attention_heads: queries' heads.
        num_key_value_heads: heads of keys and values; as many as queries' if None.
        head_dim: size of a head; hidden_size / num_attention_heads if None.
        qk_bias: whether queries and keys have a bias.
        adapter_bias: whether the adapter has one.
        hidden_act: of the gated MLP.
        rms_norm_eps: of all norms.
        max_position_embeddings: tokens of the longest text meant.
        rope_parameters: as in ``transformers``; base 10000 if None.
        initializer_range: deviation of random weights; sqrt(2 / (5 hidden_size)) if None. What writes to the residual
            stream is divided by sqrt(2 x effective depth).

    Raises:
        RestpointError: a number is out of range.
    """

    model_type = "restpoint_recurrent"
    keys_to_ignore_at_inference = ["cache", "states", "steps"]  # noqa: RUF012 (the name is transformers')

    vocab_size: int = 8192
    hidden_size: int = 256
    intermediate_size: int = 704
    prelude_layers: int = 2
    core_layers: int = 4
    coda_layers: int = 2
    mean_recurrence: int = 32
    recurrence_spread: float = 0.5
    gradient_steps: int = 8
    state_init: str = "noise"
    state_std: float = 0.6324555320336759  # sqrt(2 / 5): takes the deviation of scaled embeddings
    state_seed: int = 0
    embedding_scale: float = 1.0
    num_attention_heads: int = 4
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_bias: bool = False
    adapter_bias: bool = False
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    rope_parameters: dict | None = None
    initializer_range: float | None = None
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.initializer_range is None:
            self.initializer_range = (2 / (5 * self.hidden_size)) ** 0.5
        self._refuse()
        super().__post_init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """Layers that have weights."""
        return self.prelude_layers + self.core_layers + self.coda_layers

    @property
    def effective_depth(self) -> int:
        """Layers that a token runs through at the mean number of steps."""
        return self.prelude_layers + self.core_layers * self.mean_recurrence + self.coda_layers

    def _refuse(self) -> None:
        for name in ("core_layers", "mean_recurrence", "gradient_steps"):
            if getattr(self, name) < 1:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("prelude_layers", "coda_layers", "state_std", "recurrence_spread"):
            if getattr(self, name) < 0:
                raise RestpointError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if self.state_init not in ("noise", "zero"):
            raise RestpointError(f"state_init is {self.state_init!r}; use 'noise' or 'zero'")
        heads = self.num_key_value_heads or self.num_attention_heads
        if self.num_attention_heads % heads:
            raise RestpointError(
                f"num_key_value_heads is {heads}; it must divide num_attention_heads ({self.num_attention_heads})"
            )


@no_type_check
class DeepEquilibriumConfig(RecurrentDepthConfig):
    """As `RecurrentDepthConfig`, with a core that is solved to its fixed point, from zeros.

    Attributes:
        solver: "anderson", "broyden" or "picard", of `restpoint.equilibrium`.
        tolerance: relative residual of a text's states.
        max_steps: evaluations of the core at most.
        gradient: "implicit", or "one_step" for the Jacobian-free gradient.
        adjoint_tolerance: relative residual of the backward solve.
        adjoint_max_steps: products with the transposed Jacobian at most.

    Raises:
        RestpointError: a number is out of range, or a name unknown.
    """

    model_type = "restpoint_deq"

    state_init: str = "zero"
    solver: str = "anderson"
    tolerance: float = 1e-4
    max_steps: int = 50
    gradient: str = "implicit"
    adjoint_tolerance: float = 1e-4
    adjoint_max_steps: int = 50

    def _refuse(self) -> None:
        super()._refuse()
        if self.solver not in ("anderson", "broyden", "picard"):
            raise RestpointError(f"solver is {self.solver!r}; use 'anderson', 'broyden' or 'picard'")
        if self.gradient not in ("implicit", "one_step"):
            raise RestpointError(f"gradient is {self.gradient!r}; use 'implicit' or 'one_step'")
