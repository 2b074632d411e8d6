"""What the scripts that load a server have in common: a model to serve, the server, its processes and metrics."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine
from importlib.resources import files
from pathlib import Path
from typing import Any

from jaxllm.serve.http_client import Client

READY = re.compile(r"serving \S+ at (\S+) ")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # SmolLM2's first three tokens
_SMOLLM2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 100000,
    "max_position_embeddings": 8192, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
}  # fmt: skip
SHAPES = ("smollm2", "tiny", "llama-8b")


def config_of(shape: str) -> dict[str, Any]:
    """config.json of a model of that shape: SmolLM2-135M, its first two layers, or Llama-3.1-8B."""
    if shape == "llama-8b":
        found: dict[str, Any] = json.loads((files("jaxllm.plan") / "models" / "Llama-3.1-8B.json").read_text("utf-8"))
        return found
    return _SMOLLM2 if shape == "smollm2" else {**_SMOLLM2, "num_hidden_layers": 2}


def write_model(directory: Path, shape: str) -> int:
    """A model without weights and a byte-level tokenizer of as many tokens, with a chat template; their number."""
    from jaxllm.engine.tokenizer_gguf import byte_alphabet

    config = config_of(shape)
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    letters = list(byte_alphabet().values())
    words = [*SPECIAL, *letters, *(a + b for a in letters for b in letters)]
    plain = [chr(code) for code in range(97, 123)]
    words += [a + b + c + d for a in plain for b in plain for c in plain for d in plain]
    vocab = {word: index for index, word in enumerate(dict.fromkeys(words[: config["vocab_size"]]))}
    levels = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    added = [
        {"id": index, "content": text, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for index, text in enumerate(SPECIAL)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": []}, "pre_tokenizer": levels,
        "decoder": levels, "added_tokens": added,
    }  # fmt: skip
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "eos_token": SPECIAL[2]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return len(vocab)


class Server:
    """A running `jaxllm serve`, its processes, and what they hold. `started`: seconds until it was ready."""

    def __init__(self, model: str, options: list[str]) -> None:
        command = [sys.executable, "-m", "jaxllm.cli", "serve", model, "--port", "0", *options]
        began = time.perf_counter()
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            if found := READY.search(line):
                self.url = found[1]
                break
        else:
            raise SystemExit("the server did not start")
        self.started = time.perf_counter() - began
        threading.Thread(target=self._relay, daemon=True).start()  # a full pipe would stop the server

    def _relay(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            print(line, end="", file=sys.stderr, flush=True)

    @property
    def pids(self) -> list[int]:
        """The supervisor, the engine, the frontends."""
        pid = self.process.pid
        return [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]

    def files(self) -> int:
        """Open file descriptors of all processes."""
        return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in self.pids)

    def resident(self) -> list[float]:
        """MiB of resident memory of each process."""
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
    """The sum of a metric's samples that have these labels."""
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


def add_options(parser: argparse.ArgumentParser) -> None:
    """Which model to serve and how, and where the results go."""
    parser.add_argument("--model", default="smollm2-135m", help="(default: %(default)s)")
    parser.add_argument("--random-weights", choices=SHAPES, help="serve such a model with random weights instead")
    parser.add_argument("--json", type=Path, help="results")
    parser.add_argument("options", nargs="*", help="more options of jaxllm serve, after --")


def run(
    args: argparse.Namespace,
    config: dict[str, Any],
    load: Callable[[Server, argparse.Namespace], Coroutine[Any, Any, dict[str, Any]]],
) -> int:
    """Starts a server with these settings, loads it, ends it and tells; 1 when the findings' `problems` are some."""
    with tempfile.TemporaryDirectory(prefix="jaxllm-model-") as directory:
        model = args.model
        if args.random_weights:
            model, config = directory, {**config, "load_format": "dummy"}
            write_model(Path(directory), args.random_weights)
        path = Path(directory) / "serve.yml"
        path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
        server = Server(model, ["--config", str(path), *args.options])
        try:
            found = asyncio.run(load(server, args))
        finally:
            code = server.end()
    if code:
        found["problems"].append(f"the server ended with {code}")
    content = {"command": sys.argv, "cpus": os.cpu_count(), **found}
    if args.json is not None:
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content))
    for problem in found["problems"]:
        print(f"wrong: {problem}")
    print("all well" if not found["problems"] else f"{len(found['problems'])} things are wrong")
    return int(bool(found["problems"]))


class MemoryWatch:
    """Resident memory of a server's processes over time, a reading each second while `run` runs."""

    def __init__(self, server: Server) -> None:
        self.server, self.samples = server, list[list[float]]()

    async def run(self) -> None:
        while True:
            self.samples.append(self.server.resident())
            await asyncio.sleep(1.0)

    def summary(self) -> dict[str, Any]:
        """MiB by process: some readings over the time, after the warm-up (a fifth of the time), and the growth since.

        Ends are medians of a tenth of the time each.
        """
        tenth = max(1, len(self.samples) // 10)
        warm = _medians(self.samples[2 * tenth : 3 * tenth] or self.samples)
        growth = [end - start for start, end in zip(warm, _medians(self.samples[-tenth:]), strict=True)]
        some = self.samples[:: max(1, len(self.samples) // 20)]
        return {
            "processes": ["supervisor", "engine", *("frontend" for _ in warm[2:])],
            "readings_mib": [[round(value, 1) for value in sample] for sample in some],
            "warm_mib": [round(value, 1) for value in warm],
            "growth_mib": [round(value, 2) for value in growth],
        }


def _medians(samples: list[list[float]]) -> list[float]:
    return [sorted(column)[len(column) // 2] for column in zip(*samples, strict=True)]


def memory_problems(summary: dict[str, Any], floor: float = 8.0) -> list[str]:
    """Processes that grew by more than a hundredth (and `floor` MiB) after the warm-up."""
    return [
        f"the {name} grew by {growth:.1f} MiB after the warm-up, from {warm:.1f}"
        for name, warm, growth in zip(summary["processes"], summary["warm_mib"], summary["growth_mib"], strict=True)
        if growth > max(floor, 0.01 * warm)
    ]
