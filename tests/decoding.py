"""What tests of decoding share: bad predictors, made-up costs, scripted drafters, and texts by transformers alone."""

import random
from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from families import REFUSED, VOCABULARY, build
from restpoint.decode.control import Control
from restpoint.decode.costs import Costs
from restpoint.decode.draft import (
    ROOT,
    Candidates,
    Draft,
    InstantDrafter,
    Speculator,
    SteppedDrafter,
    TokenPath,
    Verified,
)
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.drafters.tables import TABLES
from restpoint.decode.fusion import Fusion
from restpoint.decode.loop import Round, Text, decode_batch
from restpoint.decode.sampling import Sampler
from restpoint.decode.target import LayeredTarget, Target
from restpoint.decode.tree import TreeSettings
from restpoint.decode.verifiers.base import Verifier
from restpoint.equilibrium import AffineMap, AffinePredictor, RestPointRecurrence
from restpoint.equilibrium.predictors import Predictor
from restpoint.model.layered import LayeredModel

PROMPT = [5, 17, 33, 60, 8]
INSTANT = tuple(TABLES)
EXITS = ("exit 0", "exit 1", "exit 2")
_CHEAP = (0.01, 0.01)


def costs(node: float = 0.05, level: tuple[float, float] = _CHEAP, largest: int = 24) -> Costs:
    """A pass takes 1 second and so much more for each drafted node; each level of any stepped drafter its own."""
    verify = tuple(1 + node * count for count in range(largest + 1))
    return Costs("here", "float32", verify, dict.fromkeys((*EXITS, "scripted"), level))


def predictor(layered: LayeredModel, exit_layer: int) -> Predictor:
    """Random maps: bad drafts, which must not change a single token."""
    generator = torch.Generator().manual_seed(3)
    width = layered.hidden_size
    if exit_layer:
        square = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
        return AffinePredictor((exit_layer,), AffineMap(square, torch.zeros(width)))
    recurrent = AffineMap(torch.randn(2 * width, width, generator=generator) / width**0.5, torch.zeros(width))
    return RestPointRecurrence((0,), (recurrent, recurrent))


def exit_drafter(target: LayeredTarget, name: str, trees: bool = True) -> ExitDrafter:
    """``exit 1`` reads layer 1; it may draft even tokens only."""
    made = predictor(target.layered, int(name.removeprefix("exit ")))
    return ExitDrafter(target, made, torch.arange(0, VOCABULARY, 2), trees=trees, name=name)


def fused(
    target: LayeredTarget,
    sampler: Sampler,
    names: Iterable[str],
    settings: TreeSettings | None = None,
    verifier: Verifier | None = None,
    measured: Costs | None = None,
    trees: bool = True,
    control: Control | None = None,
) -> Fusion:
    """The drafters with these names, at costs that make them draft."""
    vocabulary = target.layered.vocabulary_size
    instant = [TABLES[name].make(vocabulary, None) for name in names if name in TABLES]
    stepped = next((exit_drafter(target, name, trees) for name in names if name in EXITS), None)
    return Fusion(instant, stepped, sampler, control or Control.alone(measured or costs()), None, settings, verifier)


def sees_trees(family: str) -> bool:
    return "tree" not in REFUSED.get(family, set())


def native(model: PreTrainedModel, prompt: Sequence[int], length: int, **options: object) -> list[int]:
    """What ``generate`` itself continues a prompt with, greedily."""
    return model.generate(
        torch.tensor([list(prompt)]),
        attention_mask=torch.ones(1, len(prompt)),
        do_sample=False,
        max_new_tokens=length,
        eos_token_id=None,
        **options,
    )[0, len(prompt) :].tolist()


def tokens_of(rounds: Iterable[Round]) -> list[int]:
    return [token for turn in rounds for token in turn.tokens]


def together(target: Target, texts: Sequence[Text], verifier: Verifier | None = None) -> list[list[Round]]:
    """The rounds of every text of a batch."""
    found: list[list[Round]] = [[] for _ in texts]
    for rounds in decode_batch(target, texts, verifier):
        for row, turn in rounds.items():
            found[row].append(turn)
    return found


