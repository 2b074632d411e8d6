"""`jaxllm run-batch`: a file of requests in OpenAI's batch format, answered into another; it can be killed and resumed.

Each answer is one line, written whole and at once. What is in the output when it starts is done already, and a last
line that was cut off is taken away and asked again: no line is lost and none comes twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import secrets
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from jaxllm.serve.http_client import Client
from jaxllm.serve.options import check_packages, serve_settings
from jaxllm.settings import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions")
_TRIES = 60
_RETRY_SECONDS = 1.0
_RETRIED = (429, 503)

logger = logging.getLogger(__name__)


def read_requests(path: str) -> list[tuple[str, bytes]]:
    """(custom_id, line) of every request. Raises ConfigError naming the first line that is not one."""
    found: list[tuple[str, bytes]] = []
    seen: set[str] = set()
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read {path!r}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not valid JSON: {error}") from None
        custom_id = item.get("custom_id") if isinstance(item, dict) else None
        if not isinstance(custom_id, str) or not custom_id:
            raise ConfigError(f"{path}:{number}: a request needs a custom_id that is a string")
        if custom_id in seen:
            raise ConfigError(f"{path}:{number}: custom_id {custom_id!r} comes twice; answers are known by it")
        seen.add(custom_id)
        found.append((custom_id, line))
    return found


def finished(file: BinaryIO) -> set[str]:
    """The custom_ids that an output has whole lines of; cuts off a last line that is not whole."""
    done: set[str] = set()
    whole = 0
    for line in file:
        if not line.endswith(b"\n"):
            break
        try:
            done.add(json.loads(line)["custom_id"])
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{file.name}: a line is no answer of run-batch; give another output file") from None
        whole += len(line)
    file.truncate(whole)
    file.seek(whole)
    return done


def _problem(item: dict[str, Any]) -> str | None:
    if item.get("method") != "POST":
        return f"method = {item.get('method')!r} must be POST"
    if item.get("url") not in URLS:
        return f"url = {item.get('url')!r} must be one of {', '.join(URLS)}"
    if not isinstance(item.get("body"), dict):
        return "body must be an object"
    if item["body"].get("stream"):
        return "stream = true is not possible in a batch"
    return None


async def answer_all(client: Client, requests: list[tuple[str, bytes]], out: BinaryIO, concurrency: int) -> int:
    """Sends what is to be sent, and writes the answers as they come; returns how many were no success.

    Raises OSError when the server is gone.
    """
    todo: Iterator[tuple[str, bytes]] = iter(requests)
    failed = 0

    async def worker() -> None:
        nonlocal failed
        for custom_id, line in todo:
            answer = await _answer(client, custom_id, json.loads(line))
            failed += answer["error"] is not None or answer["response"]["status_code"] != 200
            os.write(out.fileno(), json.dumps(answer, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    async with asyncio.TaskGroup() as group:
        for _ in range(min(concurrency, len(requests))):
            group.create_task(worker())
    return failed


async def _answer(client: Client, custom_id: str, item: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": None}
    problem = _problem(item)
    if problem is not None:
        return {**whole, "error": {"code": "invalid_request", "message": problem}}
    for left in reversed(range(_TRIES)):
        answer, body = await client.json("POST", item["url"], item["body"])
        if answer.status not in _RETRIED or not left:
            break
        await asyncio.sleep(_RETRY_SECONDS)
    request_id = answer.headers.get("x-request-id")
    return {**whole, "response": {"status_code": answer.status, "request_id": request_id, "body": body}, "error": None}


def run(args: argparse.Namespace) -> int:
    if (args.model is None) == (args.base_url is None):
        raise ConfigError("give either --model, to start a server for the batch, or --base-url of one that runs")
    requests = read_requests(args.input_file)
    try:
        out = open(args.output_file, "a+b", buffering=0)  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"cannot write {args.output_file!r}: {error.strerror}") from None
    with out:
        out.seek(0)
        done = finished(out)
        left = [request for request in requests if request[0] not in done]
        print(f"jaxllm: {len(requests)} requests, {len(requests) - len(left)} done before", file=sys.stderr, flush=True)
        if not left:
            return 0

        def work(url: str, key: str | None) -> int:
            client = Client(url, {"authorization": f"Bearer {key}"} if key else {})
            try:
                return asyncio.run(answer_all(client, left, out, args.max_concurrency))
            except BaseExceptionGroup as group:
                raise group.exceptions[0] from None

        if args.base_url is not None:
            failed = work(args.base_url, args.api_key)
        else:
            failed = _with_server(args, work)
        print(f"jaxllm: {len(left)} answered, {failed} of them with an error", file=sys.stderr, flush=True)
    return 0


def _with_server(args: argparse.Namespace, work: Any) -> int:
    """Runs `work(url, key)` beside a server that only it can reach."""
    check_packages()
    from jaxllm.serve.supervisor import Supervisor

    engine, settings = serve_settings(args)
    key = secrets.token_urlsafe(24)
    private = {"host": "127.0.0.1", "port": 0, "api_key": key, "served_model_name": settings.served_model_name}
    if args.log_level is None:
        private["log_level"] = "warning"
    settings = settings.model_copy(update=private)
    results: list[int] = []
    errors: list[BaseException] = []

    def beside(url: str) -> None:
        try:
            results.append(work(url, key))
        except BaseException as error:  # handed over to the main thread
            errors.append(error)
        finally:
            supervisor.stop()

    def start(url: str) -> None:
        threading.Thread(target=beside, args=(url,), daemon=True).start()

    supervisor = Supervisor(engine, settings, args.debug, on_ready=start)
    code = supervisor.run()
    if errors:
        raise errors[0]
    if not results:
        if not code:
            raise KeyboardInterrupt
        raise ConfigError("the server ended before the batch did; run the same command again to go on")
    return results[0]
