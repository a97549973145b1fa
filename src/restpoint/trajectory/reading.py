"""A model reads, and its trajectories come out: texts cut into pieces, or inputs of any other kind."""

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from restpoint.errors import RestpointError
from restpoint.model.attention_taps import LayerAttention, observing_attention
from restpoint.model.versions import cache_name
from restpoint.model.watch import WatchedLayers
from restpoint.trajectory.attention import stack_attention
from restpoint.trajectory.measure import Trajectory

_MIX = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


@dataclass(frozen=True, eq=False)
class Sample:
    """One thing to read.

    Attributes:
        content: a text, or the arguments of the model's forward for one row: pixels, audio features, token ids.
        domain: the kind of thing it is.
    """

    content: str | Mapping[str, Tensor]
    domain: str = ""


@dataclass(frozen=True, eq=False)
class Piece:
    """A sample, or a part of a long text, as the model reads it.

    Attributes:
        number: its place in the corpus.
        ids: token ids, where it is a text.
        inputs: else the arguments of forward.
        domain: the kind of thing it is.
    """

    number: int
    ids: list[int]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    domain: str = ""

    @property
    def index(self) -> int:
        """The place, well mixed: every n-th of these is a fair sample of the corpus (splitmix64)."""
        mixed = ((self.number + 1) * _MIX) & _MASK
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return (mixed ^ (mixed >> 31)) >> 1


@dataclass
class Cut:
    """A corpus cut into pieces, counted as they are taken.

    Attributes:
        samples: the corpus.
        tokenizer: for texts.
        length: most tokens of a piece.
        most: stop after so many tokens.
        texts: pieces so far.
        tokens: in them.
        skipped: texts and ends of texts of fewer than two tokens.
        domains: tokens by kind.
    """

    samples: Iterable[Sample]
    tokenizer: PreTrainedTokenizerBase | None
    length: int
    most: int
    texts: int = 0
    tokens: int = 0
    skipped: int = 0
    domains: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Nothing is read yet."""
        self._digest = hashlib.sha256()

    @property
    def hash(self) -> str:
        """SHA-256 of all pieces so far."""
        return self._digest.hexdigest()

    def __iter__(self) -> Iterator[Piece]:
        """Pieces, until there are enough tokens.

        Raises:
            RestpointError: a text comes without a tokenizer.
        """
        for sample in self.samples:
            for ids, inputs in self._parts(sample):
                count = len(ids) if ids else next((len(one[0]) for one in inputs.values() if one.ndim > 1), 1)
                if ids and self.tokens + count > self.most:
                    ids = ids[: self.most - self.tokens]
                    count = len(ids)
                if count < 2 and not inputs:
                    self.skipped += 1
                    continue
                self._digest.update(repr(ids).encode())
                for name, value in inputs.items():
                    self._digest.update(name.encode() + value.contiguous().cpu().view(torch.uint8).numpy().tobytes())
                yield Piece(self.texts, ids, inputs, sample.domain)
                self.texts += 1
                self.tokens += count
                self.domains[sample.domain] = self.domains.get(sample.domain, 0) + count
                if self.tokens >= self.most - 1:  # one token more would be no trajectory
                    return

    def _parts(self, sample: Sample) -> Iterator[tuple[list[int], Mapping[str, Tensor]]]:
        if not isinstance(sample.content, str):
            yield [], sample.content
            return
        if self.tokenizer is None:
            raise RestpointError("tokenizer: texts are to be read, but there is none; give one, or inputs of forward")
        ids = list(self.tokenizer(sample.content).input_ids) if sample.content.strip() else []
        for start in range(0, max(len(ids), 1), self.length):
            yield ids[start : start + self.length], {}


def batches(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Pieces of one length that follow one another, at most so many at once; inputs that are no texts one by one.

    Rounding depends on what is read together, so shares of a corpus are made of whole batches.
    """
    held: list[Piece] = []
    for piece in pieces:
        if held and (len(held) == most or piece.inputs or len(piece.ids) != len(held[0].ids)):
            yield held
            held = []
        held.append(piece)
    if held:
        yield held


class Reader:
    """Runs a model over pieces and hands out their trajectories.

    Only the stack below the unembedding runs; nothing is cached.

    Args:
        layers: the stack to watch.
    """

    def __init__(self, layers: WatchedLayers):
        self.layers = layers
        self.model = layers.model
        self.backbone = self.model.base_model
        accepted = inspect.signature(type(self.backbone).forward).parameters
        self._without_cache = {"use_cache": False} if "use_cache" in accepted else {}

    @torch.inference_mode()
    def read(self, pieces: Sequence[Piece]) -> list[Trajectory]:
        """The trajectories of a batch of pieces of one length.

        Raises:
            RestpointError: a state is not finite; the message names the layer and the text.
        """
        states = self._states(pieces)
        return [self._trajectory(piece, self.layers.stacked(states, row)) for row, piece in enumerate(pieces)]

    def _trajectory(self, piece: Piece, states: Float[Tensor, "depth tokens hidden"]) -> Trajectory:
        if not bool(states.sum().isfinite()) and not bool(states.isfinite().all()):  # the sum is read far faster
            layer = (~states.isfinite()).any(-1).any(-1).nonzero()[0].item()
            raise RestpointError(
                f"text: the state of piece {piece.number} after layer {layer} is not finite; "
                "load the model in float32 or bfloat16, or leave that text out"
            )
        ids = torch.tensor(piece.ids) if piece.ids else None
        finish = None if self.layers.loop is None else self.layers.finished
        return Trajectory(states, piece.index, ids, piece.domain, finish=finish)

    @torch.inference_mode()
    def read_attention(self, piece: Piece, length: int) -> Trajectory:
        """The trajectory of the first tokens of a text, with what attention did in every layer.

        Raises:
            RestpointError: the model's attention cannot be observed.
        """
        observed: list[LayerAttention] = []
        start = replace(piece, ids=piece.ids[:length])
        with observing_attention(self.model, observed.append):
            (trajectory,) = self.read([start])
        return replace(trajectory, attention=stack_attention(observed)[0])

    def _states(self, pieces: Sequence[Piece]) -> list[Tensor]:
        device = self.model.device
        if pieces[0].inputs:
            inputs = {name: value.to(device) for name, value in pieces[0].inputs.items()}
        elif self.model.config.is_encoder_decoder:
            raise RestpointError(
                f"text: {self.model.config.model_type} is an encoder-decoder, which reads two things at once; give "
                "survey() samples whose content are the arguments of its forward"
            )
        else:
            inputs = {"input_ids": torch.tensor([piece.ids for piece in pieces], device=device)}
        with self.layers.watch() as states:
            self.backbone(**inputs, **self._without_cache)
        return states


@torch.inference_mode()
def while_writing(layers: WatchedLayers, prompt: Int[Tensor, " prompt"], new_tokens: int) -> Trajectory:
    """The trajectory of a prompt and of the greedy text that the model continues it with, through its own cache.

    Args:
        layers: the stack of a causal LM.
        prompt: token ids.
        new_tokens: how many to write; the last one is not read any more.
    """
    model = layers.model
    name = cache_name(type(model).forward)
    block, ids, passes, cache = prompt[None].to(model.device), [prompt], [], None
    for _ in range(new_tokens):
        with layers.watch() as states:
            out = model(input_ids=block, use_cache=True, **{name: cache})
        passes.append(layers.stacked(states, 0))
        cache, block = getattr(out, name), out.logits[:, -1:].argmax(-1)
        ids.append(block[0].cpu())
    return Trajectory(torch.cat(passes, 1), 0, torch.cat(ids)[:-1])
