"""What the body of a request may say. Everything else is refused, with what to write instead."""

from __future__ import annotations

import difflib
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kvprune.errors import KVPruneError, PolicyError
from kvprune.policy.base import Policy
from kvprune.policy.registry import find, parse, takes_budget

_NO_EFFECT = frozenset(
    "user metadata store service_tier safety_identifier prompt_cache_key parallel_tool_calls".split()
)
"""Fields of the API that say nothing of the answer."""


class RequestError(KVPruneError):
    """A body that cannot be answered, or an address that is not there. param: which field is wrong."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")
    only: ClassVar[dict[str, Any]] = {
        "n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0,
        "logit_bias": {}, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "echo": False,
        "suffix": "",
    }  # fmt: skip
    """Fields that may be there, with the one value that is served."""

    @classmethod
    def read(cls, body: Any) -> Any:
        """A checked request from JSON. Raises RequestError."""
        if not isinstance(body, dict):
            raise RequestError("the body is a JSON object, such as {...}.")
        given = {name: value for name, value in body.items() if value is not None and name not in _NO_EFFECT}
        for name, served in cls.only.items():
            if (value := given.pop(name, served)) != served and value:
                raise RequestError(f"{name} is not served here: leave it out.", param=name)
        unknown = given.keys() - cls.model_fields.keys()
        for name in sorted(unknown):
            close = difflib.get_close_matches(name, cls.model_fields, n=1)
            hint = f": did you mean {close[0]!r}?" if close else ": leave it out."
            raise RequestError(f"there is no field {name!r}{hint}", param=name)
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise RequestError(f"{where}: {first['msg']}.", param=where) from None


class StreamOptions(BaseModel):
    """include_usage: a last piece with no text and the usage."""

    include_usage: bool = False


class _Request(_Fields):
    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    max_tokens: int | None = Field(None, ge=1)
    stop: str | list[str] = Field([], max_length=256)
    # Beyond the API of OpenAI:
    policy: str | None = Field(None, max_length=1000)
    budget: float | int | str | None = None
    prefix: int | None = Field(None, ge=0)

    @property
    def most_tokens(self) -> int | None:
        """Of the answer, if the request says."""
        return self.max_tokens

    @property
    def stops(self) -> tuple[str, ...]:
        """Strings that end the answer. Raises RequestError."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if len(stops) > 16 or not all(0 < len(each) <= 256 for each in stops):
            raise RequestError("stop: up to 16 strings of 1 to 256 characters.", param="stop")
        return stops


class TextPart(BaseModel):
    """A part of a message; images and sounds are none that is read here."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(_Request):
    """The body of /v1/chat/completions. prefix: how many messages are read and compressed by themselves."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def most_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class TextRequest(_Request):
    """The body of /v1/completions. prefix: how many characters of the prompt are read and compressed by themselves."""

    prompt: str


def policy_of(request: _Request, default: Policy, default_text: str, default_budget: str) -> Policy:
    """The policy that a request asks for. Raises RequestError.

    Registered ones alone, and no settings that name files: text that comes from elsewhere must not import modules, as
    `package.module:Class` would, nor tell what files there are.
    """
    if request.policy is None and request.budget is None:
        return default
    text = default_text if request.policy is None else request.policy
    budget = default_budget if request.budget is None else str(request.budget)
    try:
        if request.policy is not None:
            for link in text.split("|"):
                name, _, rest = link.partition(":")
                if named := find(name).files & {each.partition("=")[0].strip() for each in rest.split(",")}:
                    raise PolicyError(f"{min(named)} names a file of the server: leave it out.")
        policy = parse(text, budget=budget)
    except PolicyError as error:
        raise RequestError(str(error), param="policy") from None
    except KVPruneError as error:
        raise RequestError(str(error), param="budget") from None
    if request.budget is not None and not takes_budget(text):
        raise RequestError(f"{policy} takes no other budget: leave it out, or out of the policy.", param="budget")
    return policy
