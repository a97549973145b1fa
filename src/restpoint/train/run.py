"""Train a model that iterates one block: from text to a checkpoint, with looks at the held-out loss on the way."""

import json
import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from restpoint.errors import RestpointError
from restpoint.files import write
from restpoint.model.recurrent.causal import RecurrentDepthForCausalLM
from restpoint.progress import Progress
from restpoint.train.card import model_card
from restpoint.train.checkpoint import TrainingState
from restpoint.train.losses import Look, draw_losses
from restpoint.train.options import TrainOptions
from restpoint.train.recipe import Schedule, new_model, optimisers
from restpoint.train.text import TrainingText, training_text


@dataclass(frozen=True)
class TrainReport:
    """A finished training.

    Attributes:
        output: the checkpoint's folder.
        parameters: of the model, tied ones once.
        tokens: trained on.
        looks: at the losses, in order.
    """

    output: Path
    parameters: int
    tokens: int
    looks: tuple[Look, ...]


def train_recurrent(
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    options: TrainOptions | None = None,
    output: Path | str = "recurrent",
    embeddings: Tensor | None = None,
    progress: Progress | None = None,
) -> TrainReport:
    """Train a recurrent-depth or deep-equilibrium language model from text, on the processor or the GPU there is.

    Every step depends on the options and its number alone: a stopped training that is started again by the same call
    goes on from its last saved state to what it would have become. ``output`` gets the checkpoint with its tokenizer,
    a model card, ``losses.json`` and ``losses.png``; ``output/training`` the tokens and the state.

    Args:
        tokenizer: saved with the model.
        texts: documents; all are read.
        options: what to train.
        output: folder.
        embeddings: to begin with, (vocabulary, hidden size); random ones if None.
        progress: called as work proceeds.

    Raises:
        RestpointError: the text is too short, ``output`` holds an unfinished training of something else, or the loss is
            no number any more.

    Papers:
        Geiping et al. 2025, "Scaling up test-time compute with latent reasoning: a recurrent depth approach" (random
        numbers of iterations, truncated backpropagation); McLeish et al. 2025, "Teaching pretrained language models to
        think deeper with retrofitted recurrence" (the ramp); Bai, Kolter, Koltun 2019 (deep equilibrium models).
    """
    options = options or TrainOptions()
    output = Path(output)
    report = progress or (lambda _stage, _done, _total: None)
    report("tokenise", 0, 1)
    text = training_text(
        tokenizer, texts, options.sequence_length, options.held_out, output / "training" / "text.safetensors"
    )
    report("tokenise", 1, 1)
    model = new_model(options, tokenizer, embeddings)
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    state = TrainingState(output / "training", options.binding | {"text_sha256": text.sha256})
    looks = _Trainer(model, options, text, state).run(report)
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    done = TrainReport(output, model.num_parameters(), options.steps * options.batch * options.sequence_length, looks)
    write(output / "losses.json", lambda path: path.write_text(json.dumps([asdict(look) for look in looks], indent=1)))
    write(output / "losses.png", lambda path: draw_losses(looks, path))
    card = model_card(options, done.parameters, text, looks[-1].held_out)
    write(output / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
    return done


class _Trainer:
    def __init__(
        self, model: RecurrentDepthForCausalLM, options: TrainOptions, text: TrainingText, state: TrainingState
    ):
        self.model, self.options, self.text, self.state = model, options, text, state
        self.optimisers = optimisers(model, options)
        self.schedule = Schedule(options)
        self.looks: list[Look] = []

    def run(self, report: Progress) -> tuple[Look, ...]:
        """All the steps that are left; the state is saved now and then."""
        options, first = self.options, self.state.resume(self.model, self.optimisers)
        self.looks = [look for look in self._noted() if look.step <= first]
        losses: list[Tensor] = []
        for step in range(first, options.steps):
            losses.append(self._step(step))
            report(f"train, {self.looks[-1].training:.2f} nats" if self.looks else "train", step + 1, options.steps)
            last = step + 1 == options.steps
            if last or (step + 1) % options.evaluate_every == 0:
                self._look(step + 1, losses)
                losses = []
            if last or (step + 1) % options.save_every == 0:
                self.state.save(self.model, self.optimisers, step + 1)
        if not self.looks:
            self._look(options.steps, losses)
        return tuple(self.looks)

    def _step(self, step: int) -> Tensor:
        """One batch, one step of both optimisers; the loss stays on the device."""
        options, model = self.options, self.model.train()
        torch.manual_seed(options.seed * 1_000_003 + step)
        ids = self.text.batch(step, options.batch, options.seed).to(model.device)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = self.schedule.rate(step)
        loss = self._loss(ids, None if options.kind == "deq" else self.schedule.iterations(step))
        loss.backward()
        size = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip)
        if not math.isfinite(float(size)):
            raise RestpointError(
                f"learning_rate: at step {step + 1} the gradient is no number any more; the state of step "
                f"{step // options.save_every * options.save_every} is kept, start again in another folder with a "
                f"learning_rate below {options.learning_rate}"
            )
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        return loss.detach()

    def _loss(self, ids: Int[Tensor, "batch length"], iterations: int | None) -> Tensor:
        with self._precision():
            return self.model(input_ids=ids, labels=ids, num_steps=iterations, use_cache=False).loss

    def _precision(self) -> AbstractContextManager:
        if self.options.precision == "float32":
            return nullcontext()
        return torch.autocast(self.model.device.type, torch.bfloat16)

    def _look(self, step: int, losses: list[Tensor]) -> None:
        training = float(torch.stack(losses).mean()) if losses else math.nan
        self.looks.append(Look(step, training, self._held_out()))
        lines = "".join(json.dumps(asdict(look)) + "\n" for look in self.looks)
        write(self._notes, lambda path: path.write_text(lines))

    @torch.no_grad()
    def _held_out(self) -> dict[int, float]:
        """Mean loss of held-out sequences, by the number of iterations."""
        model, mean = self.model.eval(), self.options.mean_recurrence
        numbers = sorted({1, max(1, mean // 4), max(1, mean // 2), mean, 2 * mean})
        if self.options.kind == "deq":
            numbers = [self.options.solver_steps]
        elif self.options.fixed_recurrence:
            numbers = [mean]
        found = {}
        for number in numbers:
            parts = [self._loss(ids.long().to(model.device), number) for ids in self.text.held_out.split(8)]
            sizes = torch.tensor([float(len(ids)) for ids in self.text.held_out.split(8)])
            found[number] = float((torch.stack(parts).cpu() * sizes).sum() / sizes.sum())
        return found

    @property
    def _notes(self) -> Path:
        return self.state.folder / "losses.jsonl"

    def _noted(self) -> list[Look]:
        if not self._notes.is_file():
            return []
        found = [json.loads(line) for line in self._notes.read_text().splitlines()]
        return [Look(one["step"], one["training"], {int(k): v for k, v in one["held_out"].items()}) for one in found]
