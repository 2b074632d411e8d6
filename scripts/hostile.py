#!/usr/bin/env python
"""Malformed and hostile requests beside good streams: nobody who behaves may notice.

    python scripts/hostile.py --json hostile.json                         # 10,000 beside 32 streams, SmolLM2
    python scripts/hostile.py --random-weights tiny --json hostile.json   # needs no checkpoint

Starts `jaxllm serve` on loopback. Every good stream has to be byte for byte as it was undisturbed, no bad request may
be answered with 5xx (a full queue's 503 aside), and resident memory has to be flat after the warm-up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import time
from collections import Counter
from typing import Any

from server_under_test import MemoryWatch, Server, add_options, idle, memory_problems, run, total

from jaxllm.serve.http_client import Client

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away", "from", "us", "while", "asleep"]
CHAIN = "start: a0\n" + "\n".join(f'a{i}: a{i + 1} "b"?' for i in range(2000)) + '\na2000: "x"'
ROUTES = ("/v1/completions", "/v1/chat/completions")


def json_bodies() -> list[bytes]:
    """Bodies that are wrong, each in its own way, or ask for more than anybody may have."""
    fields: list[dict[str, Any]] = [
        {"n": 10**9}, {"n": -1}, {"n": "many"}, {"max_tokens": 10**12}, {"max_tokens": -5}, {"temperature": 1e400},
        {"temperature": -1}, {"top_p": 0}, {"logprobs": 10**6}, {"logit_bias": {"x": 1}}, {"seed": 2**70},
        {"logit_bias": {str(10**8): 1}}, {"stop": [""] * 20}, {"stop": "x" * 10**5}, {"prompt": [2**31]},
        {"prompt": [-1]}, {"prompt": {"a": 1}}, {"prompt": ["x"] * 2000}, {"prompt": "x" * 10**6}, {"prompt": "\ud800"},
        {"stop_token_ids": [10**9]}, {"model": "other"}, {"stream_options": {}}, {"best_of": 5}, {"cache_salt": ""},
        {"guided_regex": "((((a{100}){100}){100}){100}){100}"}, {"guided_regex": "(" * 10**4},
        {"guided_grammar": CHAIN}, {"response_format": {"type": "xml"}},
        {"guided_regex": "x" * 10**6}, {"guided_json": {"$ref": "#"}}, {"guided_json": {"type": "nothing"}},
        {"guided_choice": []}, {"structured_outputs": {"regex": "a", "json": {}}},
        {"priority": 1e308, "max_tokens": 1}, {"truncate_prompt_tokens": 0}, {"return_token_ids": "yes"},
    ]  # fmt: skip
    whole = [json.dumps({"prompt": "x", "max_tokens": 4, **one}).encode() for one in fields]
    broken = [b"", b"{", b"null", b"[]", b"\xff\xfe\x00", b'{"prompt": "\xc3\x28"}', b"[" * 10**5, b'{"a":' * 10**4]
    return whole + broken + [b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x"}' + b" " * 10 + b"}"]


async def hostile_request(host: str, port: int, rng: random.Random, bodies: list[bytes]) -> str:
    """Sends something bad; the status of the answer, or how the connection ended."""
    head = b"POST " + rng.choice(ROUTES).encode() + b" HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    reader, writer = await asyncio.open_connection(host, port)
    try:
        kind = rng.randrange(100)
        body = rng.choice(bodies)
        raw = head + b"content-length: %d\r\n\r\n" % len(body) + body
        if kind < 70:
            writer.write(raw)
        elif kind < 74:  # a body of 100 MB, announced or in chunks
            writer.write(head + b"content-length: 104857600\r\n\r\n" + b"x" * 65536)
        elif kind < 77:
            writer.write(head + b"transfer-encoding: chunked\r\n\r\n" + (b"10000\r\n" + b"x" * 65536 + b"\r\n") * 8)
        elif kind < 80:
            writer.write(b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n")
        elif kind < 83:
            writer.write(bytes(rng.randrange(256) for _ in range(200)) + b"\r\n\r\n")
        elif kind < 86:
            writer.write(head + b"x: " + b"y" * 100_000 + b"\r\n\r\n")
        elif kind < 90:  # a slow client that gives up
            for start in range(0, min(len(raw), 60), 20):
                writer.write(raw[start : start + 20])
                await asyncio.sleep(0.05)
            return "gave up"
        elif kind < 92:  # one that asks for much and reads none of it
            long = b'{"prompt": "x", "n": 16, "stream": true, "max_tokens": 100, "logprobs": 20}'
            writer.write(head + b"content-length: %d\r\n\r\n" % len(long) + long)
            writer.transport.pause_reading()
            await asyncio.sleep(1.0)
            return "did not read"
        elif kind < 94:  # it says that it sends no more, which to a server is a client that has gone
            writer.write(raw)
            writer.write_eof()
        elif kind < 97:  # a long stream, left at once
            long = b'{"prompt": "x", "n": 8, "stream": true, "max_tokens": 200}'
            writer.write(head + b"content-length: %d\r\n\r\n" % len(long) + long)
            return "left"
        else:
            writer.write(head.replace(b"POST", rng.choice([b"PUT", b"BREW", b"DELETE"])) + b"\r\n")
        with contextlib.suppress(ConnectionError):
            await writer.drain()
        async with asyncio.timeout(60):
            line = await reader.readline()
        return line.split()[1].decode() if line.startswith(b"HTTP/1.1 ") else "closed"
    except (ConnectionError, asyncio.IncompleteReadError):
        return "closed"
    except TimeoutError:
        return "no answer"
    finally:
        writer.close()


async def good_stream(url: str, number: int) -> str:
    body = {
        "prompt": f"{number} {WORDS[number % len(WORDS)]}", "max_tokens": 24, "ignore_eos": True, "stream": True,
        "temperature": 0.8 if number % 2 else 0, "seed": number,
    }  # fmt: skip
    client = Client(url)
    answer = await client.request("POST", "/v1/completions", body)
    try:
        events = [json.loads(event) async for event in answer.events() if event != "[DONE]"]
        return "".join(event["choices"][0]["text"] for event in events)
    finally:
        client.done(answer)
        client.close()


async def hostile(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the load; what was found, with the list `problems`."""
    wanted = [await good_stream(server.url, number) for number in range(args.streams)]
    host, port = server.url.removeprefix("http://").split(":")
    counts, bodies, todo = Counter[str](), json_bodies(), iter(range(args.requests))
    files = server.files()
    watch = MemoryWatch(server)
    watching = asyncio.create_task(watch.run())
    wrong: list[int] = []
    done = asyncio.Event()
    began = time.monotonic()

    async def attacker(number: int) -> None:
        rng = random.Random(number)
        for _ in todo:
            if time.monotonic() - began > args.seconds:
                return
            counts[await hostile_request(host, int(port), rng, bodies)] += 1

    async def user(number: int) -> None:
        while not done.is_set():
            text = await good_stream(server.url, number)
            counts["good streams"] += 1
            if text != wanted[number]:
                wrong.append(number)

    users = [asyncio.create_task(user(number)) for number in range(args.streams)]
    await asyncio.gather(*(attacker(number) for number in range(args.attackers)))
    seconds = time.monotonic() - began
    done.set()
    await asyncio.gather(*users)
    watching.cancel()
    client = Client(server.url)
    after = await idle(client)
    client.close()
    await asyncio.sleep(1.0)
    memory = watch.summary()
    problems = memory_problems(memory, 16.0)
    if wrong:
        problems.append(f"{len(wrong)} good streams were not as undisturbed")
    problems += [f"{count} x {what}" for what, count in counts.items()
                 if what == "no answer" or (what[0] == "5" and what != "503")]  # fmt: skip
    if total(after, "jaxllm_kv_cache_usage_perc") or total(after, "jaxllm_num_requests_running"):
        problems.append("pages or sequences are still held")
    left = server.files() - files
    if left > 2:
        problems.append(f"{left} more files are open than before")
    return {
        "streams": args.streams,
        "hostile_requests": sum(counts.values()) - counts["good streams"], "seconds": seconds, "answers": dict(counts),
        "good_streams": counts["good streams"], "good_streams_changed": len(wrong), "files_more_after": left,
        "memory": memory, "problems": problems,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--requests", type=int, default=10_000, help="bad ones (default: %(default)s)")
    parser.add_argument("--attackers", type=int, default=48, help="at a time (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=32, help="good ones beside them (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3600, help="no attack begins later (default: %(default)s)")
    args = parser.parse_args()
    config = {
        "kv_cache_config": {"max_tokens": 32768}, "max_batch_size": 64, "max_num_tokens": 512, "batch_buckets": [64],
        "max_seq_len": 2048, "log_level": "error", "progress": False,
    }  # fmt: skip
    return run(args, config, hostile)


if __name__ == "__main__":
    sys.exit(main())
