"""Replicas of `kvprune serve` behind one address, on Ray Serve, and every prefix with the replica that has it.

    serve run kvprune.integrations.ray_serve:app model=smollm2 replicas=2 prefix=1

In front of the replicas stands a deployment that reads of a request only where it belongs. What is asked about the same
prefix under the same policy goes to the same replica, which has read it; so does what has the same `prompt_cache_key`.
Anything else is spread over the replicas.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, MutableMapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, create_model
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from kvprune.evaluation.models import load
from kvprune.policy.registry import parse
from kvprune.serving.app import Options, Server, application
from kvprune.serving.metrics import Metrics
from kvprune.serving.sessions import session_of

Message = MutableMapping[str, Any]


class Replica:
    """The application of `kvprune serve`, called by other means than a port."""

    def __init__(self, model: str, name: str | None, options: Options, settings: Mapping[str, Any]) -> None:
        loaded = load(model, **settings)
        self._server = Server(name or loaded.name, loaded.model, loaded.tokenizer, options)
        self._application = application(self._server)

    async def answer(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """What the application sends, piece by piece. Who stops listening has hung up."""
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        gone, was_read = asyncio.Event(), False

        async def receive() -> Message:
            nonlocal was_read
            if not was_read:
                was_read = True
                return {"type": "http.request", "body": body, "more_body": False}
            await gone.wait()
            return {"type": "http.disconnect"}

        async def run() -> None:
            try:
                await self._application(scope, receive, sent.put)
            finally:
                sent.put_nowait(None)

        running = asyncio.create_task(run())
        try:
            while (message := await sent.get()) is not None:
                yield message
            await running  # raises what went wrong
        finally:
            gone.set()
            if not running.done():  # it sees for itself that nobody listens, and frees what it holds
                await asyncio.shield(asyncio.wait({running}, timeout=30))

    def counts(self) -> dict[tuple[str, str], float]:
        """The metrics of this replica."""
        return self._server.metrics.values()

    def __del__(self) -> None:
        server = getattr(self, "_server", None)
        if server is not None:
            server.engine.close()


class Front:
    """Hands requests to replicas, and their answers back."""

    def __init__(self, replicas: DeploymentHandle, prefix: int, body_bytes: int) -> None:
        self._replicas, self._prefix, self._most = replicas, prefix, body_bytes

    async def __call__(self, request: Request) -> Response:
        if request.url.path == "/metrics":
            return PlainTextResponse(
                str(Metrics.added_up(await self._replicas.broadcast("counts").results_async(timeout_s=60)))
            )
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > self._most:
                break  # the replica says that it is too long
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": request.url.scheme,
            "method": request.method, "path": request.url.path, "raw_path": request.url.path.encode(),
            "query_string": request.url.query.encode(), "root_path": "", "headers": list(request.headers.raw),
            "client": None, "server": None,
        }  # fmt: skip
        session = await asyncio.to_thread(session_of, request.url.path, bytes(body), self._prefix)
        chosen = self._replicas.options(stream=True, **({"session_id": session} if session else {}))
        messages = chosen.answer.remote(scope, bytes(body))
        try:
            start = await anext(messages)
        except asyncio.CancelledError:  # whoever asked has hung up
            messages.cancel()
            raise

        async def content() -> AsyncIterator[bytes]:
            try:
                async for message in messages:
                    yield message.get("body", b"")
            finally:
                messages.cancel()  # which changes nothing where all of it has come

        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in start.get("headers", [])}
        return StreamingResponse(content(), start["status"], headers)


def deployment(
    model: str,
    options: Options,
    *,
    replicas: int = 2,
    name: str | None = None,
    cpus: float = 1,
    gpus: float = 0,
    **settings: Any,
) -> serve.Application:
    """Replicas of `kvprune serve` as an application of Ray Serve, for `serve.run`.

    Args:
        model, settings: as of `kvprune.evaluation.models.load`: a folder or a name, dtype, device_map.
        options: of each replica. Its folder may be shared by all of them.
        replicas: how many.
        name: of the model in requests.
        cpus, gpus: that each replica takes of the cluster. A GPU that is not asked for is not seen.

    Raises KVPruneError for a policy that cannot be.
    """
    parse(options.policy, budget=options.budget)  # here, rather than in every replica once its model is there
    room = options.parallel * options.batch + options.queue
    served = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=room + 16,  # the replica itself refuses those it has no room for, with what to do
        request_router_config=RequestRouterConfig(request_router_class=ConsistentHashRouter),
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    )(Replica)
    front = serve.deployment(max_ongoing_requests=replicas * (room + 16), ray_actor_options={"num_cpus": 0})(Front)
    return front.bind(served.bind(model, name, options, settings), options.prefix, options.body_bytes)


def app(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` and config files of Ray Serve build: `deployment` by its arguments and the fields of `Options`.

    Raises pydantic.ValidationError for one that there is not, and for a value that is none.
    """
    known = get_type_hints(Options)
    options: dict[str, Any] = {each.name: (known[each.name], each.default) for each in fields(Options)}
    read = create_model(
        "Arguments", __config__=ConfigDict(extra="forbid"), model=(str, ...), name=(str | None, None),
        replicas=(int, 2), cpus=(float, 1), gpus=(float, 0), dtype=(str, "auto"), device_map=(str | None, None),
        **options,
    ).model_validate(arguments).model_dump()  # fmt: skip
    return deployment(
        read["model"], Options(**{name: read[name] for name in options}), replicas=read["replicas"], name=read["name"],
        cpus=read["cpus"], gpus=read["gpus"], dtype=read["dtype"], device_map=read["device_map"],
    )  # fmt: skip
