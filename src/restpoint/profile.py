"""Profile: everything that was fitted for one model, in one folder of safetensors and JSON."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch import Tensor

from restpoint import files
from restpoint.decode.acceptance import Calibration
from restpoint.decode.costs import Costs
from restpoint.equilibrium.heads import MultiTokenHeads
from restpoint.equilibrium.predictors import IdentityPredictor, Predictor, RestPointRecurrence
from restpoint.errors import RestpointError
from restpoint.exit.policy import ExitPolicy
from restpoint.model.fingerprint import fingerprint
from restpoint.model.load import Loaded
from restpoint.model.recurrent.starts import PredictedStart
from restpoint.tensors import content_hash, save
from restpoint.trajectory.lens import FittedLens

_FORMAT = 2
_JSON, _TENSORS = "profile.json", "profile.safetensors"
_HEADS = "heads"
_EXITS = "exits"
_START = "start"


@dataclass(frozen=True)
class Measured:
    """How well one predictor does.

    Attributes:
        predictor: its name.
        exit_layer: layers that run before it.
        acceptance: mean 1 - TV of the first drafted token against the model, on held-out text.
        top1: share of positions where its most probable token is the model's, likewise.
        own_acceptance: the same acceptance on held-out text of the model's own; None where there is none.
        own_top1: the same share on held-out text of the model's own.
        multiplications: multiply-adds for one drafted token, the head not counted.
        expected_speed: expected rate of greedy chains over plain decoding at the measured costs, alone, perhaps below
            1; None where not measured.
    """

    predictor: str
    exit_layer: int
    acceptance: float
    top1: float
    own_acceptance: float | None
    own_top1: float | None
    multiplications: int
    expected_speed: float | None = None


@dataclass(frozen=True)
class Calibrations:
    """How often one drafter's tokens stand, by its confidence.

    Attributes:
        greedy: in greedy decoding.
        sampling: when tokens are sampled at temperature 1.
    """

    greedy: Calibration
    sampling: Calibration


@dataclass(frozen=True)
class Profile:
    """What was fitted for one model, bound to it by a fingerprint.

    Attributes:
        fingerprint: of the model's config, tokenizer and unembedding; another model is refused.
        model: name that the model was loaded by.
        chosen: name of the predictor that drafts.
        predictors: all fitted predictors by name.
        calibrations: by drafter: the predictors, and the instant drafters that were measured.
        costs: seconds of passes and of every predictor's drafts, on the machine that they were measured on.
        vocabulary: tokens that may be drafted, most frequent first; None for all.
        heads: predicts the rest states of several positions at once; None where it was not asked for.
        measured: how well each predictor does.
        fitted_on: options, number of tokens and hash of the text.
        exits: how the model exits early, calibrated or not; None where that was not asked for.
        start: where a model that iterates a block may begin its loop; None where it was not asked for.
    """

    fingerprint: str
    model: str
    chosen: str
    predictors: Mapping[str, Predictor]
    calibrations: Mapping[str, Calibrations]
    costs: Costs
    vocabulary: Tensor | None
    heads: MultiTokenHeads | None = None
    measured: tuple[Measured, ...] = ()
    fitted_on: Mapping[str, Any] = field(default_factory=dict)
    exits: ExitPolicy | None = None
    start: PredictedStart | None = None

    def require(self, loaded: Loaded) -> None:
        """Refuse a model that this profile was not fitted to.

        Raises:
            RestpointError: the fingerprints differ.
        """
        if fingerprint(loaded.model, loaded.tokenizer) != self.fingerprint:
            raise RestpointError(
                f"profile: it belongs to another model ({self.model}), not to {loaded.name}: config, tokenizer or "
                f"unembedding differ; fit one with: restpoint fit {loaded.name} --output FOLDER"
            )

    def lenses(self) -> dict[str, FittedLens]:
        """The predictors as lenses, by kind; ``exit``: what early exits emit. The logit lens itself is left out."""
        found: dict[str, dict[int, Predictor]] = {}
        for name, predictor in self.predictors.items():
            if not isinstance(predictor, IdentityPredictor):
                found.setdefault(name.partition("@")[0], {})[predictor.exit_layer] = predictor
        if self.exits is not None and self.exits.predictors:
            found["exit"] = dict(self.exits.predictors)
        return {name: FittedLens(predictors) for name, predictors in found.items()}

    def save(self, folder: Path | str) -> None:
        """Write ``profile.json`` and ``profile.safetensors`` to a folder, each complete or not at all.

        Maps are kept in bfloat16, which costs no acceptance that could be measured and half the space.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        configs: dict[str, Any] = {}
        for name, predictor in self.predictors.items():
            configs[name], own = predictor.state()
            tensors |= {f"{name}/{key}": value.to(torch.bfloat16) for key, value in own.items()}
        heads = None
        if self.heads is not None:
            heads, own = self.heads.state()
            tensors |= {f"{_HEADS}/{key}": value.to(torch.bfloat16) for key, value in own.items()}
        if self.vocabulary is not None:
            tensors["vocabulary"] = self.vocabulary
        exits = None
        if self.exits is not None:
            exits, own = self.exits.state()
            tensors |= {f"{_EXITS}/{key}": value for key, value in own.items()}
        start = None
        if self.start is not None:
            start, own = self.start.predictor.state()
            tensors |= {f"{_START}/{key}": value.to(torch.bfloat16) for key, value in own.items()}
        content = content_hash(tensors)
        described = {
            "format": _FORMAT,
            "fingerprint": self.fingerprint,
            "model": self.model,
            "chosen": self.chosen,
            "predictors": configs,
            "heads": heads,
            "calibrations": {name: asdict(own) for name, own in self.calibrations.items()},
            "costs": asdict(self.costs),
            "measured": [asdict(row) for row in self.measured],
            "fitted_on": dict(self.fitted_on),
            "exits": exits,
            "start": start,
            "tensors_sha256": content,
        }
        save(folder / _TENSORS, tensors)
        text = json.dumps(described, indent=1) + "\n"
        files.write(folder / _JSON, lambda path: path.write_text(text, encoding="utf-8"))

    @classmethod
    def load(cls, folder: Path | str) -> "Profile":
        """Read a profile.

        Raises:
            RestpointError: the folder has none, a file is damaged or cut short, or it was written by a newer version.
        """
        folder = Path(folder)
        missing = [name for name in (_JSON, _TENSORS) if not (folder / name).is_file()]
        if missing:
            raise RestpointError(f"profile: {folder} has no {missing[0]}; make one with: restpoint fit --output FOLDER")
        try:
            described = json.loads((folder / _JSON).read_text())
            with safe_open(folder / _TENSORS, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise RestpointError(f"profile: {folder} is damaged or cut short ({reason}); fit it again") from error
        if described.get("format") != _FORMAT:
            raise RestpointError(
                f"profile: {folder} has format {described.get('format')}, this version reads {_FORMAT}; "
                "update restpoint or fit it again"
            )
        try:
            if described["tensors_sha256"] != content_hash(tensors):
                raise RestpointError(f"profile: the two files in {folder} do not belong together; fit it again")
            predictors = {
                name: Predictor.from_state(config, _under(name, tensors)).to(dtype=torch.float32)
                for name, config in described["predictors"].items()
            }
            return cls(
                fingerprint=described["fingerprint"],
                model=described["model"],
                chosen=described["chosen"],
                predictors=predictors,
                calibrations={
                    name: Calibrations(_calibration(own["greedy"]), _calibration(own["sampling"]))
                    for name, own in described["calibrations"].items()
                },
                costs=_costs(described["costs"]),
                vocabulary=tensors.get("vocabulary"),
                heads=None
                if described["heads"] is None
                else MultiTokenHeads.from_state(described["heads"], _under(_HEADS, tensors)).to(dtype=torch.float32),
                measured=tuple(Measured(**row) for row in described["measured"]),
                fitted_on=described["fitted_on"],
                exits=None
                if described.get("exits") is None  # profiles of before there were exits have no such entry
                else ExitPolicy.from_state(described["exits"], _under(_EXITS, tensors)),
                start=_start(
                    described.get("start"), tensors
                ),  # profiles of before there were starts have no such entry
            )
        except (KeyError, TypeError) as error:
            raise RestpointError(f"profile: {folder} lacks {error}; fit it again") from error

    def push_to_hub(self, repository: str, *, private: bool = True, token: str | None = None) -> str:
        """Upload to a Hugging Face model repository, made if missing; return the address of the commit."""
        api = HfApi(token=token)
        api.create_repo(repository, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save(folder)
            return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="restpoint profile"))


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = f"{name}/"
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _start(config: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> PredictedStart | None:
    if config is None:
        return None
    predictor = Predictor.from_state(config, _under(_START, tensors)).to(dtype=torch.float32)
    if not isinstance(predictor, RestPointRecurrence):
        raise RestpointError(f"profile: its start is of the kind {predictor.kind}, not a recurrence; fit it again")
    return PredictedStart(predictor)


def _costs(entry: Mapping[str, Any]) -> Costs:
    draft = {name: (first, later) for name, (first, later) in entry["draft"].items()}
    return Costs(entry["device"], entry["dtype"], tuple(entry["verify"]), draft)


def _calibration(entry: Mapping[str, Any]) -> Calibration:
    (first, later), (first_share, later_share) = entry["acceptance"], entry["share"]
    return Calibration(tuple(entry["edges"]), (tuple(first), tuple(later)), (tuple(first_share), tuple(later_share)))
