"""The model that is trained, its optimisers, and what changes as training goes on: the rate, and the iterations."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from restpoint.errors import RestpointError
from restpoint.model.recurrent.backbone import draw_steps
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.config import DeepEquilibriumConfig, RecurrentDepthConfig
from restpoint.model.recurrent.deq import DeepEquilibriumForCausalLM
from restpoint.train.options import TrainOptions

_BETAS = (0.9, 0.95)


def new_model(
    options: TrainOptions, tokenizer: PreTrainedTokenizerBase, embeddings: torch.Tensor | None = None
) -> RecurrentDepthForCausalLM:
    """A model with random weights, drawn by ``options.seed``.

    Args:
        options: sizes and kind.
        tokenizer: gives the vocabulary and the end token.
        embeddings: (vocabulary, hidden size), taken in place of random ones if given.

    Raises:
        RestpointError: the embeddings have another shape.
    """
    common: dict[str, Any] = {
        "vocab_size": len(tokenizer) if embeddings is None else embeddings.shape[0],
        "hidden_size": options.hidden_size,
        "intermediate_size": options.intermediate_size,
        "prelude_layers": options.prelude_layers,
        "core_layers": options.core_layers,
        "coda_layers": options.coda_layers,
        "mean_recurrence": options.mean_recurrence,
        "gradient_steps": options.gradient_steps,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.key_value_heads,
        # Embeddings enter at the deviation of the first states.
        "embedding_scale": options.hidden_size**0.5 if embeddings is None else 0.4**0.5 / float(embeddings.std()),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(options.seed)
    if options.kind == "deq":
        solver = {"tolerance": options.solver_tolerance, "max_steps": options.solver_steps}
        solver |= {f"adjoint_{name}": value for name, value in solver.items()}
        model: RecurrentDepthForCausalLM = DeepEquilibriumForCausalLM(DeepEquilibriumConfig(**common, **solver))
    else:
        model = RecurrentDepthForCausalLM(RecurrentDepthConfig(**common))
    if embeddings is not None:
        own = model.model.embed_tokens.weight
        if embeddings.shape != own.shape:
            raise RestpointError(
                f"start_embeddings: the tokenizer's model has embeddings of {tuple(embeddings.shape)}, this model "
                f"{tuple(own.shape)}; set hidden_size to {embeddings.shape[1]}"
            )
        with torch.no_grad():
            own.copy_(embeddings)
    return model


def optimisers(model: RecurrentDepthForCausalLM, options: TrainOptions) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms.

    Raises:
        RestpointError: this torch has no Muon.

    Papers:
        Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; Liu et al. 2025, "Muon is
        scalable for LLM training" (its scale of the rate); Loshchilov and Hutter 2019 (AdamW).
    """
    if not hasattr(torch.optim, "Muon"):
        raise RestpointError(f"torch {torch.__version__} has no Muon optimiser; training needs torch 2.9 or newer")
    embedding = model.model.embed_tokens.weight
    matrices = [one for one in model.parameters() if one.ndim == 2 and one is not embedding]
    others = [one for one in model.parameters() if one.ndim != 2 or one is embedding]
    rate = options.learning_rate
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=options.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=_BETAS, weight_decay=0.0),
    ]


@dataclass(frozen=True)
class Schedule:
    """What depends on how far training has come; ``step`` counts from 0 to ``options.steps`` - 1."""

    options: TrainOptions

    def rate(self, step: int) -> float:
        """The learning rate: a linear rise, a plateau, a linear fall to zero."""
        done, options = (step + 1) / self.options.steps, self.options
        rise = 1.0 if options.warm_up == 0 else done / options.warm_up
        fall = 1.0 if options.decay == 0 else (1 - done + 1 / options.steps) / options.decay
        return options.learning_rate * min(1.0, rise, fall)

    def iterations(self, step: int) -> int:
        """How often the core is iterated at this step, drawn from the global generator unless it is fixed.

        The mean rises linearly from 1 while the ramp lasts. Mostly short and now and then deep: see ``draw_steps``.
        """
        options = self.options
        length = options.ramp * options.steps
        share = 1.0 if step >= length else step / length
        mean = 1 + share * (options.mean_recurrence - 1)
        return round(mean) if options.fixed_recurrence else draw_steps(float(mean), spread=0.5)
