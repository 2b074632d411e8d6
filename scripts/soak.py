#!/usr/bin/env python
"""A server at saturation, for a long time, with clients that leave: nothing may leak, and all must be accounted for.

    python scripts/soak.py --minutes 20 --json soak.json                       # SmolLM2
    python scripts/soak.py --minutes 20 --random-weights smollm2 --json ...    # its shapes; needs no checkpoint

Starts `jaxllm serve` on loopback, with more users than it has slots. Afterwards no page may be held, no more file
descriptors be open than before, resident memory be flat after the warm-up (the first fifth; each process by itself),
and every request be counted in the metrics.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import string
import sys
import time
from collections import Counter
from typing import Any

from server_under_test import MemoryWatch, Server, add_options, idle, memory_problems, run, total

from jaxllm.serve.http_client import Client

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
ROUTES = ("/v1/completions", "/v1/chat/completions")


def random_request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    path = rng.choice(ROUTES)
    # Words that no request had before, as those of real users: whatever remembers words has to forget some.
    words = ["".join(rng.choices(string.ascii_letters, k=rng.randint(1, 12))) for _ in range(rng.randint(1, 40))]
    prompt = " ".join(words)
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
    leaves_after = rng.choice([None, None, None, 0.05, 0.3, 1.0])
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


async def soak(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Runs the load; what was found, with the list `problems`."""
    client, counts = Client(server.url), Counter[str]()
    for index in range(4):
        await one_request(server.url, random.Random(index), Counter())
    before = await idle(client)
    files = server.files()
    end = time.monotonic() + 60 * args.minutes
    watch = MemoryWatch(server)
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
    memory = watch.summary()
    answered = sum(
        total(after, "jaxllm_http_requests_total", f'handler="{route}"')
        - total(before, "jaxllm_http_requests_total", f'handler="{route}"')
        for route in ROUTES
    )
    tokens = total(after, "jaxllm_generation_tokens_total") - total(before, "jaxllm_generation_tokens_total")
    left = server.files() - files
    held = total(after, "jaxllm_kv_cache_usage_perc"), total(after, "jaxllm_num_requests_running")
    problems = memory_problems(memory)
    if answered != counts["sent"]:
        problems.append(f"{counts['sent']} requests were sent and {answered:.0f} counted")
    if any(held):
        problems.append("pages or sequences are still held")
    if left > 2:
        problems.append(f"{left} more files are open than before")
    problems += [f"{count} x {what}" for what, count in counts.items() if what.startswith(("status 5", "broken"))]
    return {
        "minutes": args.minutes, "users": args.users, "batch": args.batch,
        "requests": dict(counts), "requests_counted": answered, "tokens": tokens, "kv_usage_after": held[0],
        "running_after": held[1], "tokens_per_second": tokens / 60 / args.minutes, "files_before": files,
        "files_more_after": left, "memory": memory, "problems": problems,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--minutes", type=float, default=20, help="(default: %(default)s)")
    parser.add_argument("--users", type=int, default=24, help="at a time (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="slots of the server (default: %(default)s)")
    args = parser.parse_args()
    config = {
        "kv_cache_config": {"max_tokens": 2048 * args.batch}, "max_batch_size": args.batch, "max_num_tokens": 512,
        "batch_buckets": [args.batch], "max_seq_len": 2048, "log_level": "error", "progress": False,
    }  # fmt: skip
    return run(args, config, soak)


if __name__ == "__main__":
    sys.exit(main())
