"""What several verbs have in common: the model, how it is loaded, its profile."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from restpoint.bundled import PROFILE_PATH, REFERENCE
from restpoint.errors import RestpointError
from restpoint.flags import Flag, Name, Number

if TYPE_CHECKING:  # torch and transformers are imported by the verbs that need them: help is there at once
    from restpoint.model.load import Loaded
    from restpoint.profile import Profile

Model = Annotated[Positional[str], arg(metavar="[MODEL]")]
Texts = Annotated[tuple[Path, ...], arg(metavar="FILE ...", help_behavior_hint="")]


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

    def load(self, name: str, stack: bool = False) -> "Loaded":
        """Load a model with these flags; with ``stack``, an encoder will do."""
        from restpoint.generate import inference_threads
        from restpoint.model.load import load

        inference_threads(self.threads)
        how = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "threads"}
        return load(name, causal=not stack, **how)


def profile_for(model: str, folder: Path | None, plain: bool) -> "Profile | None":
    """The profile that was asked for, else the bundled one for the bundled model."""
    if plain and folder is not None:
        raise RestpointError("--plain and --profile contradict each other: give one")
    if folder is None and (plain or model != REFERENCE or not PROFILE_PATH.is_dir()):
        return None
    from restpoint.profile import Profile

    return Profile.load(folder or PROFILE_PATH)
