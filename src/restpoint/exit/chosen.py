"""Which exits a decoder uses, whether the model can be decoded with them, and what is said of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from restpoint.errors import RestpointError
from restpoint.exit.policy import ExitPolicy
from restpoint.model.check import Capabilities
from restpoint.model.layered import LayeredModel


def chosen_policy(asked: bool | ExitPolicy, held: ExitPolicy | None) -> ExitPolicy | None:
    """The exits that are asked for: those that a profile holds (True), these, or none (False).

    Raises:
        RestpointError: the profile holds none.
    """
    if asked is False:
        return None
    policy = asked if isinstance(asked, ExitPolicy) else held
    if policy is None:
        raise RestpointError(
            "exits: the profile has none; calibrate some with: restpoint calibrate MODEL --profile FOLDER"
        )
    return policy


def require_exits(policy: ExitPolicy, layered: LayeredModel, capabilities: Capabilities) -> None:
    """Refuse a model that cannot be decoded with these exits.

    Raises:
        RestpointError: it cannot do what the rule needs, or rule or certificate do not fit it.
    """
    for name in policy.rule.needed:
        found = getattr(capabilities, name)
        if not found.supported:
            raise RestpointError(f"exits: this model cannot exit early ({name}: {found.reason}); decode it plainly")
    policy.target(layered)


def refuse_drafters(drafters: Sequence[str] | None, brought: Mapping[str, Any] | None, argument: str = "exits") -> None:
    """Nobody drafts where tokens exit early.

    Raises:
        RestpointError: somebody is asked to.
    """
    if drafters or brought:
        raise RestpointError(f"{argument}: early exits and drafters exclude each other; give one of them")


def promised(policy: ExitPolicy) -> str:
    """What is promised of exits, in words."""
    if policy.certificate is None:
        return "early exits without a certificate: nothing is promised of the text"
    return f"early exits: {policy.certificate.promise}; greedy decoding only"
