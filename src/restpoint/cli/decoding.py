"""Verbs that decode, and what prepares for it."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, UseAppendAction, arg

from restpoint.bundled import REFERENCE, fit_texts
from restpoint.cli.loading import LoadFlags, Model, Texts, profile_for
from restpoint.console import tables, terminal, writing
from restpoint.corpus import model_and_prompt, read_texts
from restpoint.decode.settings import SamplingSettings
from restpoint.errors import RestpointError
from restpoint.evaluate.options import BenchOptions
from restpoint.fit.options import FitOptions
from restpoint.flags import File, Flag, Folder, Name, Number

if TYPE_CHECKING:
    from restpoint.generate import Decoder
    from restpoint.looping import Looping
    from restpoint.model.load import Loaded
    from restpoint.profile import Profile

_ABSENT = "\0"  # no argument of a command line can be this


@dataclass(frozen=True)
class DraftFlags:
    """Who drafts, and how drafts are verified; the text is the model's own in any case."""

    drafters: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """lookup, recycling, ngrams, lookahead; with a profile also predictor, heads, dynamic-exit, or one of its
    predictors; for a model that iterates a block also steps, or steps@K for K of them. Left out: lookup, recycling and
    predictor where there is a profile; lookup and recycling for a model that iterates a block; else nobody."""
    draft_model: Name = None
    """Draft by this smaller model too, instead of a predictor: a folder or Hub name."""
    reencode: Flag = False
    """Allow a draft model with another vocabulary: its text is encoded anew."""
    datastore: Folder = None
    """Draft by what `restpoint index` stored, too."""
    skip_layers: Annotated[tuple[int, ...], arg(metavar="LAYER ...", help_behavior_hint="")] = ()
    """Draft by the model itself without these layers, instead of a predictor."""
    compile: Flag = False
    """Decode in compiled passes: the first time takes a minute or so, later times some seconds."""
    draft_tokens: Number = None
    """Verify this many drafted tokens in every round; decided round by round if left out."""
    verifier: Name = None
    """How drafts are verified when tokens are sampled: token-wise, block, k-seq, recursive, optimal, traversal."""
    exit: Flag = False
    """Exit early as the profile is calibrated to, instead of drafting: the text may differ, as rarely as the
    certificate says (see `restpoint calibrate`)."""

    def decoder(
        self,
        loaded: "Loaded",
        profile: "Profile | None",
        loading: LoadFlags,
        plain: bool = False,
        looping: "Looping | None" = None,
    ) -> "Decoder":
        """The model with those who draft for it; nobody by default if ``plain``, and nobody at all with ``looping``."""
        from restpoint.decode.drafters.datastore import Datastore, tokenizer_hash
        from restpoint.decode.drafters.draft_model import draft_by_model
        from restpoint.decode.drafters.skips import SkipSet
        from restpoint.drafting.brought import retrieve_from, skip_layers
        from restpoint.drafting.names import PREDICTOR
        from restpoint.generate import DEFAULT_VERIFIER, Decoder, default_drafters

        if looping is not None:
            self._refuse("--loop-exit and its like")
            return Decoder(loaded, profile, (), looping=looping)
        if self.exit:
            self._refuse("--exit", but=("exit", "drafters", "compile"))  # Decoder has more to say of these
            return Decoder(loaded, profile, self.drafters, compile=self.compile, exits=True)
        names = self.drafters or (() if plain else default_drafters(loaded, profile))
        brought = {}
        if self.draft_model is not None and self.skip_layers:
            raise RestpointError("--draft-model and --skip-layers both draft step by step: give one")
        if self.draft_model is not None:
            brought["draft-model"] = draft_by_model(loading.load(self.draft_model), loaded, reencode=self.reencode)
        if self.skip_layers:
            brought["layer-skip"] = skip_layers(SkipSet(self.skip_layers))
        if brought and not self.drafters:
            names = tuple(name for name in names if name != PREDICTOR)
        if self.datastore is not None:
            datastore = Datastore.open(self.datastore)
            datastore.require(tokenizer_hash(loaded.tokenizer))
            brought["datastore"] = retrieve_from(datastore)
        verifier = self.verifier or DEFAULT_VERIFIER
        with terminal.progress_bars() as progress:
            return Decoder(
                loaded, profile, names, brought=brought, verifier=verifier, compile=self.compile, progress=progress
            )

    def _refuse(self, way: str, but: tuple[str, ...] = ()) -> None:
        """Refuse flags of drafting where nobody drafts."""
        for one in fields(self):
            if one.name not in but and getattr(self, one.name) != one.default:
                flag = one.name.replace("_", "-")
                raise RestpointError(f"--{flag}: with {way} nobody drafts; leave it out")


