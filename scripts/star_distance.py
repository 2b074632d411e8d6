#!/usr/bin/env python
"""How far star attention is from exact attention, by the size of its blocks.

Star attention (`cp_config={"cp_type": "STAR", ...}`) is approximate by design: tokens of the context see the anchor and
their own block only. This runs the same prompts with both kinds on one device (more devices give the same star
attention, faster) and compares what follows them: the distribution of the next token, and the greedy continuation.

    python scripts/star_distance.py smollm2-135m --context 2048 --blocks 256,512,1024
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxllm import LLM, SamplingParams
from jaxllm.bench.report import machine
from jaxllm.engine.tokenizer import load_tokenizer
from jaxllm.mapping import CpType
from jaxllm.weights.resolve import resolve_model

TOP = 20


@dataclass(frozen=True)
class Answer:
    """What follows a prompt: greedy tokens, and the log probabilities of the TOP most likely first ones."""

    tokens: list[int]
    first: dict[int, float]


def answers(model: str, prompts: list[list[int]], length: int, **settings: Any) -> list[Answer]:
    count, longest = len(prompts), max(map(len, prompts))
    sizes = {"max_batch_size": count, "batch_buckets": [count], "max_num_tokens": 256, "token_buckets": [256]}
    with LLM(model, max_seq_len=longest + length, progress=False, **sizes, **settings) as llm:
        params = SamplingParams(max_tokens=length, ignore_eos=True, logprobs=TOP)
        outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
    return [
        Answer(out.token_ids, {token: found.logprob for token, found in out.logprobs[0].items()}) for out in outputs
    ]


def compare(exact: Answer, star: Answer) -> tuple[float, float, int]:
    """Total variation of the next token's distribution over exact's TOP tokens (a lower bound of the whole), the
    change of the most likely token's log probability, and how many tokens the continuations agree in."""
    floor = min(star.first.values())
    changes = [abs(math.exp(p) - math.exp(star.first.get(token, floor))) for token, p in exact.first.items()]
    best = max(exact.first, key=exact.first.__getitem__)
    same = [a == b for a, b in zip(exact.tokens, star.tokens, strict=True)]
    agree = same.index(False) if False in same else len(same)
    return sum(changes) / 2, abs(exact.first[best] - star.first.get(best, floor)), agree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--text", type=Path, help="what the prompts are cut from (default: Python's argparse)")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--prompts", type=int, default=4, help="how many (default: %(default)s)")
    parser.add_argument(
        "--blocks", default="128,256,512", help="block sizes; anchors are as long (default: %(default)s)"
    )
    parser.add_argument("--length", type=int, default=16, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and the machine here")
    args = parser.parse_args()

    text = args.text.read_text(encoding="utf-8") if args.text else inspect.getsource(argparse)
    tokens = load_tokenizer(resolve_model(args.model)).encode(text, add_special_tokens=False)
    starts = [i * (len(tokens) - args.context) // max(1, args.prompts - 1) for i in range(args.prompts)]
    if len(tokens) < args.context:
        parser.error(f"the text has {len(tokens)} tokens, fewer than --context {args.context}")
    prompts = [tokens[start : start + args.context] for start in starts]

    exact = answers(args.model, prompts, args.length)
    rows: list[dict[str, float]] = []
    print(f"{args.model}, {args.prompts} prompts of {args.context} tokens, {args.length} generated; means")
    print("block   total variation   |d logprob| of the best   same first token   equal leading tokens")
    for block in map(int, args.blocks.split(",")):
        config = {"cp_type": CpType.STAR, "block_size": block, "cp_anchor_size": block}
        star = answers(args.model, prompts, args.length, cp_config=config)
        found = [compare(*pair) for pair in zip(exact, star, strict=True)]
        n = len(found)
        variation, change, agree = (sum(column) / n for column in zip(*found, strict=True))
        first = sum(f[2] > 0 for f in found) / n
        print(f"{block:5}   {variation:15.4f}   {change:23.4f}   {first:15.0%}   {agree:14.1f} of {args.length}")
        rows.append(
            {
                "block_size": block,
                "total_variation": variation,
                "best_logprob_change": change,
                "same_first_token": first,
                "equal_leading_tokens": agree,
            }
        )
    if args.json:
        settings = {name: getattr(args, name) for name in ("model", "context", "prompts", "length")}
        settings["text"] = args.text.name if args.text else "Python's argparse.py"
        args.json.write_text(json.dumps({"machine": machine(), "settings": settings, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
