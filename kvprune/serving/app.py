"""The application: the API of OpenAI for chats and texts, what a server says of itself, and a page that chats."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from kvprune import __version__
from kvprune.errors import KVPruneError
from kvprune.policy.base import Policy
from kvprune.policy.registry import parse
from kvprune.serving import prompts
from kvprune.serving.engine import Engine
from kvprune.serving.jobs import BusyError, Done, FailedError, Job, Settings
from kvprune.serving.metrics import Metrics
from kvprune.serving.prefixes import Prefixes
from kvprune.serving.prompts import Prompt
from kvprune.serving.requests import ChatRequest, RequestError, TextRequest, policy_of

logger = logging.getLogger("kvprune.serving")
PAGE = Path(__file__).with_name("page.html")


@dataclass(frozen=True)
class Options:
    """How a server is run; see `kvprune serve --help`. Bytes of memory and disk are for prefixes."""

    policy: str = "a2sf:kernel_size=21"
    budget: str = "0.25"
    prefix: int = 0
    parallel: int = 2
    queue: int = 64
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 1024
    memory: int = 2**30
    folder: Path | None = None
    disk: int = 10 * 2**30
    api_key: str | None = None
    body_bytes: int = 16 * 2**20
    batch: int = 8
    batch_tokens: int = 2**15

    def __post_init__(self) -> None:
        """Raises KVPruneError for a key that is empty, which would be none."""
        if self.api_key is not None and not self.api_key.strip():
            raise KVPruneError("the API key is empty: give one, or leave --api-key and KVPRUNE_API_KEY out.")


class Server:
    """A model, its name and what it is served with. Raises KVPruneError for a policy or a folder that cannot be."""

    def __init__(self, name: str, model: Any, tokenizer: Any, options: Options) -> None:
        self.name, self.tokenizer, self.options = name, tokenizer, options
        self.policy: Policy = parse(options.policy, budget=options.budget)
        self.metrics = Metrics()
        prefixes = Prefixes(model, self.metrics, memory=options.memory, folder=options.folder, disk=options.disk)
        self.engine = Engine(
            model, tokenizer, prefixes, self.metrics, parallel=options.parallel, queue=options.queue,
            batch=options.batch, batch_tokens=options.batch_tokens,
        )  # fmt: skip
        self._tokenizing = threading.Lock()
        config = model.config.get_text_config(decoder=True)
        self.window: int | None = getattr(config, "max_position_embeddings", None)
        self.started = int(time.time())

    async def submit(self, request: ChatRequest | TextRequest) -> Job:
        """Let a request wait for its turn. Raises KVPruneError."""
        self.engine.check_room()  # whoever is refused anyway should not cost a tokenizer's time
        # Templates and tokenizers of long prompts take a while, and others are being answered.
        return self.engine.submit(*await asyncio.to_thread(self._prepared, request))

    def _prepared(self, request: ChatRequest | TextRequest) -> tuple[Prompt, Policy, Settings]:
        if request.model != self.name:
            raise RequestError(f"there is no model {request.model!r}: write {self.name!r}.", param="model", status=404)
        policy = policy_of(request, self.policy, self.options.policy, self.options.budget)
        prefix = self.options.prefix if request.prefix is None else request.prefix
        with self._tokenizing:
            if isinstance(request, ChatRequest):
                messages = [message.plain() for message in request.messages]
                if request.prefix is None:  # the server's default is for whoever has more to say
                    prefix = min(prefix, len(messages) - 1)
                prompt = prompts.of_messages(self.tokenizer, messages, prefix)
            else:
                prompt = prompts.of_text(self.tokenizer, request.prompt, request.prefix or 0)
        settings = Settings(
            self._most_tokens(len(prompt), request.most_tokens, policy),
            request.temperature,
            request.top_p,
            request.seed,
            request.stops,
        )
        return prompt, policy, settings

    def _most_tokens(self, prompt: int, asked: int | None, policy: Policy) -> int:
        most = self.options.max_new_tokens
        if asked is not None and asked > most:
            raise RequestError(f"max_tokens is {asked}: this server writes up to {most}.", param="max_tokens")
        if self.options.max_prompt_tokens is not None and prompt > self.options.max_prompt_tokens:
            raise RequestError(
                f"the prompt has {prompt} tokens: this server reads up to {self.options.max_prompt_tokens}.",
                param="prompt",
            )
        # Rows that are numbered anew are seen side by side, however many tokens are written; a prompt is read before.
        if self.window is None or (policy.renumbers and prompt <= self.window):
            return asked or most
        if prompt + (asked or 1) > self.window:
            instead = ', or take a policy with positions="cache"' if prompt <= self.window else ""
            raise RequestError(
                f"a prompt of {prompt} tokens and an answer of up to {asked or 1} are more than the {self.window} that "
                f"this model was made for: shorten them{instead}.",
                param="max_tokens" if asked and prompt < self.window else "prompt",
            )
        return asked or min(most, self.window - prompt)


def application(server: Server) -> FastAPI:
    """The application of a server, to be run by uvicorn or any other ASGI server."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(server.engine.close)

    app = FastAPI(title="kvprune", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    key = server.options.api_key

    async def guard(request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise RequestError("the API key is missing or wrong: send it as Authorization: Bearer KEY.", status=401)

    api = APIRouter(prefix="/v1", dependencies=[Depends(guard)])

    @app.exception_handler(KVPruneError)
    async def wrong(_: Request, error: KVPruneError) -> JSONResponse:
        return refused(error)

    @app.exception_handler(HTTPException)
    async def missing(_: Request, error: HTTPException) -> JSONResponse:
        served = "POST /v1/chat/completions, POST /v1/completions, GET /v1/models"
        return _refusal(f"{error.detail}: there are {served}.", error.status_code)

    @app.get("/", response_class=HTMLResponse)
    async def page() -> str:
        return PAGE.read_text("utf-8")

    @app.get("/health")
    async def health() -> dict[str, Any]:
        return {"status": "ok", "model": server.name}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> str:
        return str(server.metrics)

    @api.get("/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(server)]}

    @api.get("/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != server.name:
            raise RequestError(f"there is no model {name!r}: write {server.name!r}.", param="model", status=404)
        return _model(server)

    @api.post("/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await _answered(server, request, ChatRequest)

    @api.post("/completions")
    async def completions(request: Request) -> Response:
        return await _answered(server, request, TextRequest)

    app.include_router(api)
    return app


def refused(error: KVPruneError) -> JSONResponse:
    """What a mistake is answered with."""
    if isinstance(error, BusyError):
        return _refusal(str(error), 429, headers={"Retry-After": "1"})
    status = error.status if isinstance(error, RequestError) else 400
    return _refusal(str(error), status, param=getattr(error, "param", None))


def _refusal(message: str, status: int, *, param: str | None = None, headers: Any = None) -> JSONResponse:
    kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}.get(
        status, "invalid_request_error" if status < 500 else "server_error"
    )
    body = {"error": {"message": message, "type": kind, "param": param, "code": None}}
    return JSONResponse(body, status, headers=headers)


def _model(server: Server) -> dict[str, Any]:
    return {
        "id": server.name, "object": "model", "created": server.started, "owned_by": "kvprune",
        "policy": str(server.policy), "window": server.window,
    }  # fmt: skip


# -- one request -------------------------------------------------------------------------------------------------------


async def _answered(server: Server, request: Request, kind: type[ChatRequest] | type[TextRequest]) -> Response:
    try:
        asked = kind.read(await _json(request, server.options.body_bytes))
        job = await server.submit(asked)
        shape = _Shape(server, job, chat=kind is ChatRequest)
        pieces = server.engine.pieces(job)
        # Of a stream, the first piece is waited for: until then, a mistake can be answered with its status.
        answer = await _unless_gone(request, anext(pieces) if asked.stream else _whole(pieces))
    except KVPruneError:
        raise
    except FailedError:
        return _refusal("the server failed; its log says where.", 500)
    except Exception as error:
        # The message of an exception may hold what somebody wrote: it says where it happened, and no more.
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("a request failed with %s\n%s", type(error).__name__, where)
        return _refusal("the server failed; its log says where.", 500)
    if answer is None:
        return Response(status_code=499)  # nobody is there to read it
    if asked.stream:
        stream = _stream(shape, answer, pieces, usage=asked.stream_options.include_usage)
        return StreamingResponse(stream, media_type="text/event-stream")
    return JSONResponse(shape.whole(*answer))


async def _unless_gone(request: Request, waiting: Awaitable[Any]) -> Any:
    """What is waited for; None if whoever asked has hung up before."""
    answer, gone = asyncio.ensure_future(waiting), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        return answer.result() if answer.done() else None
    finally:
        gone.cancel()
        answer.cancel()


async def _json(request: Request, most: int) -> Any:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise RequestError(f"the body is longer than {most:,} bytes: send a shorter prompt.", status=413)
    try:
        read = json.loads(body)
        json.dumps(
            read, ensure_ascii=False
        ).encode()  # half a surrogate pair is no text that could be read, or answered
    except (ValueError, RecursionError):
        raise RequestError("the body is no JSON.") from None
    return read


async def _whole(pieces: AsyncIterator[str | Done]) -> tuple[str, Done]:
    text = ""
    async for piece in pieces:
        if isinstance(piece, Done):
            return text, piece
        text += piece
    raise AssertionError("an answer ends with Done")


async def _gone(request: Request) -> None:
    """Returns when whoever asked has hung up."""
    while not await request.is_disconnected():
        await asyncio.sleep(0.1)


async def _stream(
    shape: _Shape, first: str | Done, others: AsyncIterator[str | Done], *, usage: bool
) -> AsyncIterator[str]:
    yield shape.event(shape.piece("", first=True))
    try:
        piece = first
        while not isinstance(piece, Done):
            yield shape.event(shape.piece(piece))
            piece = await anext(others)
    except (KVPruneError, FailedError) as error:
        known = error if isinstance(error, KVPruneError) else RequestError("the server failed.", status=500)
        yield shape.event(json.loads(bytes(refused(known).body)))
        return
    finally:
        shape.engine.call_off(shape.job)
    yield shape.event(shape.piece("", finish=piece.finish_reason))
    if usage:
        yield shape.event(shape.usage_alone(piece))
    yield "data: [DONE]\n\n"


class _Shape:
    """Answers as the API writes them."""

    def __init__(self, server: Server, job: Job, *, chat: bool) -> None:
        self.engine, self.job, self._chat = server.engine, job, chat
        kind = "chat.completion" if chat else "text_completion"
        self._base = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{server.started}-{job.number}", "object": kind,
            "created": int(time.time()), "model": server.name,
        }  # fmt: skip
        self._chunk = self._base | ({"object": "chat.completion.chunk"} if chat else {})

    def whole(self, text: str, done: Done) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": done.finish_reason}
        return self._base | {"choices": [choice], "usage": self._usage(done)}

    def piece(self, text: str, *, first: bool = False, finish: str | None = None) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | ({"content": text} if text or first else {})
        said = {"delta": delta} if self._chat else {"text": text}
        return self._chunk | {"choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]}

    def usage_alone(self, done: Done) -> dict[str, Any]:
        return self._chunk | {"choices": [], "usage": self._usage(done)}

    def _usage(self, done: Done) -> dict[str, Any]:
        policy, prefix = self.job.policy, self.job.prompt.prefix
        held = {
            "policy": str(policy), "kept_tokens": round(done.kept_tokens, 1), "bytes": done.nbytes,
            "full_bytes": done.dense_nbytes,
        }  # fmt: skip
        if prefix and policy.needs_question:
            held["warning"] = "keeps what the last queries look at, and the prefix has no question"
        return {
            "prompt_tokens": done.prompt_tokens,
            "completion_tokens": done.completion_tokens,
            "total_tokens": done.prompt_tokens + done.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": done.cached_tokens},
            "kvprune": held,
        }

    @staticmethod
    def event(data: dict[str, Any]) -> str:
        return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
