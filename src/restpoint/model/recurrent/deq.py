"""A language model whose core is solved to its fixed point and trained by implicit differentiation."""

from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from restpoint.equilibrium.differentiation import Adjoint, implicit
from restpoint.equilibrium.exits import ExitCriterion
from restpoint.equilibrium.solvers.anderson import Anderson
from restpoint.equilibrium.solvers.broyden import Broyden
from restpoint.equilibrium.solvers.driver import solve
from restpoint.equilibrium.solvers.method import Method
from restpoint.equilibrium.solvers.picard import Picard
from restpoint.equilibrium.solvers.solution import Solution
from restpoint.errors import RestpointError
from restpoint.model.recurrent.backbone import RecurrentDepthModel
from restpoint.model.recurrent.cache import Chosen, RecurrentCache
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.model.recurrent.config import DeepEquilibriumConfig
from restpoint.model.recurrent.exits import Rest
from restpoint.model.recurrent.layers import Pass

_METHODS: dict[str, type[Method]] = {"anderson": Anderson, "broyden": Broyden, "picard": Picard}


class DeepEquilibriumModel(RecurrentDepthModel):
    """Embeddings to last hidden states; see `DeepEquilibriumForCausalLM`.

    Attributes:
        solution: of the last forward pass: residuals, steps and status of each text.
        adjoint_solution: of the last backward pass.
    """

    config: DeepEquilibriumConfig  # type: ignore[assignment]
    config_class = DeepEquilibriumConfig
    solution: Solution | None = None
    adjoint_solution: Solution | None = None

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
        """Solve s = core(adapter[s, e]), one row of the solver for each text.

        Attention couples the tokens of a text. Were they rows of their own, a token that met the tolerance would be
        frozen while those that it attends to still moved, and its residual would not hold at the end. Texts do not
        see each other: each of them stops by itself, and is computed no more.
        """
        batch, count, hidden = state.shape
        text = None if padding is None else ~padding.unsqueeze(-1)
        columns = torch.arange(count, device=state.device)

        def core(flat: Float[Tensor, "rows dim"], rows: Int[Tensor, " rows"] | None) -> Float[Tensor, "rows dim"]:
            chosen = None
            if rows is not None and rows.shape[0] < batch:
                chosen = Chosen(rows, columns, torch.ones(rows.shape[0], count, dtype=torch.bool, device=rows.device))
            if passing.cache is not None:
                # Each evaluation writes over the one before: what is left is the keys and values of the fixed point.
                passing.cache.enter(0, chosen)
            present = flat.view(-1, count, hidden)
            image = self.step(present, injected if chosen is None else chosen.of(injected), passing.of(chosen))
            if text is not None:  # what stands in the padding must not count in a text's residual
                image = torch.where(text if chosen is None else chosen.of(text), image, 0)
            return image.flatten(1)

        config = self.config
        self.solution = solve(
            core,
            state.flatten(1),
            _METHODS[config.solver](),
            tolerance=config.tolerance,
            max_steps=num_steps,
            row_aware=True,
        )
        rest = implicit(
            lambda flat: core(flat, None),
            self.solution.value,
            gradient=cast(Literal["implicit", "one_step"], config.gradient),
            adjoint=Adjoint(tolerance=config.adjoint_tolerance, max_steps=config.adjoint_max_steps),
            report=self._note,
        ).view(batch, count, hidden)
        if passing.cache is not None:
            passing.cache.leave()
        steps = (self.solution.steps + 1)[:, None].expand(batch, count).contiguous()
        computed = (self.solution.row_evaluations + batch) * count
        return Rest(rest, steps, computed, [state, rest] if keep_states else None)

    def _note(self, solution: Solution) -> None:
        self.adjoint_solution = solution

    def _steps(self, num_steps: int | None) -> int:
        if num_steps is not None and num_steps < 1:
            raise RestpointError(f"num_steps is {num_steps}; it must be at least 1, or None for the config's max_steps")
        return self.config.max_steps if num_steps is None else num_steps

    def _stored_steps(self, num_steps: int) -> int:
        return 1

    def _refuse_exits(self, exits: ExitCriterion | None) -> None:
        if exits is not None:
            raise RestpointError("exits: a solver stops by its tolerance; set that in the config, and leave exits out")

    def _refuse_solver(self, solver: Method, cache: RecurrentCache | None) -> None:
        raise RestpointError("solver: this model has one by its config; set that, and leave solver out")


class DeepEquilibriumForCausalLM(RecurrentDepthForCausalLM):
    """e = prelude(x); s* = core(adapter[s*, e]); logits = head(norm(coda(norm(s*)))).

    The state of infinite depth, found by a solver in as many evaluations as the text needs, and differentiated through
    the implicit function theorem: training keeps the graph of one evaluation, whatever the solver took. Whether the
    core has a fixed point is up to its weights; ``model.solution`` says how near the last pass came to it.

    Forward is that of `RecurrentDepthForCausalLM`, with ``num_steps`` for the solver's most steps and without
    ``exits``. A cache stores one step, that of the fixed point.

    Raises:
        RestpointError: as there, or exits are given.

    Paper:
        Bai, Kolter, Koltun 2019, "Deep equilibrium models".
    """

    config: DeepEquilibriumConfig  # type: ignore[assignment]
    config_class = DeepEquilibriumConfig

    def _inner(self, config: Any) -> DeepEquilibriumModel:
        return DeepEquilibriumModel(config)


AutoConfig.register(DeepEquilibriumConfig.model_type, DeepEquilibriumConfig, exist_ok=True)
AutoModelForCausalLM.register(DeepEquilibriumConfig, DeepEquilibriumForCausalLM, exist_ok=True)
