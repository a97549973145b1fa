"""Text as it is decoded, and what decoding it took."""

import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:  # these import torch, which a help text can do without
    from restpoint.decode.loop import Round
    from restpoint.generate import Decoder
    from restpoint.generation import Piece, Statistics

_SHALLOW_TO_DEEP = ("bright_blue", "bright_cyan", "bright_green", "bright_yellow", "bright_red")


def write_pieces(pieces: Iterable["Piece"], depth: int | None = None) -> list["Round"]:
    """Write text to standard output as it comes, and return the rounds that it came from.

    Args:
        pieces: the text.
        depth: of the model, to colour text by the share of it that each token took, on a terminal; None for no colours.
    """
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    console = Console(highlight=False)
    rounds: list[Round] = []
    for piece in pieces:
        if depth is None or not console.is_terminal:
            sys.stdout.write(piece.text)
        else:
            console.print(Text(piece.text, style=_depth_style(piece.round.depth, depth)), end="", soft_wrap=True)
        sys.stdout.flush()
        rounds.append(piece.round)
    sys.stdout.write("\n")
    sys.stdout.flush()
    if depth is not None:
        _say_depths(rounds, depth)
    return rounds


def _depth_style(layers: int, depth: int) -> str:
    """Cold colours for tokens that stopped early, none for those that took all layers."""
    if layers >= depth:
        return ""
    return _SHALLOW_TO_DEEP[min(len(_SHALLOW_TO_DEEP) * layers // depth, len(_SHALLOW_TO_DEEP) - 1)]


def _say_depths(rounds: Sequence["Round"], depth: int) -> None:
    """How many tokens took how many layers, on standard error, in the colours of the text."""
    counts: Counter[int] = Counter()
    for turn in rounds:
        counts[turn.depth] += len(turn.tokens)
    told = Text("tokens by layers: ")
    for layers in sorted(counts):
        told.append(f"{layers}", style=_depth_style(layers, depth))
        told.append(f": {counts[layers]}  ")
    mean = sum(layers * count for layers, count in counts.items()) / counts.total()
    told.append(f"(mean {mean:.1f} of {depth})")
    Console(stderr=True, highlight=False).print(told)


def show_statistics(decoder: "Decoder", rounds: list["Round"]) -> None:
    """What a generation cost, on standard error: the text alone is the output."""
    from restpoint.generation import Statistics

    seen = Statistics.of(rounds)
    of_all = "" if decoder.layered.refusal else f"of {decoder.layered.depth} "  # a solver runs as many as it needs
    lengths = Counter(len(turn.tokens) for turn in rounds[1:])
    chosen = "plain"
    if decoder.looping is not None:
        chosen = decoder.looping.named
    elif decoder.exits is not None:
        chosen = "early exits"
    elif decoder.drafting is not None:
        chosen = "drafts by " + ", ".join(decoder.drafting.names)
    lines = [
        f"{seen.new_tokens} new tokens in {seen.passes} passes after the prompt's ({chosen}); "
        f"ended by {rounds[-1].finished}",
        f"{seen.tokens_per_pass:.2f} tokens a pass, {seen.layers_per_token:.1f} {of_all}layers a token",
        f"{seen.drafted} tokens drafted, {seen.accepted} accepted"
        + (f" ({seen.accepted / seen.drafted:.0%})" if seen.drafted else ""),
        f"prefill {seen.prefill_seconds:.3f} s, drafting {seen.draft_seconds:.3f} s, passes "
        f"{seen.verify_seconds:.3f} s, {seen.tokens_per_second:.1f} tokens/s",
        "tokens of each pass: " + " ".join(str(len(turn.tokens)) for turn in rounds[1:]),
        "passes by tokens: " + ", ".join(f"{length}: {lengths[length]}" for length in sorted(lengths)),
    ]
    if (loop := _through_the_loop(decoder, seen)) is not None:
        steps, milliseconds = loop["steps_per_token"], loop["milliseconds_per_token"]
        lines.insert(1, f"{steps:.2f} of {loop['full_steps']} steps a token, {milliseconds:.2f} ms a token")
    for line in lines:
        print(line, file=sys.stderr)


def print_generation(decoder: "Decoder", prompt: str, pieces: Iterable["Piece"]) -> list["Round"]:
    """Print a generation and what it cost as JSON, when it is complete, and return the rounds that it came from."""
    from restpoint.generation import Generation

    kept = list(pieces)
    generation = Generation.of(decoder.encode(prompt), kept)
    loop = _through_the_loop(decoder, generation.statistics)
    content = {"model": decoder.loaded.name, "notes": decoder.notes, **asdict(generation)}
    print(json.dumps(content if loop is None else content | {"loop": loop}, indent=1))
    return [piece.round for piece in kept]


def _through_the_loop(decoder: "Decoder", seen: "Statistics") -> dict[str, Any] | None:
    """What tokens after the prompt's pass took of a loop; None where it is not decoded by itself."""
    if decoder.looping is None:
        return None
    target = decoder.looping.target(decoder.layered)
    return {
        "named": decoder.looping.named,
        "full_steps": target.steps,
        "steps_per_token": target.unrolled.steps_of(seen.depth_per_token) if seen.passes else 0.0,
        "milliseconds_per_token": 1000 / seen.tokens_per_second if seen.tokens_per_second else 0.0,
    }
