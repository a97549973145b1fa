"""How fields of options look on the command line: names of values, and defaults that need no mention."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

Name = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
Number = Annotated[int | None, arg(metavar="N", help_behavior_hint="")]
Layers = Annotated[tuple[int, ...], arg(metavar="N ...")]
Share = Annotated[float | None, arg(metavar="P", help_behavior_hint="")]
Seconds = Annotated[float | None, arg(metavar="SECONDS", help_behavior_hint="")]
File = Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="")]
Folder = Annotated[Path | None, arg(metavar="FOLDER", help_behavior_hint="")]
Flag = Annotated[bool, arg(help_behavior_hint="")]
