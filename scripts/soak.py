#!/usr/bin/env python
"""A server under load that does not behave: nothing may leak, and nobody who behaves may notice.

    python scripts/soak.py --minutes 20                  # at saturation, with random cancels and disconnects
    python scripts/soak.py --hostile 10000               # malformed and hostile requests beside 32 good streams

Starts `jaxllm serve MODEL` on loopback. The soak wants afterwards: no page held, no more file descriptors than before,
resident memory flat after the warm-up (the first fifth), and every request counted in the metrics. The hostile run
wants every good stream byte for byte as it was undisturbed, no 5xx (a full queue's 503 aside), and memory flat.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from jaxllm.serve.http_client import Client

READY = re.compile(r"serving \S+ at (\S+) ")
WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "away", "from", "us", "while", "asleep"]
CHAIN = "start: a0\n" + "\n".join(f'a{i}: a{i + 1} "b"?' for i in range(2000)) + '\na2000: "x"'
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
ROUTES = ("/v1/completions", "/v1/chat/completions")


class Server:
    """The server, its processes, and what they hold."""

    def __init__(self, model: str, options: list[str]) -> None:
        command = [sys.executable, "-m", "jaxllm.cli", "serve", model, "--port", "0", "--log_level", "error", *options]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", file=sys.stderr)
            if found := READY.search(line):
                self.url = found[1]
                break
        else:
            raise SystemExit("the server did not start")
        threading.Thread(target=self._relay, daemon=True).start()

    def _relay(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", file=sys.stderr)

    @property
    def pids(self) -> list[int]:
        pid = self.process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def files(self) -> int:
        """Open file descriptors of all processes."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids)

    def resident(self) -> list[float]:
        """MiB of resident memory of each process: supervisor, engine, frontends."""
        return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20 for pid in self.pids]

    def end(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


async def metrics(client: Client) -> dict[str, float]:
    """All samples of /metrics, by name and labels."""
    answer = await client.request("GET", "/metrics")
    text = (await answer.read()).decode()
    client.done(answer)
    pairs = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


def total(found: dict[str, float], name: str, *labels: str) -> float:
    return sum(
        value for key, value in found.items() if key.partition("{")[0] == name and all(label in key for label in labels)
    )


async def idle(client: Client, seconds: float = 60.0) -> dict[str, float]:
    """The metrics once nothing runs any more; the last ones after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        await asyncio.sleep(0.6)
        found = await metrics(client)
        running = total(found, "jaxllm_num_requests_running") + total(found, "jaxllm_num_requests_waiting")
        if not running or time.monotonic() > end:
            return found


class Watch:
    """Resident memory over time."""

    def __init__(self, server: Server) -> None:
        self.server, self.samples = server, list[list[float]]()

    async def run(self) -> None:
        while True:
            self.samples.append(self.server.resident())
            await asyncio.sleep(1.0)

    def show(self) -> None:
        """Ten readings over the time, by process."""
        for sample in self.samples[:: max(1, len(self.samples) // 10)]:
            print("  MiB:", *(f"{value:.1f}" for value in sample))

    def growth(self) -> tuple[float, float]:
        """(MiB at the end of the warm-up, MiB that came on top by the end), medians of a tenth of the time each."""
        values = [sum(sample) for sample in self.samples]
        tenth = max(1, len(values) // 10)
        warm = statistics.median(values[2 * tenth : 3 * tenth] or values)
        return warm, statistics.median(values[-tenth:]) - warm


# ---- soak ---------------------------------------------------------------------------------------------------------


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(ROUTES)
    prompt = " ".join(rng.choices(WORDS, k=rng.randint(1, 60)))
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 48), "stream": rng.random() < 0.7}
    body |= {"messages": [{"role": "user", "content": prompt}]} if "chat" in path else {"prompt": prompt}
    body |= rng.choice([{}, {"temperature": 0}, {"n": 2}, {"stop": ["a"]}, {"seed": 5}, {"ignore_eos": True},
                        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
                        {"guided_regex": "[a-z ]{5,20}"}, {"frequency_penalty": 0.5}])  # fmt: skip
    if "chat" not in path and rng.random() < 0.2:
        body["logprobs"] = 2
    return path, body


async def one_request(url: str, rng: random.Random, counts: Counter[str]) -> None:
    """One request to its end, or left somewhere on the way."""
    client, (path, body) = Client(url), random_request(rng)
    leaves_after = rng.choice([None, None, 0.0, 0.05, 0.3, 1.0])
    client._free.append(await client._connect())  # a request that was never sent is no request
    counts["sent"] += 1
    answer = None
    try:
        async with asyncio.timeout(leaves_after or 300):
            answer = await client.request("POST", path, body)
            async for _ in answer.chunks():
                pass
            counts[f"status {answer.status}"] += 1
    except TimeoutError:
        counts["left"] += 1
    except (OSError, asyncio.IncompleteReadError) as error:
        counts[f"broken: {type(error).__name__}"] += 1
    finally:
        if answer is not None:
            client.done(answer)
        client.close()


async def soak(server: Server, args: argparse.Namespace) -> list[str]:
    client, counts = Client(server.url), Counter[str]()
    for index in range(4):
        await one_request(server.url, random.Random(index), Counter())
    before = await idle(client)
    files = server.files()
    end = time.monotonic() + 60 * args.minutes
    watch = Watch(server)
    watching = asyncio.create_task(watch.run())

    async def user(number: int) -> None:
        rng = random.Random(number)
        while time.monotonic() < end:
            await one_request(server.url, rng, counts)

    await asyncio.gather(*(user(number) for number in range(args.users)))
    watching.cancel()
    after = await idle(client)
    client.close()
    await asyncio.sleep(1.0)
    warm, growth = watch.growth()
    watch.show()
    answered = sum(
        total(after, "jaxllm_http_requests_total", f'handler="{route}"')
        - total(before, "jaxllm_http_requests_total", f'handler="{route}"')
        for route in ROUTES
    )
    tokens = total(after, "jaxllm_generation_tokens_total") - total(before, "jaxllm_generation_tokens_total")
    left = server.files() - files
    print(f"{dict(counts)}; {tokens:.0f} tokens, {tokens / 60 / args.minutes:.1f} a second")
    print(
        f"memory {warm:.1f} MiB after the warm-up, {growth:+.1f} MiB by the end; files {files} before, {left:+d} after"
    )
    problems = []
    if answered != counts["sent"]:
        problems.append(f"{counts['sent']} requests were sent and {answered:.0f} counted")
    if total(after, "jaxllm_kv_cache_usage_perc") or total(after, "jaxllm_num_requests_running"):
        problems.append("pages or sequences are still held")
    if left > 2:
        problems.append(f"{left} more files are open than before")
    if growth > max(8.0, 0.01 * warm):
        problems.append(f"memory grew by {growth:.1f} MiB after the warm-up")
    problems += [f"{count} x {what}" for what, count in counts.items() if what.startswith(("status 5", "broken"))]
    return problems


# ---- hostile ------------------------------------------------------------------------------------------------------


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


async def hostile(server: Server, args: argparse.Namespace) -> list[str]:
    wanted = [await good_stream(server.url, number) for number in range(args.streams)]
    host, port = server.url.removeprefix("http://").split(":")
    counts, bodies, todo = Counter[str](), json_bodies(), iter(range(args.hostile))
    watch = Watch(server)
    watching = asyncio.create_task(watch.run())
    wrong: list[int] = []
    done = asyncio.Event()

    async def attacker(number: int) -> None:
        rng = random.Random(number)
        for _ in todo:
            counts[await hostile_request(host, int(port), rng, bodies)] += 1

    async def user(number: int) -> None:
        while not done.is_set():
            text = await good_stream(server.url, number)
            counts["good streams"] += 1
            if text != wanted[number]:
                wrong.append(number)

    users = [asyncio.create_task(user(number)) for number in range(args.streams)]
    await asyncio.gather(*(attacker(number) for number in range(48)))
    done.set()
    await asyncio.gather(*users)
    watching.cancel()
    client = Client(server.url)
    after = await idle(client)
    client.close()
    warm, growth = watch.growth()
    print(f"{dict(counts)}; memory {warm:.1f} MiB after the warm-up, {growth:+.1f} MiB by the end")
    problems = [f"{len(wrong)} good streams were not as undisturbed"] if wrong else []
    problems += [f"{count} x {what}" for what, count in counts.items()
                 if what == "no answer" or (what[0] == "5" and what != "503")]  # fmt: skip
    if total(after, "jaxllm_kv_cache_usage_perc") or total(after, "jaxllm_num_requests_running"):
        problems.append("pages or sequences are still held")
    if growth > max(16.0, 0.02 * warm):
        problems.append(f"memory grew by {growth:.1f} MiB after the warm-up")
    return problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="of the soak (default: %(default)s)")
    parser.add_argument("--users", type=int, default=24, help="of the soak, at a time (default: %(default)s)")
    parser.add_argument("--hostile", type=int, default=0, metavar="N", help="send so many bad requests instead")
    parser.add_argument("--streams", type=int, default=32, help="good ones beside them (default: %(default)s)")
    parser.add_argument("options", nargs="*", help="more options of jaxllm serve, after --")
    args = parser.parse_args()
    server = Server(args.model, args.options)
    run: Callable[[Server, argparse.Namespace], Awaitable[list[str]]] = hostile if args.hostile else soak
    try:
        problems = asyncio.run(run(server, args))  # type: ignore[arg-type]
    finally:
        code = server.end()
    if code:
        problems.append(f"the server ended with {code}")
    for problem in problems:
        print(f"wrong: {problem}")
    print("all well" if not problems else f"{len(problems)} things are wrong")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
