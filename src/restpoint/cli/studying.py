"""Verbs that study how tokens move: in a model, and in theory."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from restpoint.bundled import REFERENCE, documents, prompts
from restpoint.cli.loading import LoadFlags, Texts, profile_for
from restpoint.console import tables, terminal
from restpoint.corpus import read_texts
from restpoint.flags import Flag, Folder
from restpoint.theory.options import HEAD, LAYERS, SimulateOptions, chosen
from restpoint.trajectory.options import SurveyOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from restpoint.theory.study import Study
    from restpoint.trajectory.atlas import Atlas
    from restpoint.trajectory.reading import Sample

PAGE = "index.html"
TWIN = "untrained"


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
        for name in terminal.counted(names, "simulate"):
            study = run[name](self.sizes)
            study.write_csv(self.output / f"{name}.csv")
            draw(study, self.output / f"{name}.png")
            found.append(study)
        page = write_page(found, self.output)
        if self.json:
            print(tables.study_json(found, self.output))
            return
        for study in found:
            terminal.show(tables.study_table(study))
        terminal.show(f"Pictures and tables are in {self.output}, all on one page in {page}")

    def _of_model(self, source: str, names: tuple[str, ...]) -> "dict[str, Callable[[SimulateOptions], Study]]":
        """The studies of a model, by name."""
        from restpoint.model.layered import LayeredModel
        from restpoint.theory.simulate_model import head, layers
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


@dataclass(frozen=True)
class Analyze:
    """Measure how tokens move through the layers of a model, and show it on one page.

    One pass over the text, in constant memory. The page, index.html, has the trajectories of a few sentences, what
    each layer would predict, steps and angles, clusters, saturation, attention sinks, transport and bounds; beside
    them, dashed, the same of random weights. Tables (CSV) and pictures (PNG) lie beside it. An interrupted analysis
    resumes.

    For example:
      restpoint analyze -o atlas/
      restpoint analyze MODEL --text corpus.jsonl --max-tokens 200000 -o atlas/
      restpoint analyze MODEL --measures geometry transport --no-twin -o atlas/
      restpoint analyze MODEL --share 1/4 -o part1/      on four machines; then restpoint merge part* -o atlas/
    """

    model: Annotated[Positional[str], arg(metavar="[MODEL]")] = REFERENCE
    """Checkpoint folder, Hub name, or `reference`; encoders too."""
    text: Texts = ()
    """Text to read: plain text, or .jsonl with a field `text`; .gz, .xz, .bz2 of either. Bundled text if left out."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("atlas")
    """Folder that atlas, page, tables and pictures are written to."""
    profile: Folder = None
    """What `restpoint fit` wrote for this model: its predictors become lenses; the bundled model has one already."""
    no_twin: Flag = False
    """Leave out the same model with random weights, which is measured on a quarter of the text."""
    json: Flag = False
    """Print the measurements as JSON instead of a table."""
    survey: SurveyOptions = field(default_factory=SurveyOptions)
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Load, read, measure, write, show."""
        texts = [(path.stem, read_texts([path])) for path in self.text]
        loaded = self.loading.load(self.model, stack=True)
        from restpoint.trajectory.reading import Sample
        from restpoint.trajectory.survey import survey
        from restpoint.trajectory.surveyed import Surveyed, untrained_twin

        def samples() -> "Iterator[Sample]":
            labelled = ((kind, text) for kind, own in texts for text in own) if self.text else documents()
            return (Sample(text, kind) for kind, text in labelled)

        profile = profile_for(self.model, self.profile, plain=False)
        if profile is not None:
            profile.require(loaded)
        lenses = None if profile is None else profile.lenses()
        subject = Surveyed(self.model, loaded.model, loaded.tokenizer)
        with terminal.progress_bars() as progress:
            atlas = survey(subject, samples(), self.survey, lenses=lenses, folder=self.output, progress=progress)
        twin = None
        if not self.no_twin and self.survey.share is None:
            fewer = replace(self.survey, max_tokens=max(2, self.survey.max_tokens // 4), scenes=0)
            random = untrained_twin(subject, self.survey.seed)
            texts = [(path.stem, read_texts([path])) for path in self.text]
            with terminal.progress_bars() as progress:
                twin = survey(random, samples(), fewer, folder=self.output / TWIN, progress=progress)
            twin.save(self.output / TWIN)
        atlas.save(self.output)
        _present(atlas, twin, self.output, self.json)

    def interrupted(self) -> str:
        """How to go on."""
        return f"the same command resumes from what {self.output} holds"


@dataclass(frozen=True)
class Report:
    """Write the page, tables and pictures of an atlas anew, perhaps beside another atlas.

    For example:
      restpoint report atlas/ -o page/
      restpoint report atlas/ --beside other-atlas/ -o page/
    """

    atlas: Annotated[Positional[Path], arg(metavar="ATLAS")]
    """Folder that `restpoint analyze` wrote."""
    beside: Folder = None
    """Draw this atlas too, dashed; the untrained twin, if there is one, where left out."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("report")
    """Folder that is written to."""
    json: Flag = False
    """Print the measurements as JSON instead of a table."""

    def run(self) -> None:
        """Read, draw, write, show."""
        from restpoint.trajectory.atlas import Atlas

        atlas = Atlas.load(self.atlas)
        twin = self.atlas / TWIN if (self.atlas / TWIN).is_dir() else None
        beside = self.beside or twin
        _present(atlas, None if beside is None else Atlas.load(beside), self.output, self.json)


