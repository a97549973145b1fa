"""The command line: verbs as dataclasses, whose fields' docstrings are the help; no logic."""

import os
import sys
import traceback
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro
from tyro.conf import Positional, UseAppendAction, arg, subcommand

from restpoint import console
from restpoint.bundled import PROFILE_PATH, fit_texts, prompts
from restpoint.corpus import REFERENCE, model_and_prompt, read_texts
from restpoint.decode.settings import SamplingSettings
from restpoint.errors import RestpointError
from restpoint.evaluate.options import BenchOptions
from restpoint.fit.options import FitOptions
from restpoint.flags import File, Flag, Folder, Name, Number
from restpoint.theory.options import HEAD, LAYERS, SimulateOptions, chosen

if TYPE_CHECKING:  # torch and transformers are imported by the verbs that need them: help is there at once
    from collections.abc import Callable

    from restpoint.generate import Decoder
    from restpoint.model.load import Loaded
    from restpoint.profile import Profile
    from restpoint.theory.study import Study

_ABSENT = "\0"  # no argument of a command line can be this

_DESCRIPTION = """Faster decoding of pretrained transformers, with exactly the model's own output.

MODEL is a checkpoint folder, a Hugging Face Hub name, or `reference`, the small bundled model, which is the default and
needs no network.

Examples:
  restpoint generate "def fibonacci(n):" --stats    text from the bundled model, and what it cost
  restpoint check Qwen/Qwen2.5-0.5B                 what restpoint can do with a model
  restpoint fit MODEL --text corpus.jsonl -o profile/
  restpoint generate MODEL --profile profile/ "Once upon a time"
  restpoint generate MODEL --drafters lookup recycling "Once upon a time"
  restpoint bench --quick --plot bench.png          side by side with the baselines, under a minute
  restpoint simulate -o theory/                     tokens as interacting particles: pictures and tables

`restpoint VERB --help` explains a verb. `--version` prints the version. `--debug`, anywhere, shows the traceback of an
error. Exit codes: 0 done, 1 a fault of restpoint's own, 2 a request that cannot be met, 130 interrupted."""

Model = Annotated[Positional[str], arg(metavar="[MODEL]")]


@dataclass(frozen=True)
class LoadFlags:
    """How the model is loaded."""

    dtype: str = "auto"
    """auto, float32, bfloat16 or float16; auto is the checkpoint's own on a GPU and float32 on a CPU."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:N or mps."""
    device_map: Name = None
    """Spread the model over devices, for example `auto`; instead of --device."""
    revision: Name = None
    """Branch, tag or commit of a Hub model."""
    attention: str = "sdpa"
    """sdpa or eager."""
    trust_remote_code: Flag = False
    """Run the Python code that the checkpoint brings along."""
    threads: Number = None
    """Processor threads; torch's own choice if left out."""

    def load(self, name: str) -> "Loaded":
        """Load a model with these flags."""
        from restpoint.generate import inference_threads
        from restpoint.model.load import load

        inference_threads(self.threads)
        how = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "threads"}
        return load(name, **how)


