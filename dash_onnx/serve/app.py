"""The server's HTTP side: routes, errors in OpenAI's form, keys, limits, streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hmac
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from dash_onnx.core.arrays import Ids
from dash_onnx.core.conversation import begun_answer
from dash_onnx.core.errors import DashError, PolicyError
from dash_onnx.core.plans import preset_plans
from dash_onnx.runtime.machine import release_memory
from dash_onnx.runtime.options import GenerationOptions
from dash_onnx.runtime.requests import checked_ids
from dash_onnx.serve.answer import Answer, Choice
from dash_onnx.serve.errors import APIError, outcome_of, refusing
from dash_onnx.serve.events import EventStream
from dash_onnx.serve.limits import Limits, is_trusted
from dash_onnx.serve.page import page
from dash_onnx.serve.pool import Source
from dash_onnx.serve.responses import ResponsesRequest
from dash_onnx.serve.schema import ChatRequest, CompletionRequest, GenerationRequest
from dash_onnx.serve.service import Job, Service, Tally, check_words
from dash_onnx.serve.tools import Support, decoded, support_of, with_tools

_LOG = logging.getLogger(__name__)
_FACTS = ("request", "method", "path", "status", "outcome", "seconds")  # of a log line
_LONG_BYTES = 256 << 10  # of a request whose text takes much memory while it is tokenized
_Body = TypeVar("_Body", bound=GenerationRequest)
_CODES = {404: "not_found", 405: "method_not_allowed"}


def create_app(
    bundles: Mapping[str, Source],
    limits: Limits | None = None,
    *,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    only_here: bool = False,
) -> Starlette:
    """The ASGI app.

    Args:
        bundles: bundles by the name used in requests.
        limits: limits on load and requests.
        key: key that clients must send as `Authorization: Bearer KEY`; None requires none.
        origins: origins of web pages that may call the server.
        only_here: refuse requests to any host name but localhost, so that a web page whose name
            resolves to this machine (DNS rebinding) is not taken for a local one.
    """
    service = Service(bundles, limits or Limits())
    server = _Server(service, key, only_here)
    routes = [
        Route("/", server.page),
        Route("/health", server.health),
        Route("/ready", server.ready),
        Route("/metrics", server.metrics),
        Route("/v1/models", server.list_models),
        Route("/v1/models/{name:path}", server.show_model),
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.complete, methods=["POST"]),
        Route("/v1/responses", server.respond, methods=["POST"]),
    ]
    middleware = [Middleware(_Requests, service=service)]
    if origins:
        cors = Middleware(
            CORSMiddleware, allow_origins=[*origins], allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, cors)

    async def api_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return error.response()

    async def http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, told = _CODES.get(error.status_code, "invalid_request"), error.detail
        if error.status_code == 404:
            told = "no such path: base_url ends with /v1, docs/guide/serve.md lists what is served"
        return APIError(error.status_code, told, code, error.headers).response()

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        service.draining = True
        await asyncio.to_thread(service.pool.close)

    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={APIError: api_error, HTTPException: http_error},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


class _Requests:
    """Gives each request an id, in its answer and in the log, and counts its outcome."""

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name, started, status = uuid.uuid4().hex[:16], time.monotonic(), 0
        state = scope.setdefault("state", {})
        state["name"] = name

        async def named(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", name.encode()))
            await send(message)

        self._service.requests += 1
        try:
            await self._app(scope, receive, named)
        except ClientDisconnect:
            state["outcome"] = "closed"
        except Exception:
            _LOG.exception("%s failed", name, extra={"facts": {"request": name}})
            state["outcome"] = "error"
            if not status:
                await APIError.defect(name).response()(scope, receive, named)
        finally:
            self._service.requests -= 1
            outcome = state.get("outcome") or outcome_of(status)
            if scope["method"] == "POST":
                self._service.metrics.requests.labels(outcome).inc()
            seconds = time.monotonic() - started
            path = ascii(scope["path"])[1:-1][:200]
            told = name, scope["method"], path, status, outcome, round(seconds, 3)
            facts = dict(zip(_FACTS, told, strict=True))
            _LOG.info("%s %s %s %d %s %.3f s", *told, extra={"facts": facts})


class _Server:
    """The handlers of the routes."""

    def __init__(self, service: Service, key: str | None, only_here: bool):
        self.service, self._key, self._only_here = service, key, only_here
        self._encoding_long = asyncio.Lock()

    async def page(self, _: Request) -> Response:
        html, headers = page()
        return HTMLResponse(html, headers=headers)

    async def health(self, _: Request) -> Response:
        alive = self.service.pool.alive
        return JSONResponse({"status": "ok" if alive else "failed"}, 200 if alive else 503)

    async def ready(self, _: Request) -> Response:
        ready = not self.service.draining and self.service.pool.alive
        return JSONResponse({"ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        self._check_caller(request)
        content = generate_latest(self.service.metrics.registry)
        return Response(content, media_type=CONTENT_TYPE_LATEST)

    async def list_models(self, request: Request) -> Response:
        self._check_caller(request)
        return JSONResponse(
            {"object": "list", "data": [*map(self._model, self.service.pool.sources)]}
        )

    async def show_model(self, request: Request) -> Response:
        self._check_caller(request)
        return JSONResponse(self._model(self._named(request.path_params["name"])))

    def _model(self, name: str) -> dict[str, Any]:
        source = self.service.pool.sources[name]
        manifest, policy = source.manifest, source.policy
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "dash-onnx",
            "dash": {
                "actions": manifest.actions,
                "layers": manifest.model.num_layers,
                "max_length": manifest.model.max_length,
                "presets": {name: p.budget for name, p in preset_plans(manifest).items()},
                "policy": policy.name,
                "budget": policy.budget,
                "scorer": manifest.scorer is not None,
            },
        }

    async def chat(self, request: Request) -> Response:
        return await self._chat(request, await self._body(request, ChatRequest))

    async def respond(self, request: Request) -> Response:
        return await self._chat(request, await self._body(request, ResponsesRequest))

    async def _chat(self, request: Request, body: ChatRequest) -> Response:
        name = self._named(body.model)
        with refusing():
            text = await self.service.pool.text(name)
            tools = body.offered
            options = await asyncio.to_thread(
                lambda: body.with_call(body.options(self.service.limits.max_tokens), text)
            )
            asked = decoded(body.prompt())
            variables = options.template_variables

            def encode() -> Ids:
                check_words(text, [*asked, *tools, variables])
                support = support_of(text.chat_template, tuple(text.special.items()))
                try:
                    return encode_with(support)
                except PolicyError:  # gpt-oss's template refuses a tool without a description
                    if not support.tools:
                        raise
                    return encode_with(Support(tools=False, calls=False))

            def encode_with(support: Support) -> Ids:
                messages = with_tools(asked, tools, text.chat_template, support)
                described = tools if support.tools else ()
                return text.encode_chat(messages, tools=described, variables=variables)

            prompt = await self._encoded(request, encode)
        most = None if body.parallel_tool_calls else 1
        tagged = options.grammar is not None
        choices = [Choice(text, tools, most, tagged=tagged) for _ in range(body.n)]
        answer = body.answer(name, choices)
        raw = begun_answer(asked) != ""
        return await self._answer(request, [prompt], options, body, answer, raw=raw)

    async def complete(self, request: Request) -> Response:
        body = await self._body(request, CompletionRequest)
        name = self._named(body.model)
        with refusing():
            text = await self.service.pool.text(name)
            options = await asyncio.to_thread(body.options, self.service.limits.max_tokens)
            prompts = []
            for number, one in enumerate(body.prompt):
                prompts.append(await self._encoded(request, functools.partial(text.encode, one)))
                try:
                    checked_ids(prompts[-1], self.service.pool.sources[name].manifest.model)
                except DashError as error:
                    told = f"prompt {number}: {error}" if len(body.prompt) > 1 else str(error)
                    raise type(error)(told) from None
        answer = body.answer(name, [Choice(text, []) for _ in range(body.n * len(prompts))])
        return await self._answer(request, prompts, options, body, answer, raw=True)

    async def _encoded(self, request: Request, encode: Callable[[], Ids]) -> Ids:
        """The prompt; of long ones, one at a time, because each may take hundreds of MB."""
        if request.state.bytes < _LONG_BYTES:
            return await asyncio.to_thread(encode)
        async with self._encoding_long:
            try:
                return await asyncio.to_thread(encode)
            finally:
                await asyncio.to_thread(release_memory)

    async def _body(self, request: Request, kind: type[_Body]) -> _Body:
        self._check_caller(request)
        if self.service.draining:
            raise APIError(503, "the server is shutting down", "shutting_down")
        # Web pages may send other content types across origins without the server's consent.
        sent = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if sent != "application/json":
            told = "send the body with the header Content-Type: application/json"
            raise APIError(415, told, "unsupported_media_type")
        limits, content = self.service.limits, bytearray()
        try:
            async with asyncio.timeout(limits.seconds):
                async for piece in request.stream():
                    content += piece
                    if len(content) > limits.body_bytes:
                        told = f"a request may have at most {limits.body_bytes} bytes"
                        raise APIError(413, told, "too_large")
        except ClientDisconnect:
            raise APIError.gone() from None
        except TimeoutError:
            raise APIError(
                408, f"the request body did not arrive within {limits.seconds:g} s", "timeout"
            ) from None
        try:
            request.state.bytes = len(content)
            body = json.loads(content.decode(), parse_float=_finite, parse_constant=_finite)
            if b"\\u" in content:  # half a surrogate pair, which no answer could repeat
                json.dumps(body, ensure_ascii=False).encode()
            return kind.model_validate(body)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            told = first["msg"].removeprefix("Value error, ")
            message = f"{place}: {told}"[:500] if place else "the body must be a JSON object"
            raise APIError(400, message, "invalid_value", param=place or None) from None
        except (ValueError, RecursionError):
            told = "the body is not JSON, or has a number or text that cannot be stored"
            raise APIError(400, told, "invalid_json") from None

    async def _answer(
        self,
        request: Request,
        prompts: list[Ids],
        options: GenerationOptions,
        body: GenerationRequest,
        answer: Answer,
        *,
        raw: bool,
    ) -> Response:
        name = self._named(body.model)
        now = time.monotonic()
        # The first choice of a prompt runs it; the others reuse its K/V.
        tallies = [
            Tally(before=None if number % body.n else now)
            for number in range(body.n * len(prompts))
        ]
        job = Job(name, prompts, options, tallies, raw=raw)
        chunks = self.service.generate(job, _left(request))
        with refusing():  # a refusal before the first token has its own HTTP status
            if body.stream:
                first = await anext(chunks)
                return EventStream(request.state, job, chunks, first, answer)
            async with contextlib.aclosing(chunks):
                async for index, chunk in chunks:
                    answer.add(index, chunk, tallies[index])
        return JSONResponse(answer.whole(job))

    def _check_caller(self, request: Request) -> None:
        if self._only_here and not is_trusted(_host(request)):
            told = "call this server as localhost, or start it with an --api-key-file"
            raise APIError(403, told, "forbidden_host")
        if self._key is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode("latin-1"), self._key.encode()):  # as it was sent
            raise APIError(401, "this server needs its API key", "invalid_api_key")

    def _named(self, name: str) -> str:
        names = [*self.service.pool.sources]
        if not name and len(names) == 1:
            return names[0]
        if name not in names:
            known = ", ".join(names)
            raise APIError(404, f"no model {name[:100]!r}; available: {known}", "model_not_found")
        return name


def _finite(number: str) -> float:
    """A number in JSON, which has no NaN; a larger one than a float holds would become infinite."""
    if not math.isfinite(value := float(number)):
        raise ValueError
    return value


async def _left(request: Request) -> None:
    """Raises once the client disconnects, after its body was read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    raise APIError.gone()


def _host(request: Request) -> str:
    """The host name that a client called."""
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""
