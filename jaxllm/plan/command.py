"""`jaxllm plan`: what a model on a layout takes and how fast it could be, from its config.json alone."""

from __future__ import annotations

import argparse
import json

from jaxllm.options import Parser, add_engine_options, engine_config, positive

EXAMPLES = """\
Reads a config.json (or the metadata of a GGUF file) and nothing else: no weights, no GPU. Names such as
Llama-3.1-8B, Llama-3.1-70B, Llama-3.1-405B, Mixtral-8x7B and DeepSeek-V3 are known without a file. The exit code is 1
when the layout does not fit, 2 when a setting is wrong on any layout.

examples:
  jaxllm plan Llama-3.1-70B --tp 4 --max-batch-size 128
  jaxllm plan Llama-3.1-405B --tp 4 --pp 2 --gpu h200
  jaxllm plan ./my-model --tp 2 --cp 4 --cp-type ring --memory 80 --json
  jaxllm plan Llama-3.1-70B --tp 4 --compile                # minutes; needs the CUDA plugin, no GPU
  jaxllm plan DeepSeek-V3 --tp-size 16 --ep-size 4 --devices 16
"""
NOT_FITTING = 1


def fill_parser(parser: Parser) -> None:
    parser.usage = "%(prog)s MODEL [options]"
    parser.add_argument(
        "model", metavar="MODEL", help="directory, config.json, .gguf file, hub id, or a name such as Llama-3.1-70B"
    )
    group = parser.add_argument_group("devices and load")
    group.add_argument("--gpu", default="h200", metavar="NAME", help="h100, h200, b200, ... (default: %(default)s)")
    group.add_argument("--memory", type=float, metavar="GIB", help="memory of a device, instead of the GPU's own")
    group.add_argument(
        "--devices", type=positive, metavar="N",
        help="devices there are, which decides how --tp and --ep are read together (default: as many as it takes)",
    )  # fmt: skip
    group.add_argument("--input-len", type=positive, metavar="N", help="prompt tokens to estimate speeds for")
    group.add_argument("--output-len", type=positive, metavar="N", help="generated tokens to estimate speeds for")
    group.add_argument(
        "--compile", action="store_true",
        help="also compile the decode step for these GPUs, which need not be there, and compare it with the plan",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the plan as JSON")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the plan; 0 when it fits and, with --compile, the compiled program takes what it says."""
    from jaxllm.plan import compile as compiler

    if args.compile:
        compiler.prepare()
    from jaxllm.plan.find import find_model
    from jaxllm.plan.gpus import find_gpu
    from jaxllm.plan.plan import make_plan
    from jaxllm.plan.report import as_json, text
    from jaxllm.plan.roofline import Load

    config = engine_config(args)
    gpu = find_gpu(args.gpu, args.memory)
    mapping = config.resolve_mapping(args.devices, gpu.name)
    model = find_model(config.model, quantised=config.dtype == "auto")
    load = None
    if args.input_len or args.output_len:
        load = Load(args.input_len or 1000, args.output_len or 1000)
    plan = make_plan(model, config, mapping, gpu, load)
    compiled = []
    if args.compile and plan.ok:
        compiled = compiler.compile_step(plan, compiler.described_devices(gpu.name, mapping.world_size))
    print(json.dumps(as_json(plan, compiled), indent=2) if args.json else text(plan, compiled))
    agree = all(stage.difference <= compiler.TOLERANCE for stage in compiled)
    return 0 if plan.ok and agree else NOT_FITTING
