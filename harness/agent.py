"""The LLM as a proposer: one structured proposal a call, from a bounded brief, under a hard ceiling of money.

ANTHROPIC_API_KEY=... harness search search_spaces/moue.toml --proposers optuna=0.7,agent=0.3 --usd 5

A thread of its own makes one call at a time and keeps a short queue, so that no trial waits for the API.
Each call is on the disk before it is made (what it may cost) and after (what it did cost, and all that was
said). A call that brings nothing is followed by a pause; there are no retries beside that.
"""

from __future__ import annotations

import json
import queue
import random
import threading
import time
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from harness import messages
from harness.brief import brief_text
from harness.errors import UserError
from harness.ledger import Event, Ledger, write_atomic
from harness.messages import Fault, Outage, Reply, Usage, available
from harness.propose import Proposal, Proposer
from harness.space import Setting, Settings, Space
from harness.view import StudyView

if TYPE_CHECKING:
    from anthropic import Anthropic

__all__ = ["AgentProposer", "Exhausted", "Pace", "available"]

POLL_SECONDS = 0.05
CLOSE_SECONDS = 1.0
DETAIL_CHARS = 300
MADE = 4  # own last proposals that a brief repeats: they may not be in the ledger yet


class Exhausted(StrEnum):
    """Why the proposer will not call again."""

    BUDGET = "budget"
    CREDENTIALS = "credentials"
    ERROR = "error"  # a fault of its own; the ledger tells which


@dataclass(frozen=True)
class Pace:
    """Pauses after calls that brought no proposal."""

    retry_seconds: float = 1.0  # doubles with each failure in a row, with jitter
    retry_cap_seconds: float = 60.0  # caps the server's wish as well
    latch_seconds: float = 30.0  # after the last attempt, or a fault that cannot pass; doubles too
    latch_cap_seconds: float = 600.0

    def pause_seconds(self, fault: Fault, failures: int, attempts: int) -> float:
        """How long to wait after `failures` failures in a row, `attempts` of which are retried quickly."""
        passing = not isinstance(fault, Outage) or fault.passing
        if passing and failures < attempts:
            backoff = self.retry_seconds * 2 ** min(failures - 1, 30) * random.uniform(0.5, 1)
            wish = fault.wait_seconds if isinstance(fault, Outage) else 0.0
            return min(max(backoff, wish), self.retry_cap_seconds)
        doublings = failures - (attempts if passing else 1)
        return min(self.latch_seconds * 2 ** min(doublings, 30), self.latch_cap_seconds)


