"""Two sources of drafts that take turns: the text's own repetitions, and the rest-point predictor."""

from restpoint.decode.draft import Draft, Drafter, TokenPath
from restpoint.decode.drafters.exit import ExitDrafter
from restpoint.decode.drafters.lookup import LookupDrafter


class TakingTurns(Drafter):
    """Each round is drafted by whichever source promises more tokens above the going rate.

    The choice rests on the length of the match in the text and on acceptances seen so far, on nothing of the round to
    come; so each source's law stays its own, and verification stays exact.

    Args:
        lookup: copies from the text.
        predictor: drafts by a predictor. The two controllers share one pace.
    """

    def __init__(self, lookup: LookupDrafter, predictor: ExitDrafter):
        self.lookup = lookup
        self.predictor = predictor
        self._drafted_by: Drafter = predictor

    def propose(self, path: TokenPath, room: int) -> Draft:
        """See :meth:`Drafter.propose`."""
        _, confidences = self.lookup.prospect(path, room)
        copied = self.lookup.controller.gain(confidences, room)
        copies = copied > max(0.0, self.predictor.controller.usual_gain)
        self._drafted_by = self.lookup if copies else self.predictor
        return self._drafted_by.propose(path, room)

    def observe(self, draft: Draft, accepted: int) -> None:
        """See :meth:`Drafter.observe`; only the source that drafted learns."""
        self._drafted_by.observe(draft, accepted)