@dataclass(frozen=True)
class LoopFlags:
    """For models that iterate a block: how tokens go through the loop, undrafted; the text may differ (see sweep)."""

    loop_exit: Annotated[str | None, arg(metavar="NAME[=SETTING]", help_behavior_hint="")] = None
    """Tokens leave the loop, each by itself, by this test of two successive states: acceleration[=30%],
    relative-step[=0.1], step-norm[=10%], cosine[=0.005], kl[=0.01], entropy-difference[=0.01], transport[=0.05],
    argmax-stability[=3], acceleration-once[=30%], step-norm-twice[=10%]. In brackets the setting where none is given:
    a threshold that the test falls below, or steps in a row; 10% is a share of the state's size, 10 is in its units; 0
    never leaves."""
    loop_start: Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")] = None
    """Tokens begin the loop at zero, at the previous token's state (previous), or where the profile's start predicts
    that they rest (predicted; see `restpoint fit --start`), instead of where the model was trained to."""
    loop_steps: Number = None
    """Run so many steps at most; the model's mean recurrence if left out."""
    loop_keys: Number = None
    """Of each token, keep keys and values of the last so many steps only, which costs less memory, and at 1 fewer steps
    to rest. Left out: of every step; 1 with --loop-start."""

    def looping(self, loaded: "Loaded", profile: "Profile | None") -> "Looping | None":
        """What these ask for; None where they ask for nothing."""
        if self == LoopFlags():
            return None
        from restpoint.looping import looping

        return looping(
            loaded,
            exits=self.loop_exit,
            start=self.loop_start,
            steps=self.loop_steps,
            keys=self.loop_keys,
            profile=profile,
        )


@dataclass(frozen=True)
class Check:
    """Say what restpoint can do with a model, by comparing numbers with the model's own code.

    For example:
      restpoint check
      restpoint check gpt2 --json
    """

    model: Model = REFERENCE
    """Checkpoint folder, Hub name, or `reference`."""
    json: Flag = False
    """Print JSON instead of a table."""
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Load, check, show."""
        from restpoint.model.check import check
        from restpoint.model.unrolled import layered_model

        loaded = self.loading.load(self.model)
        layered = layered_model(loaded.model)
        capabilities = check(layered)
        if self.json:
            print(tables.capability_json(loaded, capabilities, layered.depth))
        else:
            terminal.show(tables.capability_table(loaded, capabilities, layered.depth))
            terminal.show(tables.verdict(capabilities))


@dataclass(frozen=True)
class Fit:
    """Fit a profile to a model: predictors, measured costs, calibrated acceptance. An interrupted fit resumes.

    For example:
      restpoint fit -o profile/
      restpoint fit MODEL --text corpus.jsonl notes.txt.gz -o profile/ --max-tokens 500000
      restpoint fit RECURRENT_MODEL --start -o profile/
    """

    model: Model = REFERENCE
    """Checkpoint folder, Hub name, or `reference`."""
    text: Texts = ()
    """Text to fit on: plain text, or .jsonl with a field `text`; .gz, .xz, .bz2 of either. Bundled text if left out."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("profile")
    """Folder that the profile is written to."""
    fitting: FitOptions = field(default_factory=FitOptions)
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Read, load, fit, show."""
        texts = read_texts(self.text) if self.text else fit_texts()
        loaded = self.loading.load(self.model)

        from restpoint.fit.run import fit_profile

        with terminal.progress_bars() as progress:
            report = fit_profile(loaded, texts, self.fitting, self.output, progress)
        terminal.show(tables.fit_table(report))
        terminal.show(f"The profile is in {self.output}")

    def interrupted(self) -> str:
        """How to go on."""
        return f"the same command resumes from what {self.output} holds"


@dataclass(frozen=True)
class Generate:
    """Continue a prompt; the text goes to standard output as it comes.

    For example:
      restpoint generate "def fibonacci(n):" --stats
      restpoint generate MODEL --profile profile/ --temperature 0.8 --top-p 0.95 "Once upon a time"
      git diff | restpoint generate MODEL - --max-tokens 60
      restpoint generate recurrent --loop-exit kl --stats "Once upon a time"
    """

    model: Annotated[Positional[str], arg(metavar="[MODEL]", help_behavior_hint=f"(default: {REFERENCE})")] = _ABSENT
    """Checkpoint folder, Hub name, or `reference`."""
    prompt: Annotated[Positional[str], arg(metavar="PROMPT", help_behavior_hint="")] = _ABSENT
    """Text to continue, quoted; - reads standard input. A single word or quoted text is the prompt."""
    prompt_file: File = None
    """Read the prompt from a file."""
    max_tokens: int = 128
    """Largest number of new tokens."""
    stop: Annotated[UseAppendAction[tuple[str, ...]], arg(metavar="TEXT")] = ()
    """End before this text."""
    profile: Folder = None
    """What `restpoint fit` wrote for this model; the bundled model has one already."""
    plain: Flag = False
    """Decode without drafts."""
    ignore_end: Flag = False
    """Go on after the model's end token."""
    stats: Flag = False
    """Say on standard error what the text cost: accepted lengths, layers, seconds."""
    show_depth: Flag = False
    """Colour every token by the layers that it took."""
    json: Flag = False
    """Print the text and what it cost as JSON, when it is complete."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    drafting: DraftFlags = field(default_factory=DraftFlags)
    looping: LoopFlags = field(default_factory=LoopFlags)
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Read, load, stream."""
        words = [word for word in (self.model, self.prompt) if word != _ABSENT]
        model, prompt = model_and_prompt(words, self.prompt_file)
        profile = profile_for(model, self.profile, self.plain)
        loaded = self.loading.load(model)
        looping = self.looping.looping(loaded, profile)
        decoder = self.drafting.decoder(loaded, profile, self.loading, self.plain, looping)
        for note in (*decoder.notes, decoder.unfamiliar(prompt)):
            if note:
                terminal.say(note)
        pieces = decoder.stream(
            prompt,
            self.sampling,
            max_tokens=self.max_tokens,
            stop=self.stop,
            ignore_end=self.ignore_end,
            draft_tokens=self.drafting.draft_tokens,
        )
        if self.json:
            rounds = writing.print_generation(decoder, prompt, pieces)
        else:
            rounds = writing.write_pieces(pieces, depth=decoder.layered.depth if self.show_depth else None)
        if rounds[-1].finished == "context":
            terminal.say(f"stopped: the model's context of {decoder.loaded.context_length} tokens is full")
        if self.stats:
            writing.show_statistics(decoder, rounds)


