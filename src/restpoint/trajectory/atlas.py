"""The atlas of a model: all that was measured of its trajectories on some text, in one artefact."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from restpoint import files
from restpoint.errors import RestpointError
from restpoint.model.watch import Loop
from restpoint.tensors import content_hash, save
from restpoint.trajectory import partial
from restpoint.trajectory.scenes import Scene

FORMAT = 2
_JSON, _TENSORS = "atlas.json", "atlas.safetensors"
_RESULT, _SUM, _SCENE = "result", "sum", "scene"
_DRAWN = ("plane", "norms", "probability", "entropy", "settled", "path")


@dataclass(frozen=True)
class Subject:
    """What was measured.

    Attributes:
        model: name or path of the checkpoint.
        fingerprint: of its weights and configuration.
        family: model type.
        part: path of the list of layers that was watched.
        layers: their number L; there are L + 1 states.
        hidden: size of the states.
        vocabulary: number of tokens; 0 where there is no unembedding.
        parameters: of the model.
        dtype: that it was run in.
        untrained: whether its weights were replaced by random ones.
        depths: names of the L + 1 states, where a number does not say what they are.
        loop: where among them the iterates stand, if a block is iterated.
    """

    model: str
    fingerprint: str
    family: str
    part: str
    layers: int
    hidden: int
    vocabulary: int
    parameters: int
    dtype: str
    untrained: bool = False
    depths: list[str] = field(default_factory=list)
    loop: Loop | None = None

    def depth(self, number: int) -> str:
        """What a state is called."""
        return self.depths[number] if self.depths else str(number)


@dataclass(frozen=True, eq=False)
class Atlas:
    """Measurements of one model on one corpus.

    Attributes:
        subject: what was measured.
        corpus: of what was read: ``texts``, ``tokens``, ``skipped`` (texts of fewer than two tokens), ``domains``
            (tokens of each kind), ``hash``, and ``shares``: which of how many, where it is not the whole.
        conditions: versions, date, threads, seconds, options, and ``notes`` on what could not be measured.
        results: for each measure by name, its results by name.
        papers: for each measure, the papers that it follows.
        scenes: sentences to look at.
        sums: of each measure of a share, which the other shares' are added to.
    """

    subject: Subject
    corpus: dict[str, Any]
    conditions: dict[str, Any]
    results: Mapping[str, Mapping[str, Float64[Tensor, "..."]]]
    papers: Mapping[str, Sequence[str]]
    scenes: list[Scene] = field(default_factory=list)
    sums: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def save(self, folder: Path | str) -> None:
        """Write ``atlas.json`` and ``atlas.safetensors``, each complete or not at all; they end an unfinished survey.

        Raises:
            RestpointError: the folder cannot be written.
        """
        folder = Path(folder)
        tensors = {f"{_RESULT}/{measure}/{name}": own for measure, name, own in _flat(self.results)}
        tensors |= {f"{_SUM}/{measure}/{name}": own for measure, name, own in _flat(self.sums)}
        for number, scene in enumerate(self.scenes):
            drawn = {name: getattr(scene, name) for name in _DRAWN}
            tensors |= {f"{_SCENE}/{number}/{name}": own for name, own in drawn.items() if own is not None}
        tensors = {name: own.detach().cpu().contiguous() for name, own in tensors.items()}
        described = {
            "format": FORMAT,
            "subject": asdict(self.subject),
            "corpus": self.corpus,
            "conditions": self.conditions,
            "papers": {name: list(papers) for name, papers in self.papers.items()},
            "scenes": [
                {"text": one.text, "tokens": one.tokens, "predicted": one.predicted, "domain": one.domain}
                for one in self.scenes
            ],
            "tensors": content_hash(tensors),
        }
        save(folder / _TENSORS, tensors)
        text = json.dumps(described, indent=1, ensure_ascii=False)
        files.write(folder / _JSON, lambda path: path.write_text(text, encoding="utf-8"))
        partial.discard(folder)

    @classmethod
    def load(cls, folder: Path | str) -> "Atlas":
        """Read what :meth:`save` wrote.

        Raises:
            RestpointError: there is no atlas, it is damaged, or it was written by a newer restpoint.
        """
        folder = Path(folder)
        try:
            described = json.loads((folder / _JSON).read_text(encoding="utf-8"))
            version = described["format"]
            if version > FORMAT:
                raise RestpointError(
                    f"atlas: {folder} has format {version}, of a newer restpoint; this one reads {FORMAT}: update it"
                )
            with safe_open(folder / _TENSORS, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if content_hash(tensors) != described["tensors"]:
                raise RestpointError(f"atlas: {folder} holds files of two different atlases; analyse again")
            return cls(
                _subject(described["subject"]),
                described["corpus"],
                described["conditions"],
                _nested(tensors, _RESULT),
                described["papers"],
                [Scene(**own, **_drawn(tensors, number)) for number, own in enumerate(described["scenes"])],
                _nested(tensors, _SUM),
            )
        except FileNotFoundError as error:
            raise RestpointError(f"atlas: {folder} holds none; give a folder that `restpoint analyze` wrote") from error
        except (OSError, SafetensorError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise RestpointError(f"atlas: {folder} is damaged ({error}); analyse again") from error


def _subject(described: Mapping[str, Any]) -> Subject:
    loop = described.get("loop")  # format 1 has neither that nor names of states
    return Subject(**{**described, "loop": None if loop is None else Loop(**loop)})


def _drawn(tensors: Mapping[str, Tensor], number: int) -> dict[str, Any]:
    """What is drawn of a scene; only models that iterate a block have a path."""
    prefix = f"{_SCENE}/{number}/"
    return {name: tensors[prefix + name] for name in _DRAWN if name != "path" or prefix + name in tensors}


def _flat(nested: Mapping[str, Mapping[str, Tensor]]) -> list[tuple[str, str, Tensor]]:
    return [(outer, inner, value) for outer, own in nested.items() for inner, value in own.items()]


def _nested(tensors: Mapping[str, Tensor], kind: str) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        what, outer, inner = name.split("/", 2)
        if what == kind:
            found.setdefault(outer, {})[inner] = value
    return found
