"""The verifiers by name."""

import difflib

from restpoint.decode.verifiers.base import Verifier
from restpoint.decode.verifiers.block import Block
from restpoint.decode.verifiers.nodewise import NodeWise
from restpoint.decode.verifiers.traversal import Traversal
from restpoint.errors import RestpointError
from restpoint.transport.couplings import KSeq, MaximalCoupling, RecursiveRejection
from restpoint.transport.optimal import OptimalTransport

VERIFIERS: dict[str, Verifier] = {
    known.name: known
    for known in (
        NodeWise("token-wise", MaximalCoupling()),
        Block(),
        NodeWise("k-seq", KSeq()),
        NodeWise("recursive", RecursiveRejection("without replacement")),
        NodeWise("recursive-iid", RecursiveRejection("independent")),
        NodeWise("optimal", OptimalTransport("without replacement")),
        NodeWise("optimal-iid", OptimalTransport("independent")),
        Traversal(),
    )
}
"""Every lossless verifier for sampling, by the name that settings and the command line use."""


def verifier(name: str) -> Verifier:
    """The verifier with this name.

    Raises:
        RestpointError: there is none.
    """
    if name in VERIFIERS:
        return VERIFIERS[name]
    near = difflib.get_close_matches(name, VERIFIERS, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise RestpointError(f"verifier={name!r} is not known{hint}: choose one of {', '.join(VERIFIERS)}")
