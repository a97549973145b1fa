"""Fitted readouts on disk: refining takes long, so that an interrupted calibration does it once."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open

from restpoint.calibrate.options import ReadOptions
from restpoint.calibrate.readers import fit_readout
from restpoint.exit.policy import readout_from, readout_state
from restpoint.exit.view import Readout
from restpoint.model.fingerprint import fingerprint
from restpoint.model.layered import LayeredModel
from restpoint.model.load import Loaded
from restpoint.progress import Progress
from restpoint.tensors import save

_FILE = "readout.safetensors"
_FITTED_BY = ("read_layers", "refine", "features", "vocabulary", "fit_tokens", "seed")
"""Options that the fitted readout depends on."""


def readout_once(
    loaded: Loaded,
    layered: LayeredModel,
    texts: Sequence[str],
    layers: tuple[int, ...],
    options: ReadOptions,
    folder: Path,
    report: Progress,
    *,
    whole_vocabulary: bool = False,
) -> Readout:
    """What `fit_readout` gives, fitted only where ``folder`` holds none of the same recipe; `forget_readout` ends it.

    The recipe is all that a readout depends on: model and dtype, text, layers and how they are fitted. One of another
    recipe is fitted over.
    """
    if options.lens:
        return Readout(layered)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    recipe = {
        "model": fingerprint(loaded.model, loaded.tokenizer),
        "dtype": str(layered.dtype),
        "text": digest.hexdigest(),
        "layers": layers,
        "whole_vocabulary": whole_vocabulary,
        **{name: getattr(options, name) for name in _FITTED_BY},
    }
    described = json.dumps(recipe, sort_keys=True)
    path = folder / _FILE
    if path.exists():
        with safe_open(path, "pt") as file:
            about = file.metadata()
            if about["recipe"] == described:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return Readout(layered, *readout_from(json.loads(about["predictors"]), tensors))
    readout = fit_readout(loaded, layered, texts, layers, options, folder, report, whole_vocabulary=whole_vocabulary)
    configs, tensors = readout_state(readout.predictors, readout.vocabulary)
    save(path, tensors, {"recipe": described, "predictors": json.dumps(configs)})
    return readout


def forget_readout(folder: Path) -> None:
    """The calibration is finished: the profile has what it needs."""
    (folder / _FILE).unlink(missing_ok=True)
