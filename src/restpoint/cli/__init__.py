"""The command line: verbs as dataclasses, whose fields' docstrings are the help; no logic."""

import os
import sys
import traceback
from typing import Annotated

import tyro
from tyro.conf import subcommand

from restpoint.cli.decoding import Bench, Check, Fit, Generate, Index
from restpoint.cli.exiting import Calibrate, Sweep
from restpoint.cli.studying import Analyze, Compare, Merge, Report, Simulate
from restpoint.cli.training import TrainRecurrent
from restpoint.console import terminal
from restpoint.errors import RestpointError

_DESCRIPTION = """Faster decoding of pretrained transformers, with exactly the model's own output or a certified loss.

MODEL is a checkpoint folder, a Hugging Face Hub name, `reference`, the small bundled model, which is the default, or
`recurrent`, one that iterates a block; the bundled ones need no network.

Examples:
  restpoint generate "def fibonacci(n):" --stats    text from the bundled model, and what it cost
  restpoint check Qwen/Qwen2.5-0.5B                 what restpoint can do with a model
  restpoint fit MODEL --text corpus.jsonl -o profile/
  restpoint generate MODEL --profile profile/ "Once upon a time"
  restpoint generate MODEL --drafters lookup recycling "Once upon a time"
  restpoint sweep MODEL -o sweep/                   what early exits could save, and at what loss
  restpoint calibrate MODEL --profile profile/ --epsilon 0.02   early exits with a certificate
  restpoint bench --quick --plot bench.png          side by side with the baselines, under a minute
  restpoint analyze MODEL --text corpus.txt -o atlas/   how tokens move through its layers, on one page
  restpoint simulate -o theory/                     tokens as interacting particles: pictures and tables
  restpoint train-recurrent --text corpus.jsonl -o model/   a small model that iterates one block

`restpoint VERB --help` explains a verb. `--version` prints the version. `--debug`, anywhere, shows the traceback of an
error. Exit codes: 0 done, 1 a fault of restpoint's own, 2 a request that cannot be met, 130 interrupted."""

Verb = (
    Annotated[Check, subcommand("check")]
    | Annotated[Fit, subcommand("fit")]
    | Annotated[Generate, subcommand("generate")]
    | Annotated[Index, subcommand("index")]
    | Annotated[Calibrate, subcommand("calibrate")]
    | Annotated[Sweep, subcommand("sweep")]
    | Annotated[Bench, subcommand("bench")]
    | Annotated[Analyze, subcommand("analyze")]
    | Annotated[Report, subcommand("report")]
    | Annotated[Compare, subcommand("compare")]
    | Annotated[Merge, subcommand("merge")]
    | Annotated[Simulate, subcommand("simulate")]
    | Annotated[TrainRecurrent, subcommand("train-recurrent")]
)


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return its exit code: 0, 1 (a fault of ours), 2 (a request's), 130 (interrupted)."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    debug = "--debug" in words[:end]
    words = [word for word in words[:end] if word != "--debug"] + words[end:]
    if words == ["--version"]:
        print(f"restpoint {terminal.version()}")
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
        resumed = [verb.interrupted()] if isinstance(verb, Fit | Analyze | Calibrate | TrainRecurrent) else []
        terminal.say("; ".join(["interrupted", *resumed]))
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:  # every fault ends in one line; --debug shows where it comes from
        if debug:
            traceback.print_exc()
        if isinstance(error, RestpointError | OSError):
            terminal.say(f"error: {error}")
            return 2
        terminal.say(f"internal error: {type(error).__name__}: {error}; --debug shows the traceback")
        return 1