@dataclass(frozen=True)
class Index:
    """Store text so that drafts can be retrieved from it: a suffix array on disk, read as much as is needed.

    For example:
      restpoint index --text *.py -o store/
      restpoint generate --datastore store/ "def main("
    """

    model: Model = REFERENCE
    """Model whose tokenizer encodes the text: a checkpoint folder, Hub name, or `reference`."""
    text: Texts = ()
    """Text to store: plain text, or .jsonl with a field `text`; .gz, .xz, .bz2 of either. Bundled text if left out."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("datastore")
    """Folder that the datastore is written to."""
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Read, encode, sort, write."""
        texts = read_texts(self.text) if self.text else fit_texts()
        tokenizer = self.loading.load(self.model).tokenizer
        from restpoint.decode.drafters.datastore import Datastore, tokenizer_hash

        encoded = (tokenizer(text).input_ids for text in terminal.counted(texts, "read documents"))
        built = Datastore.build(encoded, self.output, tokenizer_hash(tokenizer))
        terminal.show(f"{built.described.tokens:,} tokens are in {self.output}")


@dataclass(frozen=True)
class Bench:
    """Measure decoding speed side by side with the baselines, and whether the tokens are the model's own.

    For example:
      restpoint bench --quick
      restpoint bench MODEL --profile profile/ --plot bench.png --json bench.json --domains code maths
    """

    model: Model = REFERENCE
    """Checkpoint folder, Hub name, or `reference`."""
    profile: Folder = None
    """What `restpoint fit` wrote for this model; the bundled model has one already."""
    plot: File = None
    """Draw a bar chart: .png, .svg or .pdf."""
    json: File = None
    """Write conditions and rows as JSON."""
    measuring: BenchOptions = field(default_factory=BenchOptions)
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Load, measure, show, write."""
        from restpoint.evaluate import chart
        from restpoint.evaluate.speed import bench
        from restpoint.evaluate.table import table

        if self.plot is not None:
            chart.check_path(self.plot)
        profile = profile_for(self.model, self.profile, plain=False)
        loaded = self.loading.load(self.model)
        with terminal.progress_bars() as progress:
            report = bench(loaded, profile, self.measuring, progress)
        terminal.show(table(report))
        if self.json is not None:
            report.write(self.json)
        if self.plot is not None:
            chart.draw(report, self.plot)