class AgentProposer(Proposer):
    """Asks a model for proposals. `exhausted` says why it has stopped, if it has.

    It reads the ledger by itself: nothing of the driver's is shared with its thread but the queue.
    """

    def __init__(
        self,
        space: Space,
        ledger: Ledger,
        budget_usd: float,
        arm: str = "agent",
        client: Anthropic | None = None,
        pace: Pace | None = None,
        queue_length: int = 2,
    ):
        self.arm = arm
        self.exhausted: Exhausted | None = None
        self._space, self._budget_usd, self._pace = space, budget_usd, pace or Pace()
        self._ledger = Ledger(ledger.path)
        self._view = StudyView()
        self._client = client
        self._ready: queue.Queue[Proposal] = queue.Queue(queue_length)
        self._made: deque[Settings] = deque(maxlen=MADE)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def ask(self, view: StudyView, index: int) -> Proposal | None:
        """A proposal that is ready, or None at once. The first call starts the thread."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.arm, daemon=True)
            self._thread.start()
        try:
            return self._ready.get_nowait()
        except queue.Empty:
            return None

    def close(self) -> None:
        """Ends the thread. A call that is out is abandoned, and its reservation stands."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    # ---- everything below runs in the thread ----

    def _run(self) -> None:
        try:
            self._loop()
        except Exception as error:  # the night goes on without this arm
            self.exhausted = Exhausted.ERROR
            detail = f"{type(error).__name__}: {error}"[:DETAIL_CHARS]
            self._ledger.append({"event": "rejected", "arm": self.arm, "kind": "error", "detail": detail})

    def _loop(self) -> None:
        client = (self._client or messages.make_client()).with_options(
            max_retries=0, timeout=self._space.agent.timeout_seconds
        )
        failures = 0
        while not self._stop.is_set() and self.exhausted is None:
            for event in self._ledger.poll():
                self._view.apply(event)
            if self._ready.full() or not self._view.incumbents:
                self._stop.wait(POLL_SECONDS)
                continue
            try:
                self._call(client)
                failures = 0
            except Fault as fault:
                failures += 1
                if isinstance(fault, Outage) and fault.credentials:
                    self.exhausted = Exhausted.CREDENTIALS
                    return
                self._stop.wait(self._pace.pause_seconds(fault, failures, self._space.agent.attempts))

    def _call(self, client: Anthropic) -> None:
        """One reserved, recorded and settled call; queues its proposal. Raises Fault when it brought none."""
        arguments = messages.request(self._space, brief_text(self._view, self.arm, self._made))
        reserved = self._reserve(arguments)
        if reserved is None:
            self.exhausted = Exhausted.BUDGET
            return
        started = time.monotonic()
        answer = usage = proposal = fault = None
        try:
            answer = messages.send(client, arguments)
            envelope = messages.open_envelope(answer)
            usage = envelope.usage
            proposal = self._proposal(messages.read_reply(envelope), reserved["call"])
        except Fault as caught:
            caught.detail = self._without_key(client, caught.detail)[:DETAIL_CHARS]
            fault = caught
        if self._stop.is_set():
            return
        settled = self._settled(reserved, usage, fault, time.monotonic() - started)
        record = json.dumps({**settled, "request": arguments, "answer": answer}, indent=1)
        path = self._ledger.path.parent / "calls" / f"{reserved['call']}.json"
        write_atomic(path, self._without_key(client, record))
        if fault is None:
            self._ledger.append(settled)
            self._made.append(proposal.overrides)
            self._ready.put(proposal)
            return
        rejected = {"event": "rejected", "arm": self.arm, "kind": fault.kind, "detail": fault.detail}
        rejected |= {"settings": fault.settings, "call": reserved["call"]}
        self._ledger.append(settled, *([] if isinstance(fault, Outage) else [rejected]))
        raise fault

    def _reserve(self, arguments: dict[str, Any]) -> Event | None:
        """Writes down what the call may cost at most, or returns None when that would pass the ceiling."""
        usd = messages.dearest_usd(arguments, self._space.agent)
        if self._view.spent_usd() + usd > self._budget_usd:
            return None
        number = len({e["call"] for e in self._view.spends if e["arm"] == self.arm}) + 1
        event = {"event": "spend", "call": f"{self.arm}-{number:05d}", "arm": self.arm}
        event |= {"phase": "reserved", "usd": usd, "model": self._space.agent.model}
        self._ledger.append(event)
        return event

    def _settled(self, reserved: Event, usage: Usage | None, fault: Fault | None, seconds: float) -> Event:
        """The call's true cost. Without a usage to go by, what may have been billed counts as spent."""
        if usage is not None:
            usd = usage.usd(self._space.agent.price)
        else:
            usd = 0.0 if isinstance(fault, Outage) and not fault.billed else reserved["usd"]
        return {
            **reserved,
            **(usage.counts() if usage else {}),
            "phase": "settled",
            "usd": usd,
            "outcome": fault.kind if fault else "ok",
            "detail": fault.detail if fault else "",
            "seconds": round(seconds, 3),
        }

    def _proposal(self, reply: Reply, call: str) -> Proposal:
        """The reply as a proposal of this space. Raises Fault for settings that it does not allow."""
        overrides = {change.key: self._as_declared(change.key, change.value) for change in reply.changes}
        if len(overrides) < len(reply.changes):
            raise Fault("malformed", "a key is changed twice", overrides)
        try:
            self._space.complete(overrides)
        except UserError as error:
            known = overrides.keys() <= self._space.params.keys()
            raise Fault("out_of_range" if known else "unknown_key", str(error), overrides) from None
        return Proposal(
            arm=self.arm,
            overrides=overrides,
            parent=reply.parent if reply.parent in self._view.candidates else None,
            hypothesis=reply.hypothesis,
            family=reply.family,
            expected_effect=reply.expected_effect,
            expected_slope=reply.expected_slope,
            call=call,
        )

    def _as_declared(self, key: str, value: Setting) -> Setting:
        """The choice that a number means: JSON does not tell 1 from 1.0, a categorical does."""
        param = self._space.params.get(key)
        choices = (param and param.choices) or []
        same = (c for c in choices if c == value and isinstance(c, bool) == isinstance(value, bool))
        return next(same, value)

    def _without_key(self, client: Anthropic, text: str) -> str:
        """A server may echo the key it was given; it is never written down."""
        for secret in filter(None, (client.api_key, client.auth_token)):
            text = text.replace(secret, "[key]")
        return text
