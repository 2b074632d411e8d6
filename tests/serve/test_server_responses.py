"""/v1/responses through the official client: whole, streamed, kept, followed up, in the background, cancelled."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from jaxllm.serve.store import ResponseStore
from tests.serve.live import Live

pytestmark = pytest.mark.timeout(300)

ASK: dict[str, Any] = {"model": "tiny", "input": "Hi", "temperature": 0.0, "max_output_tokens": 8}
TOOL: Any = {"type": "function", "name": "f", "strict": True, "parameters": {
    "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False,
}}  # fmt: skip


def test_whole_and_kept(live: Live, client: openai.OpenAI) -> None:
    answer = client.responses.create(**ASK)
    chat = live.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "temperature": 0,
                                              "max_tokens": 8}).json()  # fmt: skip
    assert answer.output_text == chat["choices"][0]["message"]["content"]
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None and answer.usage.output_tokens == 8
    assert client.responses.retrieve(answer.id).model_dump() == answer.model_dump()
    secret = client.responses.create(**ASK, store=False)
    for missing in (secret.id, "resp_" + "0" * 32, "../../etc/passwd"):
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(missing)


def test_streamed_events_add_up(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASK)
    found = list(client.responses.create(**ASK, stream=True))
    assert [event.sequence_number for event in found] == list(range(len(found)))
    kinds = [event.type for event in found]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"
    ]  # fmt: skip
    text = "".join(event.delta for event in found if event.type == "response.output_text.delta")
    last: Any = found[-1]
    assert text == whole.output_text == last.response.output_text
    assert found[0].response.output == []  # type: ignore[union-attr]
    with client.responses.stream(
        model="tiny", input="Hi", max_output_tokens=4
    ) as stream:  # the client's own book-keeping
        for _ in stream:
            pass


def test_followed_up(live: Live, client: openai.OpenAI) -> None:
    first = client.responses.create(**{**ASK, "max_output_tokens": 3}, instructions="Be")
    said: Any = [{"role": "user", "content": [{"type": "input_text", "text": "Yo"}]}]
    second = client.responses.create(**{**ASK, "input": said}, previous_response_id=first.id)
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "Yo"},
    ]
    chat = live.post("/v1/chat/completions", {"messages": messages, "temperature": 0, "max_tokens": 8}).json()
    assert second.output_text == chat["choices"][0]["message"]["content"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(**ASK, previous_response_id="resp_none")
    assert missing.value.param == "previous_response_id"


def test_tools_and_forms(client: openai.OpenAI) -> None:
    choice: Any = {"type": "function", "name": "f"}
    wild: dict[str, Any] = {"model": "tiny", "input": "Hi", "temperature": 1.5}
    (call,) = client.responses.create(**wild, tools=[TOOL], tool_choice=choice).output
    assert call.type == "function_call" and call.name == "f" and json.loads(call.arguments)["a"] in (1, 2)
    done = [
        event
        for event in client.responses.create(**wild, tools=[TOOL], tool_choice=choice, stream=True)
        if event.type == "response.function_call_arguments.done"
    ]
    assert len(done) == 1 and json.loads(done[0].arguments)["a"] in (1, 2)
    form: Any = {"format": {"type": "json_schema", "name": "s", "schema": TOOL["parameters"]}}
    assert json.loads(client.responses.create(**wild, text=form).output_text)["a"] in (1, 2)
    history: Any = [
        {"role": "user", "content": "Hi"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}'},
        {"type": "function_call_output", "call_id": "c1", "output": "5"},
    ]
    assert client.responses.create(**{**ASK, "input": history}).output_text
    for bad in ({"input": [{"type": "input_image"}]}, {"tools": [{"type": "web_search"}]}, {"input": []},
                {"background": True, "stream": True}, {"max_output_tokens": 0},
                {"text": {"format": {"type": "json_schema", "schema": {}}}}):  # fmt: skip
        with pytest.raises(openai.BadRequestError):
            client.responses.create(**{**ASK, **bad})


def test_in_the_background(client: openai.OpenAI) -> None:
    answer = client.responses.create(**{**ASK, "max_output_tokens": 40}, background=True)
    assert answer.status == "queued" and answer.output == []
    end = time.monotonic() + 20
    while (found := client.responses.retrieve(answer.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end
        time.sleep(0.05)
    assert found.output_text and found.status == "incomplete"
    assert client.responses.cancel(answer.id).status == "incomplete"  # too late
    with pytest.raises(openai.NotFoundError):
        client.responses.cancel("resp_" + "1" * 32)
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(client.responses.create(**ASK).id)


def test_the_store_has_an_end(tmp_path: Path) -> None:
    ids = [f"resp_{number:032x}" for number in range(5)]
    store = ResponseStore(tmp_path / "kept", max_bytes=250, max_seconds=60)
    for number, one in enumerate(ids):
        assert store.put(one, {"x": "y" * 80})
        os.utime(tmp_path / "kept" / one, (time.time() - 10 + number,) * 2)
    assert [store.get(one) is not None for one in ids] == [False] * 3 + [True] * 2
    assert not store.put(ids[0], {"x": "y" * 300})
    os.utime(tmp_path / "kept" / ids[4], (time.time() - 61,) * 2)
    assert store.get(ids[4]) is None and store.get(ids[3]) == {"x": "y" * 80}
    assert (tmp_path / "kept").stat().st_mode & 0o077 == 0
