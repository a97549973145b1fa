"""The verb that trains a model."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from restpoint.bundled import REFERENCE
from restpoint.cli.loading import Texts
from restpoint.console import tables, terminal
from restpoint.corpus import read_texts
from restpoint.errors import RestpointError
from restpoint.flags import Flag, Number
from restpoint.train.options import TrainOptions


@dataclass(frozen=True)
class TrainRecurrent:
    """Train a small language model that iterates one block, from text: of recurrent depth, or of deep equilibrium.

    The core is iterated a random number of times in training, with gradients through the last few, so that one
    checkpoint serves at every number. A stopped training resumes from its last saved state. The folder gets the
    checkpoint with a tokenizer, a model card and a picture of the losses.

    For example:
      restpoint train-recurrent --text corpus.jsonl -o model/
      restpoint train-recurrent --text corpus.jsonl --kind deq --max-tokens 1000000 -o deq/
      restpoint generate model/ "Once upon a time"
    """

    text: Texts = ()
    """Text to train on: plain text, or .jsonl with a field `text`; .gz, .xz, .bz2 of either."""
    output: Annotated[Path, arg(metavar="FOLDER", aliases=["-o"])] = Path("recurrent")
    """Folder that the model is written to."""
    tokenizer: str = REFERENCE
    """Model whose tokenizer is used: a checkpoint folder, a Hub name, or `reference`."""
    threads: Number = None
    """Processor threads; torch's own choice if left out."""
    json: Flag = False
    """Print JSON instead of a table."""
    training: TrainOptions = field(default_factory=TrainOptions)

    def run(self) -> None:
        """Read, train, show."""
        if not self.text:
            raise RestpointError("text: none is given; name the files to train on with --text")
        texts = read_texts(self.text)
        import torch

        from restpoint.model.load import load
        from restpoint.train.run import train_recurrent

        if self.threads is not None:
            torch.set_num_threads(self.threads)
        source = load(self.tokenizer, device="cpu")
        embedding: Any = source.model.get_input_embeddings()
        embeddings = embedding.weight if self.training.start_embeddings else None
        with terminal.progress_bars() as progress:
            report = train_recurrent(
                source.tokenizer, texts, self.training, self.output, embeddings=embeddings, progress=progress
            )
        if self.json:
            print((self.output / "losses.json").read_text())
        else:
            terminal.show(tables.train_table(report))

    def interrupted(self) -> str:
        """How to go on."""
        return f"the same command resumes from what {self.output} holds"
