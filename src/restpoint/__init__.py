"""Faster decoding of pretrained transformers, with exactly the model's own output.

In the order that they are used::

    load          a Hugging Face causal LM with its tokenizer        -> Loaded
    check         what restpoint can do with a LayeredModel          -> capabilities
    fit_profile   fit draft predictors, measure costs (FitOptions)   -> FitReport with a Profile
    Decoder       generate or stream text (SamplingSettings)         -> Generation with Statistics
    generate_fn   the same inside ``model.generate(custom_generate)`` -> what ``generate`` returns
    bench         decoding speed beside the baselines (BenchOptions) -> a report
    sweep_exits   what early exits could save (SweepOptions)         -> a report
    calibrate_exits  early exits with a certificate (CalibrateOptions) -> CalibrateReport with a Profile
    survey        how tokens move (Surveyed, Sample, SurveyOptions)  -> Atlas
    train_recurrent  a small model that iterates one block (TrainOptions) -> TrainReport
    LayeredModel  a causal LM, one layer at a time

A user's mistake raises RestpointError, with one line that says what to change. Names are imported when they are first
used, so that ``import restpoint`` needs no torch. The function that fits is called ``fit_profile`` because
``restpoint.fit`` is the package that it lives in.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restpoint.calibrate.options import CalibrateOptions, SweepOptions
    from restpoint.calibrate.run import CalibrateReport, calibrate_exits
    from restpoint.calibrate.sweeping import sweep_exits
    from restpoint.decode.settings import SamplingSettings
    from restpoint.errors import RestpointError
    from restpoint.evaluate.options import BenchOptions
    from restpoint.evaluate.speed import bench
    from restpoint.exit.policy import ExitPolicy
    from restpoint.fit.options import FitOptions
    from restpoint.fit.run import FitReport, fit_profile
    from restpoint.generate import Decoder
    from restpoint.generation import Generation, Statistics
    from restpoint.huggingface.custom import generate_fn
    from restpoint.model.check import check
    from restpoint.model.layered import LayeredModel
    from restpoint.model.load import Loaded, load
    from restpoint.profile import Profile
    from restpoint.train.options import TrainOptions
    from restpoint.train.run import TrainReport, train_recurrent
    from restpoint.trajectory.atlas import Atlas
    from restpoint.trajectory.options import SurveyOptions
    from restpoint.trajectory.reading import Sample
    from restpoint.trajectory.survey import survey
    from restpoint.trajectory.surveyed import Surveyed

    __version__: str

__all__ = [
    "Atlas",
    "BenchOptions",
    "CalibrateOptions",
    "CalibrateReport",
    "Decoder",
    "ExitPolicy",
    "FitOptions",
    "FitReport",
    "Generation",
    "LayeredModel",
    "Loaded",
    "Profile",
    "RestpointError",
    "Sample",
    "SamplingSettings",
    "Statistics",
    "SurveyOptions",
    "Surveyed",
    "SweepOptions",
    "TrainOptions",
    "TrainReport",
    "__version__",
    "bench",
    "calibrate_exits",
    "check",
    "fit_profile",
    "generate_fn",
    "load",
    "survey",
    "sweep_exits",
    "train_recurrent",
]

_HOMES = {
    "Atlas": "trajectory.atlas",
    "BenchOptions": "evaluate.options",
    "CalibrateOptions": "calibrate.options",
    "CalibrateReport": "calibrate.run",
    "Decoder": "generate",
    "ExitPolicy": "exit.policy",
    "FitOptions": "fit.options",
    "FitReport": "fit.run",
    "Generation": "generation",
    "LayeredModel": "model.layered",
    "Loaded": "model.load",
    "Profile": "profile",
    "RestpointError": "errors",
    "Sample": "trajectory.reading",
    "SamplingSettings": "decode.settings",
    "Statistics": "generation",
    "SurveyOptions": "trajectory.options",
    "Surveyed": "trajectory.surveyed",
    "SweepOptions": "calibrate.options",
    "TrainOptions": "train.options",
    "TrainReport": "train.run",
    "bench": "evaluate.speed",
    "calibrate_exits": "calibrate.run",
    "check": "model.check",
    "fit_profile": "fit.run",
    "generate_fn": "huggingface.custom",
    "load": "model.load",
    "survey": "trajectory.survey",
    "sweep_exits": "calibrate.sweeping",
    "train_recurrent": "train.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use; later uses find it in the module (PEP 562)."""
    if name == "__version__":
        value: Any = import_module("restpoint.console.terminal").version()
    elif name in _HOMES:
        value = getattr(import_module(f"restpoint.{_HOMES[name]}"), name)
    else:
        raise AttributeError(f"module 'restpoint' has no attribute {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names and what has been imported."""
    return sorted({*globals(), *__all__})