@dataclass(frozen=True)
class Compare:
    """Hold two atlases beside each other: a table at equal shares of the depth, and a page with both.

    For example:
      restpoint compare small/ large/ -o page/
    """

    first: Annotated[Positional[Path], arg(metavar="ATLAS")]
    """Folder that `restpoint analyze` wrote."""
    second: Annotated[Positional[Path], arg(metavar="ATLAS")]
    """Another; their models may differ in depth and size."""
    output: Annotated[Path | None, arg(metavar="FOLDER", aliases=["-o"], help_behavior_hint="")] = None
    """Write a page with both to this folder."""
    json: Flag = False
    """Print JSON instead of a table."""

    def run(self) -> None:
        """Read, compare, show."""
        from restpoint.report.page import write_report
        from restpoint.trajectory.atlas import Atlas
        from restpoint.trajectory.comparison import compare

        atlases = Atlas.load(self.first), Atlas.load(self.second)
        found = compare(*atlases)
        if self.json:
            print(tables.comparison_json(found))
        else:
            terminal.show(tables.comparison_table(found))
        if self.output is not None:
            page = write_report(atlases[0], self.output / PAGE, atlases[1])
            terminal.say(f"the page is {page}")


@dataclass(frozen=True)
class Merge:
    """Put the atlases of all shares of a text together.

    For example:
      restpoint merge part1/ part2/ part3/ part4/ -o atlas/
    """

    atlases: Annotated[Positional[tuple[Path, ...]], arg(metavar="ATLAS ...")]
    """Folders that `restpoint analyze --share` wrote, all of them."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("atlas")
    """Folder that the whole atlas is written to."""
    json: Flag = False
    """Print the measurements as JSON instead of a table."""

    def run(self) -> None:
        """Read, add, write, show."""
        from restpoint.trajectory.atlas import Atlas
        from restpoint.trajectory.survey import merge

        atlas = merge([Atlas.load(folder) for folder in self.atlases])
        atlas.save(self.output)
        _present(atlas, None, self.output, self.json)


def _present(atlas: "Atlas", beside: "Atlas | None", folder: Path, json: bool) -> None:
    """Write page, tables and pictures, and show the figures that tell most."""
    from restpoint.report.page import write_report
    from restpoint.report.pictures import export_pictures
    from restpoint.report.tables import export_tables

    page = write_report(atlas, folder / PAGE, beside)
    export_tables(atlas, folder / "tables")
    export_pictures(atlas, folder / "pictures", beside)
    if json:
        print(tables.atlas_json(atlas))
        return
    terminal.show(tables.atlas_table(atlas))
    for note in atlas.conditions["notes"]:
        terminal.say(note)
    terminal.show(f"The page is {page}; tables and pictures are beside it")
