"""Verbs that study how tokens move: in a model, and in theory."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from restpoint import console
from restpoint.bundled import prompts
from restpoint.cli.loading import LoadFlags, Texts
from restpoint.corpus import read_texts
from restpoint.flags import Flag
from restpoint.theory.options import HEAD, LAYERS, SimulateOptions, chosen

if TYPE_CHECKING:
    from collections.abc import Callable

    from restpoint.theory.study import Study


@dataclass(frozen=True)
class Simulate:
    """Simulate tokens as interacting particles, dx/dt = P_x[softmax attention], and draw what becomes of them.

    phase: share of merged pairs over time and inverse temperature. strip: clusters on circle and sphere. causal:
    clusters of causal attention with their Renyi centres. spectrum: where particles end, by V's leading eigenvalue.
    mean-field: distance of n particles to their limit. With --from MODEL, layers: what every layer does to the tokens
    of a text, beside what its heads would do to particles; head: particles under the Q, K and V of one head. Each
    writes NAME.png and NAME.csv, and index.html has all on one page.

    For example:
      restpoint simulate -o theory/
      restpoint simulate phase causal --seeds 8 --time 60 -o theory/
      restpoint simulate layers --from MODEL --text corpus.jsonl -o theory/
      restpoint simulate head --from reference --layer 4 --head 1 -o theory/
    """

    studies: Annotated[Positional[tuple[str, ...]], arg(metavar="[STUDY ...]", help_behavior_hint="")] = ()
    """phase, strip, causal, spectrum, mean-field; with --from: layers, head. All if left out."""
    source: Annotated[str | None, arg(name="from", metavar="MODEL", help_behavior_hint="")] = None
    """Take Q, K and V from this model: a checkpoint folder, Hub name, or `reference`."""
    layer: int = 0
    """Layer of the head, from 0."""
    head: int = 0
    """Its index in the layer."""
    text: Texts = ()
    """What the study layers reads: plain text, or .jsonl with a field `text`. Bundled prompts if left out."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("simulations")
    """Folder that pictures and tables are written to."""
    json: Flag = False
    """Print JSON instead of tables."""
    sizes: SimulateOptions = field(default_factory=SimulateOptions)
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Simulate, draw, write, show."""
        names = chosen(self.studies, self.source is not None)
        from restpoint.theory.page import write_page
        from restpoint.theory.pictures import draw
        from restpoint.theory.simulate import RUN

        run = RUN if self.source is None else self._of_model(self.source, names)
        found = []
        for name in console.counted(names, "simulate"):
            study = run[name](self.sizes)
            study.write_csv(self.output / f"{name}.csv")
            draw(study, self.output / f"{name}.png")
            found.append(study)
        page = write_page(found, self.output)
        if self.json:
            print(console.study_json(found, self.output))
            return
        for study in found:
            console.show(console.study_table(study))
        console.show(f"Pictures and tables are in {self.output}, all on one page in {page}")

    def _of_model(self, source: str, names: tuple[str, ...]) -> "dict[str, Callable[[SimulateOptions], Study]]":
        """The studies of a model, by name."""
        from restpoint.model.layered import LayeredModel
        from restpoint.theory.simulate import head, layers
        from restpoint.theory.weights import read_heads

        loaded = self.loading.load(source)
        layered = LayeredModel(loaded.model)
        texts = read_texts(self.text) if self.text else (prompt.text for prompt in prompts())
        ids = (list(loaded.tokenizer(text).input_ids) for text in texts)
        run = {LAYERS: lambda sizes: layers(sizes, layered, ids, source)}
        if HEAD in names:
            read = read_heads(layered, self.layer, [self.head])
            run[HEAD] = lambda sizes: head(sizes, read, f"head {self.head} of layer {self.layer} of {source}")
        return run
