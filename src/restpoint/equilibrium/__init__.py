"""Predictors of the rest state and their fits; solvers of f(z) = z: pure tensors, no model."""

from restpoint.equilibrium.affine import AffineMap
from restpoint.equilibrium.depth import DepthSolution, Swept, solve_depth, sweep_depth
from restpoint.equilibrium.depth_starts import FittedStart, StartFit
from restpoint.equilibrium.descent import RefineProgress, RefineResult, RefineSettings
from restpoint.equilibrium.differentiation import Adjoint, implicit
from restpoint.equilibrium.dynamic_modes import (
    DynamicModePredictor,
    DynamicModes,
    ModeSettings,
    dynamic_modes,
    fit_dynamic_modes,
)
from restpoint.equilibrium.extrapolation import ExtrapolationPredictor, fit_extrapolation
from restpoint.equilibrium.features import RandomFeatures
from restpoint.equilibrium.fitting import FitResult, fit_affine, fit_monge, fit_recurrence
from restpoint.equilibrium.gram import GramAccumulator, Moments
from restpoint.equilibrium.heads import MultiTokenHeads, fit_heads
from restpoint.equilibrium.predictors import (
    AffinePredictor,
    IdentityPredictor,
    MongePredictor,
    Predictor,
    RestPointRecurrence,
)
from restpoint.equilibrium.refining import refine
from restpoint.equilibrium.refining_recurrence import refine_recurrence
from restpoint.equilibrium.ridge import solve_ridge, solve_ridge_path
from restpoint.equilibrium.slopes import SlopeFit, Slopes
from restpoint.equilibrium.solvers.anderson import Anderson
from restpoint.equilibrium.solvers.broyden import Broyden
from restpoint.equilibrium.solvers.driver import Map, RowMap, solve
from restpoint.equilibrium.solvers.method import Method
from restpoint.equilibrium.solvers.picard import Picard
from restpoint.equilibrium.solvers.solution import Check, Solution, Status
from restpoint.equilibrium.spectral import spectral_radius
from restpoint.equilibrium.streaming import Chunk, FitProgress, FitSettings, negative_squared_error

__all__ = [
    "Adjoint",
    "AffineMap",
    "AffinePredictor",
    "Anderson",
    "Broyden",
    "Check",
    "Chunk",
    "DepthSolution",
    "DynamicModePredictor",
    "DynamicModes",
    "ExtrapolationPredictor",
    "FitProgress",
    "FitResult",
    "FitSettings",
    "FittedStart",
    "GramAccumulator",
    "IdentityPredictor",
    "Map",
    "Method",
    "ModeSettings",
    "Moments",
    "MongePredictor",
    "MultiTokenHeads",
    "Picard",
    "Predictor",
    "RandomFeatures",
    "RefineProgress",
    "RefineResult",
    "RefineSettings",
    "RestPointRecurrence",
    "RowMap",
    "SlopeFit",
    "Slopes",
    "Solution",
    "StartFit",
    "Status",
    "Swept",
    "dynamic_modes",
    "fit_affine",
    "fit_dynamic_modes",
    "fit_extrapolation",
    "fit_heads",
    "fit_monge",
    "fit_recurrence",
    "implicit",
    "negative_squared_error",
    "refine",
    "refine_recurrence",
    "solve",
    "solve_depth",
    "solve_ridge",
    "solve_ridge_path",
    "spectral_radius",
    "sweep_depth",
]
