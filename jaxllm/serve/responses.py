"""/v1/responses: OpenAI's newer form of a chat, of the same parts; answers can be kept, followed up and cancelled."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from jaxllm.serve.answers import merged, to_json
from jaxllm.serve.chats import ChatJob
from jaxllm.serve.errors import ApiError, as_api_error, bad_request, internal_error
from jaxllm.serve.generation import Generation
from jaxllm.serve.parsing import validate
from jaxllm.serve.protocol import ChatRequest
from jaxllm.serve.responses_request import ResponsesRequest, messages_of
from jaxllm.serve.server import Server
from jaxllm.serve.speech import Spoken

_ENDED = ("completed", "incomplete", "failed", "cancelled")
_CANCEL_POLL_SECONDS = 0.2


class ResponseJob:
    """One response: `start`, then `whole`, `chunks` or `run_behind`; `close` whatever happens."""

    def __init__(self, server: Server, body: ResponsesRequest) -> None:
        self.server, self.body = server, body
        if body.background and body.stream:
            raise bad_request("background and stream exclude each other; give one", "background")
        if body.background and body.store is False:
            raise bad_request("background needs store", "background")
        self._before = self._messages_of(body.previous_response_id)
        self._job = ChatJob(server, validate(ChatRequest, body.to_chat(self._before)))
        self._events = 0
        self._output: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None  # the item that grows
        self.response: dict[str, Any] = self._new()

    def _messages_of(self, response_id: str | None) -> list[dict[str, Any]]:
        if response_id is None:
            return []
        entry = self.server.store.get(response_id)
        if entry is None:
            raise not_found(response_id, "previous_response_id")
        found: list[dict[str, Any]] = entry["messages"]
        return found

    def _new(self) -> dict[str, Any]:
        body = self.body
        return {
            "id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time()),
            "status": "in_progress", "background": bool(body.background), "error": None, "incomplete_details": None,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {}, "model": self.server.model, "output": self._output,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": body.store is not False, "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": (body.text or {}).get("format") or {"type": "text"}},
            "tool_choice": body.tool_choice or "auto", "tools": [_shown_tool(tool) for tool in body.tools or []],
            "top_logprobs": body.top_logprobs or 0, "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled", "usage": None, "user": body.user,
        }  # fmt: skip

    @property
    def generations(self) -> list[Generation]:
        return self._job.generations

    def usage(self) -> dict[str, Any]:
        return self._job.usage()

    def close(self) -> None:
        self._job.close()

    async def start(self) -> None:
        await self._job.start()

    async def whole(self) -> dict[str, Any]:
        """The finished answer."""
        async for _ in self.chunks():
            pass
        return self.response

    def run_behind(self) -> dict[str, Any]:
        """Goes on with nobody waiting; the answer so far, which says queued."""
        self.response["status"] = "queued"
        shown = {**self.response, "output": []}
        self._keep()
        self.server.run_behind(self._behind())
        return shown

    async def _behind(self) -> None:
        async def work() -> None:
            self.response["status"] = "in_progress"
            self._keep()
            async for _ in self.chunks():
                pass

        task = asyncio.create_task(work())
        try:
            while not task.done():
                await asyncio.wait((task,), timeout=_CANCEL_POLL_SECONDS)
                if not task.done() and self.server.store.is_cancelled(self.response["id"]):
                    task.cancel()
                    self.response["status"] = "cancelled"
                    self._keep()
                    return
            task.result()
        except Exception as error:
            known = as_api_error(error, engine_is_there=self.server.client.hello is not None)
            self._fail(internal_error() if known is None else known.body)
        finally:
            self.close()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Typed events as they go over the line; the first once the engine took the request."""
        begun = False
        async for _, deltas in merged(self.generations):
            found = b""
            if not begun:
                begun = True
                found = self._event("response.created", response=self.response)
                found += self._event("response.in_progress", response=self.response)
            for delta in deltas:
                spoken = self._job.feed(delta)
                found += self._say(spoken, self._job.logprobs_of(delta))
                if delta.finish_reason is not None:
                    found += self._finish(delta.finish_reason)
            yield found

    def failure(self, body: dict[str, Any]) -> bytes:
        """The events with which a stream ends that failed."""
        self._fail(body)
        error = body["error"]
        told = {"code": error["code"], "message": error["message"], "param": error["param"]}
        return self._event("error", **told) + self._event("response.failed", response=self.response)

    def _fail(self, body: dict[str, Any]) -> None:
        error = body["error"]
        self.response |= {"status": "failed", "error": {"code": "server_error", "message": error["message"]}}
        self._keep()

    # ---- events -----------------------------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> bytes:
        body = to_json({"type": kind, "sequence_number": self._events, **fields})
        self._events += 1
        return b"event: " + kind.encode() + b"\ndata: " + body + b"\n\n"

    def _say(self, spoken: Spoken, logprobs: list[dict[str, Any]]) -> bytes:
        found = b""
        if spoken.reasoning:
            found += self._text("reasoning", spoken.reasoning, [])
        if spoken.text:
            found += self._text("message", spoken.text, logprobs)
        for call in spoken.calls:
            found += self._call(call)
        return found

    def _begin(self, item: dict[str, Any]) -> bytes:
        found = self._end()
        self._open = item
        self._output.append(item)
        return found + self._event("response.output_item.added", output_index=len(self._output) - 1, item=item)

    def _text(self, kind: str, text: str, logprobs: list[dict[str, Any]]) -> bytes:
        found, item = b"", dict[str, Any]()
        if self._open is None or self._open["type"] != kind:
            if kind == "message":
                item = {"type": kind, "id": f"msg_{uuid.uuid4().hex}", "role": "assistant", "status": "in_progress"}
                part: dict[str, Any] = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            else:
                item = {"type": kind, "id": f"rs_{uuid.uuid4().hex}", "summary": [], "status": "in_progress"}
                part = {"type": "reasoning_text", "text": ""}
            found = self._begin({**item, "content": []})
            assert self._open is not None
            self._open["content"].append(part)
            found += self._event("response.content_part.added", **self._place(), part=part)
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        fields = {**self._place(), "delta": text}
        if kind == "message":
            part["logprobs"] += logprobs
            fields["logprobs"] = logprobs
            return found + self._event("response.output_text.delta", **fields)
        return found + self._event("response.reasoning_text.delta", **fields)

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _call(self, call: dict[str, Any]) -> bytes:
        found, function = b"", call["function"]
        if "name" in function:
            item = {"type": "function_call", "id": f"fc_{uuid.uuid4().hex}", "call_id": call["id"]}
            found = self._begin({**item, "name": function["name"], "arguments": "", "status": "in_progress"})
        assert self._open is not None
        self._open["arguments"] += function["arguments"]
        where = {"item_id": self._open["id"], "output_index": len(self._output) - 1}
        return found + self._event("response.function_call_arguments.delta", **where, delta=function["arguments"])

    def _end(self, status: str = "completed") -> bytes:
        """Closes the item that grows."""
        item = self._open
        if item is None:
            return b""
        item["status"] = status
        if item["type"] == "function_call":
            where = {"item_id": item["id"], "output_index": len(self._output) - 1, "name": item["name"]}
            found = self._event("response.function_call_arguments.done", **where, arguments=item["arguments"])
        else:
            part, place = item["content"][0], self._place()
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            more = {"logprobs": part["logprobs"]} if kind == "output_text" else {}
            found = self._event(f"response.{kind}.done", **place, text=part["text"], **more)
            found += self._event("response.content_part.done", **place, part=part)
        found += self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)
        self._open = None
        return found

    def _finish(self, reason: str) -> bytes:
        cut = reason == "length"
        found = self._end("incomplete" if cut else "completed")
        usage = self.usage()
        self.response |= {
            "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": {
                    "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
                    "cache_write_tokens": 0,
                },
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": usage["completion_tokens_details"],
                "total_tokens": usage["total_tokens"],
            },
        }
        self._keep()
        return found + self._event(f"response.{self.response['status']}", response=self.response)

    def _keep(self) -> None:
        if self.body.store is False:
            return
        said = [item for item in self._output if item["type"] != "reasoning"]
        messages = [*self._before, *self.body.messages(), *messages_of(said)]
        self.server.store.put(self.response["id"], {"response": self.response, "messages": messages})


def _shown_tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {"strict": True, "parameters": {}, **tool}


def not_found(response_id: str, param: str | None = None) -> ApiError:
    shown = response_id if len(response_id) <= 80 else response_id[:77] + "..."
    return ApiError(404, f"Response with id '{shown}' not found.", param=param, code="response_not_found")


async def cancelled(server: Server, response_id: str) -> dict[str, Any]:
    """Cancels a response that goes on in the background; its last state. Raises ApiError."""
    entry = server.store.get(response_id)
    if entry is None:
        raise not_found(response_id)
    response: dict[str, Any] = entry["response"]
    if not response["background"]:
        raise bad_request("only a response in the background can be cancelled", "response_id")
    if response["status"] not in _ENDED:
        server.store.ask_to_cancel(response_id)
        end = time.monotonic() + 10 * _CANCEL_POLL_SECONDS
        while response["status"] not in _ENDED and time.monotonic() < end:
            await asyncio.sleep(_CANCEL_POLL_SECONDS / 4)
            response = (server.store.get(response_id) or entry)["response"]
    return response
