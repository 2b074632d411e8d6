#!/usr/bin/env python
"""What quantisation costs in accuracy: KL divergence and agreement of the likeliest token, against the model as it was.

    python scripts/quantization_cost.py                          # SmolLM2 on a CPU, about two minutes
    python scripts/quantization_cost.py --dummy --workers 5 Llama-3.1-8B     # random weights of these shapes on a GPU
    python scripts/quantization_cost.py --json cost.json

On a GPU, and with `--dummy`, the reference is the model in bfloat16; on a CPU in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np

from jaxllm.bench.accuracy import Kind, costs
from jaxllm.bench.report import aligned, machine

CPU_KINDS = (
    Kind("bfloat16", dtype="bfloat16"),
    Kind("fp8 weights", "fp8"),
    Kind("fp8 weights and activations", "fp8", dtype="bfloat16"),
    Kind("int8 weights", "int8"),
    Kind("int4 weights, groups of 128", "int4"),
    Kind("fp8 keys and values", cache="fp8"),
    Kind("fp8 weights, keys and values", "fp8", cache="fp8"),
)
GPU_KINDS = (
    Kind("fp8 weights and activations", "fp8", dtype="bfloat16"),
    Kind("the same, output matrix too", "fp8", dtype="bfloat16", lm_head=True),
    Kind("fp8 keys and values", dtype="bfloat16", cache="fp8"),
    Kind("fp8 weights, activations, keys and values", "fp8", dtype="bfloat16", cache="fp8"),
)
TEXT = """\
The tide tables of the harbour were printed every winter by a small press behind the fish market. Each page listed \
the hours of high and low water for one month, with the height of the tide in feet and the age of the moon in days. \
Sailors bought them for a few coins and kept them in oilcloth, because a wet table is of no use to anybody. When the \
lighthouse was built on the northern rocks, the press added a line about its lamp: two short flashes, then a long \
one, every fifteen seconds. Old captains complained that the line made the pages crowded, but nobody took it out \
again.

To make a simple bread you need flour, water, salt and a little yeast. Mix the flour and the salt in a large bowl. \
Dissolve the yeast in warm water, pour it into the bowl, and stir until there is no dry flour left. Cover the dough \
with a towel and let it rest for twelve hours. The next day, shape it into a ball, let it rise once more for an \
hour, and bake it in a very hot oven for about forty minutes. The bread is done when the crust is dark and the loaf \
sounds hollow when you knock on its bottom. Let it cool before you cut it.

A triangle whose sides are three, four and five units long has a right angle, because nine and sixteen add up to \
twenty-five. The same is true of every triangle whose sides are multiples of these numbers, such as six, eight and \
ten. There are many other triples of whole numbers with this property, and a simple rule finds all of them. Take two \
whole numbers, one larger than the other. The difference of their squares, twice their product, and the sum of their \
squares are the sides of a right triangle. For two and one this gives three, four and five again.

The first railway through the valley was laid by four hundred workers in two summers. They cut a ledge into the \
hillside, carried the stone away in carts, and built nine bridges of timber over the river and the streams that run \
into it. In the second spring a flood took three of the bridges, and the engineer, who had warned the owners, was \
asked to build them again in iron. Trains went up the valley with coal and came down with wood and wool. After sixty \
years the line was closed, and today people walk along it on Sundays without knowing why the path is so level.

A queue is a list of things that are waiting. New things are added at one end, and the oldest thing is taken from \
the other, so that everything is served in the order in which it came. A stack is the opposite: the thing that was \
added last is taken first, like plates in a cupboard. Computers use both all the time. A printer keeps its jobs in a \
queue, while a program that calls a function puts the place to return to on a stack. If a function calls itself too \
often, the stack grows until there is no memory left for it, and the program is stopped.

In autumn the swallows gather on the wires above the village. For a week or two there are more of them every \
morning, and they make so much noise that the dogs give up barking. Then, on a clear day with wind from the north, \
they are gone. They fly over the mountains and the sea, and spend the winter in a country where nobody in the \
village has ever been. In April they come back to the same barns and repair the nests that they left, and the \
children who see the first one run home to tell everybody that the summer is on its way.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2-135m", help="a model (default: %(default)s)")
    parser.add_argument("--dummy", action="store_true", help="random weights; the model is one that `plan` knows")
    parser.add_argument("--kinds", default="", help="only those whose names have one of these, separated by commas")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=256, help="positions of a step (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=1, help="models in memory at a time (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()

    wide = args.dummy or jax.devices()[0].platform != "cpu"
    reference = Kind("bfloat16" if wide else "float32", dtype="bfloat16" if wide else "float32")
    names = [name.strip() for name in args.kinds.split(",")]
    kinds = [kind for kind in (GPU_KINDS if wide else CPU_KINDS) if any(name in kind.name for name in names)]
    with tempfile.TemporaryDirectory(prefix="jaxllm-model-") as directory:
        model = args.model
        if args.dummy:
            config = (files("jaxllm.plan") / "models" / f"{args.model}.json").read_text(encoding="utf-8")
            (Path(directory) / "config.json").write_text(config, encoding="utf-8")
            model = directory
            ids = np.random.default_rng(0).integers(3, json.loads(config)["vocab_size"], 2 * args.rows)
        else:
            from jaxllm.engine.tokenizer import load_tokenizer
            from jaxllm.weights.resolve import resolve_model

            ids = np.asarray(load_tokenizer(resolve_model(model)).encode(TEXT))
        texts = ids[: len(ids) // args.length * args.length].reshape(-1, args.length)
        found = costs(model, kinds, texts, reference=reference, rows=args.rows, dummy=args.dummy, workers=args.workers)
    rows = [["", "KL, nats", "worst KL", "same token", "perplexity", "weights, MB", "s"]]
    for cost in found:
        size = f"{cost.weight_bytes / 1e6:,.0f}" if cost.weight_bytes else ""
        rows.append(
            [
                cost.kind.name, f"{cost.kl:.5f}", f"{cost.worst_kl:.4f}", f"{100 * cost.agreement:.1f} %",
                f"{cost.perplexity:,.2f}", size, f"{cost.seconds:.1f}",
            ]
        )  # fmt: skip
    positions = texts.size // args.rows * args.rows
    print(f"{args.model}, {positions} positions, against {reference.name}:")
    print("\n".join(aligned(rows)))
    if args.json is not None:
        content = {
            "model": args.model,
            "random_weights": args.dummy,
            "positions": positions,
            "reference": reference.name,
            "machine": machine(),
            "costs": [asdict(cost) for cost in found],
        }
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