@dataclass(frozen=True)
class DraftFlags:
    """Who drafts, and how drafts are verified; the text is the model's own in any case."""

    drafters: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="")] = ()
    """lookup, recycling, ngrams, lookahead; with a profile also predictor, heads, dynamic-exit, or one of its
    predictors. Left out: lookup, recycling and predictor where there is a profile, else nobody."""
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

    def decoder(self, loaded: "Loaded", profile: "Profile | None", loading: LoadFlags) -> "Decoder":
        """The model with those who draft for it."""
        from restpoint.decode.drafters.datastore import Datastore, tokenizer_hash
        from restpoint.decode.drafters.draft_model import draft_by_model
        from restpoint.decode.drafters.skips import SkipSet
        from restpoint.drafting import PREDICTOR, retrieve_from, skip_layers
        from restpoint.generate import DEFAULT_VERIFIER, DRAFTERS, Decoder

        names = self.drafters or (DRAFTERS if profile is not None else ())
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
        with console.progress_bars() as progress:
            return Decoder(
                loaded, profile, names, brought=brought, verifier=verifier, compile=self.compile, progress=progress
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
        from restpoint.model.layered import LayeredModel

        loaded = self.loading.load(self.model)
        layered = LayeredModel(loaded.model)
        capabilities = check(layered)
        if self.json:
            print(console.capability_json(loaded, capabilities, layered.depth))
        else:
            console.show(console.capability_table(loaded, capabilities, layered.depth))
            console.show(console.verdict(capabilities))


@dataclass(frozen=True)
class Fit:
    """Fit a profile to a model: predictors, measured costs, calibrated acceptance. An interrupted fit resumes.

    For example:
      restpoint fit -o profile/
      restpoint fit MODEL --text corpus.jsonl notes.txt.gz -o profile/ --max-tokens 500000
    """

    model: Model = REFERENCE
    """Checkpoint folder, Hub name, or `reference`."""
    text: Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint="")] = ()
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

        with console.progress_bars() as progress:
            report = fit_profile(loaded, texts, self.fitting, self.output, progress)
        console.show(console.fit_table(report))
        console.show(f"The profile is in {self.output}")

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
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    drafting: DraftFlags = field(default_factory=DraftFlags)
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Read, load, stream."""
        words = [word for word in (self.model, self.prompt) if word != _ABSENT]
        model, prompt = model_and_prompt(words, self.prompt_file)
        profile = _profile(model, self.profile, self.plain)
        decoder = self.drafting.decoder(self.loading.load(model), profile, self.loading)
        for note in decoder.notes:
            console.say(note)
        rounds = console.write_pieces(
            decoder.stream(
                prompt,
                self.sampling,
                max_tokens=self.max_tokens,
                stop=self.stop,
                ignore_end=self.ignore_end,
                draft_tokens=self.drafting.draft_tokens,
            )
        )
        if rounds[-1].finished == "context":
            console.say(f"stopped: the model's context of {decoder.loaded.context_length} tokens is full")
        if self.stats:
            console.show_statistics(decoder, rounds)


@dataclass(frozen=True)
class Index:
    """Store text so that drafts can be retrieved from it: a suffix array on disk, read as much as is needed.

    For example:
      restpoint index --text *.py -o store/
      restpoint generate --datastore store/ "def main("
    """

    model: Model = REFERENCE
    """Model whose tokenizer encodes the text: a checkpoint folder, Hub name, or `reference`."""
    text: Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint="")] = ()
    """Text to store: plain text, or .jsonl with a field `text`; .gz, .xz, .bz2 of either. Bundled text if left out."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("datastore")
    """Folder that the datastore is written to."""
    loading: LoadFlags = field(default_factory=LoadFlags)

    def run(self) -> None:
        """Read, encode, sort, write."""
        texts = read_texts(self.text) if self.text else fit_texts()
        tokenizer = self.loading.load(self.model).tokenizer
        from restpoint.decode.drafters.datastore import Datastore, tokenizer_hash

        encoded = (tokenizer(text).input_ids for text in console.counted(texts, "read documents"))
        built = Datastore.build(encoded, self.output, tokenizer_hash(tokenizer))
        console.show(f"{built.described.tokens:,} tokens are in {self.output}")


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
        profile = _profile(self.model, self.profile, plain=False)
        loaded = self.loading.load(self.model)
        with console.progress_bars() as progress:
            report = bench(loaded, profile, self.measuring, progress)
        console.show(table(report))
        if self.json is not None:
            report.write(self.json)
        if self.plot is not None:
            chart.draw(report, self.plot)


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
    text: Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint="")] = ()
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


Verb = (
    Annotated[Check, subcommand("check")]
    | Annotated[Fit, subcommand("fit")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Index, subcommand("index")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Simulate, subcommand("simulate")]
)


def _profile(model: str, folder: Path | None, plain: bool) -> "Profile | None":
    """The profile that was asked for, else the bundled one for the bundled model."""
    if plain and folder is not None:
        raise RestpointError("--plain and --profile contradict each other: give one")
    if folder is None and (plain or model != REFERENCE or not PROFILE_PATH.is_dir()):
        return None
    from restpoint.profile import Profile

    return Profile.load(folder or PROFILE_PATH)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 (a fault of ours), 2 (a request's), 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    if words == ["--version"]:
        print(f"restpoint {console.version()}")
        return 0
    verb = None
    try:
        verb = tyro.cli(
            Verb,  # pyright: ignore[reportArgumentType]
            prog="restpoint",
            description=_DESCRIPTION,
            args=words or ["--help"],
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes, tyro.conf.FlagCreatePairsOff),
        )
        verb.run()
        return 0
    except SystemExit as exit:  # tyro's, after a help text or a wrong option
        return int(exit.code or 0)
    except KeyboardInterrupt:
        console.say("; ".join(["interrupted", *([verb.interrupted()] if isinstance(verb, Fit) else [])]))
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # every fault ends in one line; --debug shows where it comes from
        if debug:
            traceback.print_exc()
        if isinstance(error, RestpointError | OSError):
            console.say(f"error: {error}")
            return 2
        console.say(f"internal error: {type(error).__name__}: {error}; --debug shows the traceback")
        return 1


if __name__ == "__main__":
    sys.exit(main())
