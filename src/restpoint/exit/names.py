"""Looking up what a registry holds by name."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

from restpoint.errors import RestpointError

_Known = TypeVar("_Known")


def named(argument: str, name: str, known: Mapping[str, _Known]) -> _Known:
    """What the registry holds under this name.

    Raises:
        RestpointError: nothing; it names the argument, what is near and what there is.
    """
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise RestpointError(f"{argument}={name!r} is not known{hint}: choose one of {', '.join(known)}")
