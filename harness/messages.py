"""One call of the Messages API: the request, what it can cost, what can go wrong, and the reply.

The SDK's retries are off; every fault comes out as one Fault that says whether it can pass and may be billed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from harness.brief import system_text
from harness.space import AgentSettings, Price, Settings, Space

if TYPE_CHECKING:
    from anthropic import Anthropic

CREDENTIALS = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")
EXACT_INT = 2**53  # beyond it JSON readers disagree
STOPS = {
    None: "cut",
    "refusal": "refused",
    "max_tokens": "max_tokens",
    "model_context_window_exceeded": "max_tokens",
}


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Change(Strict):
    key: str = Field(max_length=100)
    value: (
        bool
        | Annotated[int, Field(ge=-EXACT_INT, le=EXACT_INT)]
        | float
        | Annotated[str, Field(max_length=200)]
    )


class Reply(Strict):
    """What the model returns: a list of changes, since the API allows only 24 optional properties."""

    changes: list[Change] = Field(min_length=1, max_length=200)
    hypothesis: str = Field(max_length=600)
    family: str = Field(max_length=60)
    expected_effect: float | None
    expected_slope: str | None = Field(max_length=200)
    parent: str | None = Field(max_length=100)


class Usage(BaseModel):
    input_tokens: int = Field(ge=0)
    output_tokens: int = Field(ge=0)
    cache_creation_input_tokens: int | None = Field(None, ge=0)
    cache_read_input_tokens: int | None = Field(None, ge=0)

    def counts(self) -> dict[str, int]:
        """Under the ledger's names."""
        return {
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cache_write_tokens": self.cache_creation_input_tokens or 0,
            "cache_read_tokens": self.cache_read_input_tokens or 0,
        }

    def usd(self, price: Price) -> float:
        """Input read fresh, written to the cache and read from it are disjoint counts with three prices."""
        micro_usd = (
            self.input_tokens * price.input
            + self.output_tokens * price.output
            + (self.cache_creation_input_tokens or 0) * price.cache_write
            + (self.cache_read_input_tokens or 0) * price.cache_read
        )
        return micro_usd / 1e6


class Envelope(BaseModel):
    """The parts of a Message that count; the SDK itself passes on whatever the server sent."""

    type: Literal["message"]
    stop_reason: str | None
    content: list[dict[str, Any]]
    usage: Usage


@dataclass(eq=False)
class Fault(Exception):
    """A reply that holds no valid proposal."""

    kind: str
    detail: str
    settings: Settings | None = None  # what it asked for, where that can be read


@dataclass(eq=False, kw_only=True)
class Outage(Fault):
    """A call that brought no reply. It says nothing about ideas, so it is no rejected proposal."""

    billed: bool  # it may have cost money that no usage tells
    passing: bool  # the same call may succeed later
    wait_seconds: float = 0.0  # the server's wish

    @property
    def credentials(self) -> bool:
        return self.kind in ("http-401", "http-403", "credentials")


def available() -> bool:
    """Whether the environment names an API to ask."""
    return any(map(os.environ.get, (*CREDENTIALS, "ANTHROPIC_BASE_URL")))


def make_client() -> Anthropic:
    """A client on the environment's address and key; a server of one's own needs no key."""
    from anthropic import Anthropic

    return Anthropic() if any(map(os.environ.get, CREDENTIALS)) else Anthropic(api_key="no-key-needed")


def request(space: Space, brief: str) -> dict[str, Any]:
    """Arguments of `messages.create`. No sampling knobs: the API refuses them."""
    from anthropic import transform_schema

    schema = transform_schema(Reply)
    schema["$defs"]["Change"]["properties"]["key"]["enum"] = list(space.params)
    system = {"type": "text", "text": system_text(space), "cache_control": {"type": "ephemeral"}}
    return {
        "model": space.agent.model,
        "max_tokens": space.agent.max_output_tokens,
        "system": [system],
        "messages": [{"role": "user", "content": brief}],
        "output_config": {"format": {"type": "json_schema", "schema": schema}},
    }


def dearest_usd(arguments: dict[str, Any], agent: AgentSettings) -> float:
    """Upper bound of a call's cost: a token holds at least one byte, and the output is capped."""
    num_bytes = len(json.dumps(arguments, ensure_ascii=False).encode())
    price = agent.price
    return (
        num_bytes * max(price.input, price.cache_write, price.cache_read)
        + agent.max_output_tokens * price.output
    ) / 1e6


def send(client: Anthropic, arguments: dict[str, Any]) -> Any:
    """What the server answered with status 200, as plain JSON values. Raises Outage."""
    import anthropic

    try:
        answer = client.messages.create(**arguments)
    except anthropic.APIStatusError as error:
        raise _refusal(error) from None
    except anthropic.APIConnectionError as error:
        import httpx2

        unsent = (
            httpx2.ConnectError,
            httpx2.ConnectTimeout,
            httpx2.PoolTimeout,
            httpx2.ProxyError,
            httpx2.UnsupportedProtocol,
        )
        kind = "timeout" if isinstance(error, anthropic.APITimeoutError) else "connection"
        detail = f"{type(error.__cause__).__name__}: {error.__cause__}"
        raise Outage(kind, detail, billed=not isinstance(error.__cause__, unsent), passing=True) from None
    except anthropic.CredentialsError as error:
        raise Outage("credentials", str(error), billed=False, passing=False) from None
    except (anthropic.AnthropicError, ValueError) as error:  # a body that is not what its header says
        raise Outage("unreadable", f"{type(error).__name__}: {error}", billed=True, passing=True) from None
    return answer.to_dict(mode="json", warnings=False) if hasattr(answer, "to_dict") else answer


def _refusal(error: Any) -> Outage:
    """An error status. Spending limits come as 429 too, but waiting does not mend them."""
    status, code = error.status_code, error.error_code or ""
    at_limit = code.endswith("spend_limit_reached")
    return Outage(
        "spend-limit" if at_limit else f"http-{status}",
        " ".join(filter(None, [error.type, code, error.api_message])),
        billed=status >= 500,
        passing=not at_limit and (status in (408, 429) or status >= 500),
        wait_seconds=_seconds(error.response.headers.get("retry-after")),
    )


def _seconds(header: str | None) -> float:
    try:
        return max(0.0, float(header or 0))
    except ValueError:
        return 0.0


def open_envelope(answer: Any) -> Envelope:
    """Raises Fault when the answer is not a whole Message, so that what it cost is unknown."""
    try:
        return Envelope.model_validate(answer)
    except ValidationError as error:
        raise Fault("not_a_message", _first(error)) from None


def read_reply(envelope: Envelope) -> Reply:
    """Raises Fault for a Message that was cut, refused, empty or of another form."""
    if envelope.stop_reason != "end_turn":
        kind = STOPS.get(envelope.stop_reason, "malformed")
        raise Fault(kind, f"the reply stopped with {envelope.stop_reason!r}")
    texts = [str(block.get("text")) for block in envelope.content if block.get("type") == "text"]
    if not any(texts):
        raise Fault("empty", "the reply holds no text")
    try:
        return Reply.model_validate_json("".join(texts))
    except ValidationError as error:
        raise Fault("malformed", _first(error)) from None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ")
