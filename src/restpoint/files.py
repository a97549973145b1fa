"""Files that are complete or not there at all."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from restpoint.errors import RestpointError


def write(path: Path, make: Callable[[Path], Any], argument: str = "output") -> None:
    """Have a file made under another name in the same folder, then give it its own.

    Args:
        path: of the file; its folder is made where it is missing.
        make: writes the file to the path that it is given.
        argument: what the caller's user named the file by, for the message.

    Raises:
        RestpointError: it cannot be written.
    """
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        make(temporary)
        readable_as_usual(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise RestpointError(f"{argument}: {path} cannot be written ({error.strerror}); give another path") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)  # still there only where something went wrong


def readable_as_usual(path: Path) -> None:
    """Give a file the permissions that new files of this process have; some libraries make theirs private."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)
