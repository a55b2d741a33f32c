"""Asks the arms in turn for something new, and knows when nothing will come any more."""

from __future__ import annotations

import logging
from collections.abc import Callable

from harness.admission import Admission, Refusal
from harness.propose import Proposal, Proposer, arms_by_need, next_listed
from harness.records import LISTED_ARM, PLACEBO_ARM
from harness.view import StudyView

log = logging.getLogger("harness")

MAX_DUPLICATES_IN_A_ROW = 60  # nobody finds anything new: the space is exhausted
MAX_REFUSALS_IN_A_ROW = 2000  # the rules leave next to nothing
ASKS_A_CALL = 8  # proposals tried before the dispatcher may look after its workers again


class Asking:
    """The arms of one session with their shares, once the listed designs are handed in."""

    def __init__(
        self, view: StudyView, admission: Admission, proposers: list[Proposer], shares: dict[str, float]
    ):
        self.proposers = {p.arm: p for p in proposers}
        self._view, self._admission, self._shares = view, admission, shares
        self._duplicates = self._refusals = 0  # in a row

    def new_candidate(self, write: Callable[[dict], None]) -> str | None:
        """Id of a candidate that was just admitted, or None; `write` puts the records into the ledger."""
        for _ in range(ASKS_A_CALL):
            proposal = None if self.nothing_left() else self._ask()
            if proposal is None:
                return None
            if candidate := self._admit(proposal, write):
                return candidate
        return None

    def nothing_left(self) -> tuple[str, str] | None:
        """Why no proposal will come any more: (reason, detail), or None."""
        if self._view.asked[LISTED_ARM] < len(self._view.space.candidates):
            return None
        if not self._shares:
            return "exhausted", "every listed candidate was proposed, and there are no [params]"
        if self._duplicates >= MAX_DUPLICATES_IN_A_ROW:
            return "space-exhausted", f"{self._duplicates} proposals in a row were nothing new"
        if self._refusals >= MAX_REFUSALS_IN_A_ROW:
            return "rules-too-tight", f"the rules refused {self._refusals} proposals in a row"
        ended = [p.exhausted for arm, p in self.proposers.items() if arm != PLACEBO_ARM]
        if ended and all(ended):
            return "proposers-exhausted", "; ".join(map(str, ended))
        return None

    def _ask(self) -> Proposal | None:
        """A listed design, else from the arm furthest behind its share; a placebo only where it is due."""
        if listed := next_listed(self._view):
            return listed
        for place, arm in enumerate(arms_by_need(self._view, self._shares)):
            if arm == PLACEBO_ARM and place > 0:
                continue
            if proposal := self.proposers[arm].ask(self._view, self._view.asked[arm]):
                return proposal
        return None

    def _admit(self, proposal: Proposal, write: Callable[[dict], None]) -> str | None:
        """Makes a candidate of the proposal, or records with its kind why not."""
        try:
            event = self._admission.candidate(self._view, proposal)
        except Refusal as refusal:
            rejected = {"event": "rejected", "arm": proposal.arm, "kind": refusal.kind}
            rejected |= {"detail": str(refusal), "overrides": proposal.overrides, "call": proposal.call}
            rejected |= {"name": proposal.name} if proposal.name else {}
            write(rejected)
            if proposer := self.proposers.get(proposal.arm):
                proposer.refuse(rejected)
            self._refusals += 1
            self._duplicates = self._duplicates + 1 if refusal.kind == "duplicate" else 0
            log.info("proposal refused arm=%s kind=%s %s", proposal.arm, refusal.kind, refusal)
            return None
        write(event)
        if not proposal.placebo:
            self._duplicates = self._refusals = 0
        return event["candidate"]