class Scripted(Speculator):
    """Proposes what it is told to, and keeps what became of it."""

    def __init__(self) -> None:
        self.seen: list[Verified] = []

    def begin(self, prompt: Sequence[int]) -> None:
        self.seen = []

    @abstractmethod
    def draft(self, path: TokenPath, room: int) -> Draft:
        """What to propose."""

    def propose(self, path: TokenPath, room: int) -> Draft:
        draft = self.draft(path, room)
        children = draft.children()
        assert sum(len(following) for following in children) == len(draft.tokens)
        return draft

    def observe(self, path: TokenPath, verified: Verified) -> None:
        self.seen.append(verified)


class Shrub(Scripted):
    """Random trees of random topology, in which the text that is to come stands somewhere, up to a random depth."""

    def __init__(self, text: Sequence[int], largest: int = 14, seed: int = 0) -> None:
        super().__init__()
        self.text = list(text)
        self.largest = largest
        self.random = random.Random(seed)

    def draft(self, path: TokenPath, room: int) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        taken: set[tuple[int, int]] = set()
        depth = {ROOT: 0}
        right = {ROOT: len(path.tokens)}
        for _ in range(self.random.randrange(self.largest + 1)):
            parent = self.random.choice([node for node in depth if depth[node] < room] or [ROOT])
            token = self.random.randrange(VOCABULARY)
            place = right.get(parent)
            if place is not None and place < len(self.text) and self.random.random() < 0.6:
                token = self.text[place]
            if (parent, token) in taken or depth[parent] >= room:
                continue
            taken.add((parent, token))
            depth[len(tokens)] = depth[parent] + 1
            if place is not None and place < len(self.text) and token == self.text[place]:
                right[len(tokens)] = place + 1
            tokens.append(token)
            parents.append(parent)
        return Draft(tokens, parents)


class Named(InstantDrafter):
    """Names the tokens of a text that was given to it, or tokens that never come, with a fixed confidence."""

    name = "named"

    def __init__(self, text: Sequence[int], length: int = 4, confidence: float = 0.5, wrong: bool = False) -> None:
        self.text = list(text)
        self.length = length
        self.confidence = confidence
        self.wrong = wrong

    def candidates(self, path: TokenPath, room: int) -> Candidates:
        place = len(path.tokens)
        tokens = self.text[place : place + min(self.length, room)]
        if self.wrong:
            tokens = [(token + 1) % VOCABULARY for token in tokens]
        return Candidates.chain(tokens, [self.confidence] * len(tokens))


class Stepped(SteppedDrafter):
    """Gives the next tokens of a text most of the probability, or none; counts what it is asked."""

    name = "scripted"

    def __init__(self, text: Sequence[int], wrong: bool = False, trees: bool = True) -> None:
        self.text = list(text)
        self.wrong = wrong
        self.trees = trees
        self.starts = 0
        self.levels = 0
        self.paths: list[list[int]] = []
        self.place = 0

    def start(self, path: TokenPath) -> torch.Tensor:
        self.starts += 1
        self.levels += 1
        self.place = len(path.tokens)
        self.paths = [[]]
        return self._logits([[]])

    def extend(self, parents: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        self.levels += 1
        added = [[*self.paths[parent + 1], token] for parent, token in zip(parents, tokens, strict=True)]
        self.paths += added
        return self._logits(added)

    def _logits(self, paths: Sequence[Sequence[int]]) -> torch.Tensor:
        logits = torch.linspace(0.0, 1.0, VOCABULARY).repeat(len(paths), 1)
        for row, path in enumerate(paths):
            place = self.place + len(path)
            if place < len(self.text):
                logits[row, (self.text[place] + self.wrong) % VOCABULARY] = 6.0
                if self.wrong:
                    logits[row, self.text[place]] = -30.0
        return logits


def model_and_target(family: str) -> tuple[PreTrainedModel, LayeredTarget]:
    model = build(family)
    return model, LayeredTarget(LayeredModel(model))
