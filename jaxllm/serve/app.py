"""The routes of a frontend."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxllm import __version__
from jaxllm.serve.answers import to_json, token_text
from jaxllm.serve.chats import ChatJob
from jaxllm.serve.completions import CompletionJob
from jaxllm.serve.errors import ApiError, as_api_error, bad_request, internal_error
from jaxllm.serve.gate import Gate, logger
from jaxllm.serve.iteration_stats import iteration_stats_since
from jaxllm.serve.jobs import Job
from jaxllm.serve.openapi import openapi
from jaxllm.serve.parsing import parse_json, validate
from jaxllm.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Generate,
    TokenizeRequest,
)
from jaxllm.serve.responses import ResponseJob, cancelled, not_found
from jaxllm.serve.responses_request import ResponsesRequest
from jaxllm.serve.server import Server

T = TypeVar("T")
AnyJob = Job | ResponseJob
_PAGE = Path(__file__).with_name("page.html")
_PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
}
_HEALTH_GENERATE_SECONDS = 20.0


class Answer(Response):
    """JSON without a detour over str."""

    media_type = "application/json"

    def __init__(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(to_json(content), status, headers)


class EventStream(Response):
    """Server-sent events. Ends, and closes its job, when the client is gone; an error becomes the last event."""

    def __init__(self, first: bytes, events: AsyncIterator[bytes], job: AnyJob, note: dict[str, Any]) -> None:
        super().__init__(status_code=200)
        self._first, self._events, self._job, self._note = first, events, job, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sender = asyncio.create_task(self._send_all(send))
        gone = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
            else:
                self._note["outcome"] = "disconnected"
        finally:
            for task in (sender, gone):
                task.cancel()
            self._job.close()
            _note_usage(self._note, self._job)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": self._first, "more_body": True})
        try:
            async for event in self._events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            # The status line is out: clients look for an error among the events.
            known = as_api_error(error, engine_is_there=self._job.server.client.hello is not None)
            if known is None:
                logger.exception("a stream failed")
            self._note["outcome"] = "error"
            body = internal_error() if known is None else known.body
            last = self._job.failure(body)
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _note_usage(note: dict[str, Any], job: AnyJob) -> None:
    if job.generations:
        found = job.usage()
        note["prompt_tokens"], note["completion_tokens"] = found["prompt_tokens"], found["completion_tokens"]
        note["cached_tokens"] = found["prompt_tokens_details"]["cached_tokens"]


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`; ClientDisconnect, with the work cancelled, when the client goes first."""
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_disconnected(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect()
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()


async def _body(request: Request) -> dict[str, Any]:
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        raise bad_request(f"the content type {kind!r} is not supported; send application/json", code="content_type")
    return parse_json(await request.body())


def make_app(server: Server) -> ASGIApp:
    """The ASGI application of one frontend."""

    async def generate(
        request: Request, model: type[Generate | ResponsesRequest], job_type: Callable[[Server, Any], AnyJob]
    ) -> Response:
        body = validate(model, await _body(request))
        server.check_model(body.model)
        server.hello  # noqa: B018 - raises when there is no engine
        note = request.state.note
        job = job_type(server, body)
        streaming = False
        try:
            await job.start()
            if isinstance(job, ResponseJob) and job.body.background:
                streaming = True  # the job is closed by whoever goes on with it
                return Answer(job.run_behind())
            if not body.stream:
                answer = await _unless_gone(request, job.whole())
                note["finish_reason"] = (
                    answer["choices"][0]["finish_reason"] if "choices" in answer else answer["status"]
                )
                return Answer(answer)
            events = job.chunks()
            # An error before the first event still has a status of its own.
            first = await _unless_gone(request, anext(events))  # type: ignore[arg-type]
            streaming = True
            return EventStream(first, events, job, note)
        except ClientDisconnect:
            note["outcome"] = "disconnected"
            return Response(status_code=499)
        except Exception as error:
            known = as_api_error(error, engine_is_there=server.client.hello is not None)
            if known is None:
                raise
            note["error"] = known.body["error"]["message"]
            raise known from error
        finally:
            if not streaming:
                job.close()
                _note_usage(note, job)

    async def completions(request: Request) -> Response:
        return await generate(request, CompletionRequest, CompletionJob)

    async def chat_completions(request: Request) -> Response:
        return await generate(request, ChatRequest, ChatJob)

    async def responses(request: Request) -> Response:
        return await generate(request, ResponsesRequest, ResponseJob)

    async def response(request: Request) -> Response:
        found = server.store.get(request.path_params["response_id"])
        if found is None:
            raise not_found(request.path_params["response_id"], "response_id")
        return Answer(found["response"])

    async def cancel_response(request: Request) -> Response:
        return Answer(await cancelled(server, request.path_params["response_id"]))

    def card(name: str) -> dict[str, Any]:
        hello = server.client.hello or {}
        return {
            "id": name, "object": "model", "created": server.created, "owned_by": "jaxllm",
            "max_model_len": hello.get("max_seq_len"),
        }  # fmt: skip

    async def models(request: Request) -> Response:
        return Answer({"object": "list", "data": [card(name) for name in server.names]})

    async def model(request: Request) -> Response:
        server.check_model(request.path_params["name"])
        return Answer(card(request.path_params["name"]))

    async def tokenize(request: Request) -> Response:
        body = validate(TokenizeRequest, await _body(request))
        server.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_request("give either prompt or messages", "prompt")
        if body.prompt is not None:
            tokens = await server.encode(body.prompt, body.add_special_tokens)
        else:
            chat = validate(ChatRequest, {"messages": body.messages})
            tokens = await server.chat_tokens(chat.conversation, body.add_generation_prompt)
        found: dict[str, Any] = {
            "count": len(tokens), "max_model_len": server.hello["max_seq_len"], "tokens": tokens
        }  # fmt: skip
        if body.return_token_strs:
            found["token_strs"] = [token_text(server.tokenizer, token)[0] for token in tokens]
        return Answer(found)

    async def detokenize(request: Request) -> Response:
        body = validate(DetokenizeRequest, await _body(request))
        server.check_model(body.model)
        vocabulary = server.hello["vocab_size"]
        if body.tokens and max(body.tokens) >= vocabulary:
            raise bad_request(f"token {max(body.tokens)} is not in the vocabulary of {vocabulary}", "tokens")
        return Answer({"prompt": server.tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def health(request: Request) -> Response:
        trouble = server.health()
        if trouble is None:
            return Answer({"status": "ok"})
        return Answer({"status": "unavailable", "reason": trouble}, 503, {"retry-after": "1"})

    async def health_generate(request: Request) -> Response:
        trouble = server.health()
        if trouble is None:
            probe = validate(Generate, {"stream": True})
            params = {"n": 1, "max_tokens": 1, "ignore_eos": True}
            try:
                async with asyncio.timeout(_HEALTH_GENERATE_SECONDS):
                    generation = server.submit(probe, [server.tokenizer.bos_token_id or 0], params)
                    try:
                        async for _ in generation.deltas():
                            pass
                    finally:
                        generation.close()
            except TimeoutError:
                trouble = f"no token within {_HEALTH_GENERATE_SECONDS:g} s"
            except (ApiError, RuntimeError, ValueError) as error:
                trouble = str(error)
        if trouble is None:
            return Answer({"status": "ok"})
        return Answer({"status": "unavailable", "reason": trouble}, 503, {"retry-after": "1"})

    async def version(request: Request) -> Response:
        return Answer({"version": __version__})

    async def describe(request: Request) -> Response:
        hello = server.client.hello or {}
        return Answer(openapi(hello.get("vocab_size"), hello.get("max_seq_len"), server.settings.api_key is not None))

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def iteration_stats(request: Request) -> Response:
        since = request.query_params.get("since", "0")
        if not since.isascii() or not since.isdigit() or len(since) > 18:
            raise bad_request(f"since = {since!r} must be the number of an iteration", "since")
        return Answer(iteration_stats_since(server, int(since)))

    async def page(request: Request) -> Response:
        return Response(_PAGE.read_bytes(), media_type="text/html", headers=_PAGE_HEADERS)

    routes = [
        Route("/", page),
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat_completions, methods=["POST"]),
        Route("/v1/responses", responses, methods=["POST"]),
        Route("/v1/responses/{response_id}", response),
        Route("/v1/responses/{response_id}/cancel", cancel_response, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/detokenize", detokenize, methods=["POST"]),
        Route("/health", health),
        Route("/health_generate", health_generate),
        Route("/version", version),
        Route("/metrics", metrics),
        Route("/iteration_stats", iteration_stats),
        Route("/openapi.json", describe),
    ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(server.client.run())
        try:
            yield
        finally:
            task.cancel()

    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        text = {404: f"there is no {request.url.path}", 405: f"{request.url.path} does not take {request.method}"}
        answer = ApiError(error.status_code, text.get(error.status_code, error.detail), code="unknown_url")
        return Answer(answer.body, error.status_code, dict(error.headers or {}))

    handlers: Any = {ApiError: on_api_error, HTTPException: on_http_error}
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)
    return Gate(app, server)
