"""Verbs of bounded-error early exit: what it could save, and a certificate of what it may cost."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from restpoint.bundled import REFERENCE, fit_texts
from restpoint.calibrate.options import CalibrateOptions, SweepOptions
from restpoint.cli.loading import LoadFlags, Model, Texts, profile_for
from restpoint.console import tables, terminal
from restpoint.corpus import read_texts
from restpoint.errors import RestpointError
from restpoint.evaluate.looped.options import LoopOptions
from restpoint.flags import Flag, Folder

if TYPE_CHECKING:
    from restpoint.model.load import Loaded


@dataclass(frozen=True)
class Calibrate:
    """Calibrate early exits: tokens leave the model before its last layer, and the loss is bounded with a certificate.

    By default tokens stop that a signal is sure of. Predictors are fitted on a part of the text, layers and thresholds
    chosen on another. On the rest the model decodes with exits, and every token is held against the full model: the
    fastest threshold is kept for which the expected loss is shown to be at most epsilon, with probability 1 - delta
    (Learn-then-Test). Rule and certificate are written into the profile; `restpoint generate --exit` decodes by them.
    That no threshold qualifies is an answer too. Depths by position and skipped layers (--rule) are certified by the
    same test. An interrupted calibration resumes.

    For example:
      restpoint calibrate -o profile/
      restpoint calibrate --rule layer-skip --epsilon 0.1 -o profile/
      restpoint calibrate MODEL --profile profile/ --text calib.jsonl --loss disagreement --epsilon 0.02 -o profile/
      restpoint generate MODEL --profile profile/ --exit --show-depth "Once upon a time"
    """

    model: Model = REFERENCE
    """Checkpoint folder, Hub name, or `reference`."""
    profile: Folder = None
    """What `restpoint fit` wrote for this model; the bundled model has one already."""
    text: Texts = ()
    """Text like that to come: plain text, or .jsonl with a field `text`; .gz, .xz, .bz2 of either. Bundled text if
    left out."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("profile")
    """Folder that the profile is written to, with the exits in it; may be that of the profile."""
    json: Flag = False
    """Print JSON instead of a table."""
    calibrating: CalibrateOptions = field(default_factory=CalibrateOptions)
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Read, load, calibrate, show."""
        if self.calibrating.loss == "score-drop":
            raise RestpointError(
                "loss: score-drop needs a score of each text, which only Python can give: calibrate_exits(.., score=..)"
            )
        texts = read_texts(self.text) if self.text else fit_texts()
        profile = profile_for(self.model, self.profile, plain=False)
        if profile is None:
            raise RestpointError(f"profile: none is given; make one with: restpoint fit {self.model} --output FOLDER")
        loaded = self.loading.load(self.model)
        from restpoint.calibrate.run import calibrate_exits

        with terminal.progress_bars() as progress:
            report = calibrate_exits(loaded, texts, profile, self.calibrating, self.output, progress)
        if self.json:
            print(tables.calibrate_json(report))
        else:
            terminal.show(tables.calibrate_table(report))

    def interrupted(self) -> str:
        """How to go on."""
        return f"the same command resumes from what {self.output} holds"


@dataclass(frozen=True)
class Sweep:
    """Draw what early exits could save against what they would lose, for every signal, with the oracle as the ceiling.

    The model continues some of the text at full depth, once; every signal at every threshold is told from that. Writes
    sweep.png, sweep.json and the traces.

    On a model that iterates a block, tokens leave the loop: exit criteria are held against the full number of steps on
    text that is given, with the perplexity that they cost, then timed; so are ways to begin the loop. Writes sweep.png
    and sweep.json.

    For example:
      restpoint sweep -o sweep/
      restpoint sweep MODEL --text corpus.jsonl --signals max-p gate kl --layers 8 12 16 20 -o sweep/
      restpoint sweep RECURRENT_MODEL --criteria acceleration step-norm kl -o sweep/
    """

    model: Model = REFERENCE
    """Checkpoint folder, Hub name, or `reference`."""
    text: Texts = ()
    """Text to continue: plain text, or .jsonl with a field `text`; .gz, .xz, .bz2 of either. Bundled text if left
    out."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("sweep")
    """Folder that is written to."""
    json: Flag = False
    """Print JSON instead of a table."""
    sweeping: SweepOptions = field(default_factory=SweepOptions)
    looping: LoopOptions = field(default_factory=LoopOptions)
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Read, load, record, draw, show."""
        loaded = self.loading.load(self.model)
        if loaded.model.config.model_type == "restpoint_recurrent":
            _refuse_changed(self.sweeping, "for models that do not iterate a block")
            return self._run_loop(loaded)
        _refuse_changed(self.looping, "for models that iterate a block")
        texts = read_texts(self.text) if self.text else fit_texts()
        from restpoint.calibrate.sweeping import sweep_exits
        from restpoint.evaluate.exit_chart import draw

        with terminal.progress_bars() as progress:
            found = sweep_exits(loaded, texts, self.sweeping, self.output, progress)
        draw({**found.curves, "oracle": found.oracle}, self.output / "sweep.png")
        found.write(self.output / "sweep.json")
        if self.json:
            print((self.output / "sweep.json").read_text())
        else:
            terminal.show(tables.sweep_table(found))
            terminal.say(f"the picture is {self.output / 'sweep.png'}")

    def _run_loop(self, loaded: "Loaded") -> None:
        from restpoint.evaluate.looped.chart import draw
        from restpoint.evaluate.looped.run import sweep_loop
        from restpoint.evaluate.looped.table import loop_table

        with terminal.progress_bars() as progress:
            found = sweep_loop(loaded, read_texts(self.text) if self.text else None, self.looping, progress)
        self.output.mkdir(parents=True, exist_ok=True)
        draw(found, self.output / "sweep.png")
        found.write(self.output / "sweep.json")
        if self.json:
            print((self.output / "sweep.json").read_text())
        else:
            terminal.show(loop_table(found))
            terminal.say(f"the picture is {self.output / 'sweep.png'}")


def _refuse_changed(options: SweepOptions | LoopOptions, whose: str) -> None:
    """Refuse options that were given and do not apply, by name."""
    plain = type(options)()
    for one in fields(options):
        value = getattr(options, one.name)
        if value != getattr(plain, one.name):
            raise RestpointError(f"{one.name} is {value}; it is {whose}: leave it out here")
