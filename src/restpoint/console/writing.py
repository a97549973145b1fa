"""Text as it is decoded, and what decoding it took."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:  # these import torch, which a help text can do without
    from restpoint.decode.loop import Round
    from restpoint.generate import Decoder
    from restpoint.generation import Piece

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
    if decoder.exits is not None:
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
    for line in lines:
        print(line, file=sys.stderr)
