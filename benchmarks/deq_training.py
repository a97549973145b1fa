"""A deep-equilibrium language model beside explicit ones of the same parameters, trained on the same text.

    python benchmarks/deq_training.py --text corpus.jsonl -o build/deq
    python benchmarks/deq_training.py -o build/deq --max-tokens 200000          # the bundled text, a few minutes

Trained are: the core run once (an ordinary model of these parameters), the core iterated a fixed number of times with
gradients through all of them, and the core solved to its fixed point with implicit gradients. Then: what a training
step of each keeps for its backward pass, in bytes, as the number of iterations grows; counted from the tensors that
autograd saves, storages once. Trainings resume where they were stopped.
"""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from restpoint.bundled import fit_texts
from restpoint.console.terminal import progress_bars
from restpoint.corpus import read_texts
from restpoint.model.load import load
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.train.options import TrainOptions
from restpoint.train.recipe import new_model
from restpoint.train.run import train_recurrent


@dataclass(frozen=True)
class Options:
    """What is trained."""

    text: tuple[Path, ...] = ()
    """Files to train on; the bundled text if left out."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("build/deq")
    """Folder of the models."""
    unrolled: int = 8
    """Iterations of the explicit model that iterates."""
    threads: int | None = None
    """Processor threads; torch's own choice if left out."""
    training: TrainOptions = field(
        default_factory=lambda: TrainOptions(
            max_tokens=600_000, hidden_size=128, heads=2, key_value_heads=1, sequence_length=256
        )
    )


def main(options: Options) -> None:
    """Train all three, print their perplexities, then what their steps keep."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    tokenizer = load(device="cpu").tokenizer
    fixed = replace(options.training, fixed_recurrence=True, ramp=0.0)
    deep = {"mean_recurrence": options.unrolled, "gradient_steps": options.unrolled}
    kinds = {
        "explicit": replace(fixed, mean_recurrence=1),
        f"unrolled {options.unrolled}": replace(fixed, **deep),
        "equilibrium": replace(options.training, kind="deq"),
    }
    print(f"{'model':<14}{'parameters':>12}{'tokens':>12}{'perplexity':>12}{'of explicit':>12}{'tokens/s':>10}")
    explicit = math.nan
    for name, training in kinds.items():
        texts = read_texts(options.text) if options.text else fit_texts()
        started = time.perf_counter()
        with progress_bars() as progress:
            report = train_recurrent(
                tokenizer, texts, training, options.output / name.replace(" ", "-"), None, progress
            )
        rate = report.tokens / (time.perf_counter() - started)
        perplexity = math.exp(min(report.looks[-1].held_out.values()))
        explicit = perplexity if name == "explicit" else explicit
        print(
            f"{name:<14}{report.parameters:>12,}{report.tokens:>12,}{perplexity:>12.2f}{perplexity / explicit:>12.3f}"
            f"{rate:>10.0f}",
            flush=True,
        )
    print(f"\n{'iterations':<14}{'unrolled, MiB':>16}{'equilibrium, MiB':>20}")
    ids = torch.randint(len(tokenizer), (2, 128), generator=torch.Generator().manual_seed(0))
    for steps in (4, 16, 64):
        unrolled = new_model(replace(fixed, mean_recurrence=steps, gradient_steps=steps), tokenizer)
        # A tolerance that is never met, so that all the iterations run.
        solved = new_model(
            replace(kinds["equilibrium"], solver_steps=steps, solver_tolerance=1e-7, precision="float32"), tokenizer
        )
        kept = [saved_bytes(model, ids, steps) / 2**20 for model in (unrolled, solved)]
        print(f"{steps:<14}{kept[0]:>16.1f}{kept[1]:>20.1f}")


def saved_bytes(model: RecurrentDepthForCausalLM, ids: Tensor, steps: int) -> int:
    """Bytes that autograd keeps between a forward pass and its backward pass, the parameters' own not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(input_ids=ids, labels=ids, num_steps=steps, use_cache=False).loss
    assert loss.requires_grad
    return sum(kept.values())


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, config=(tyro.conf.OmitArgPrefixes,)))
