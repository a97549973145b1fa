"""Predictors of the rest state and the streaming, closed-form fits behind them: pure tensors, no model."""

from restpoint.equilibrium.affine import AffineMap
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
from restpoint.equilibrium.ridge import solve_ridge, solve_ridge_path
from restpoint.equilibrium.streaming import Chunk, FitProgress, FitSettings, negative_squared_error

__all__ = [
    "AffineMap",
    "AffinePredictor",
    "Chunk",
    "FitProgress",
    "FitResult",
    "FitSettings",
    "GramAccumulator",
    "IdentityPredictor",
    "Moments",
    "MongePredictor",
    "MultiTokenHeads",
    "Predictor",
    "RandomFeatures",
    "RestPointRecurrence",
    "fit_affine",
    "fit_heads",
    "fit_monge",
    "fit_recurrence",
    "negative_squared_error",
    "solve_ridge",
    "solve_ridge_path",
]
