#!/usr/bin/env python
"""Checks and times the CUDA kernels on one H100 or H200, next to what XLA makes of the same work.

    python scripts/bench_kernels.py                            # everything, under 4 minutes
    python scripts/bench_kernels.py --only decode --json FILE  # one family of rows

A row that fails is an entry with its error. The file is written after every row.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
FAMILIES = tuple(sorted(path.stem for path in (Path(__file__).parent / "kernel_rows").glob("[a-z]*.py")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(FAMILIES), help=f"families of rows: {','.join(FAMILIES)}")
    parser.add_argument("--rows", default="", help="only rows whose names contain this")
    parser.add_argument("--json", type=Path, default=Path("kernels.json"), help="where the results go")
    parser.add_argument("--seconds", type=float, default=240, help="no row begins later than this")
    args = parser.parse_args()
    unknown = set(args.only.split(",")) - set(FAMILIES)
    if unknown:
        parser.error(f"no family {', '.join(sorted(unknown))}; there are {', '.join(FAMILIES)}")

    import jax

    from jaxllm.kernels.cuda import call

    try:
        call.require("bench")
    except NotImplementedError as reason:
        print(f"needs a GPU of compute capability {call.CAPABILITY} and NVRTC: {reason}", file=sys.stderr)
        return 2
    began = time.perf_counter()
    results: list[dict[str, Any]] = []
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}", flush=True)
    for family in args.only.split(","):
        for row in importlib.import_module(f"kernel_rows.{family}").rows():
            if args.rows not in row.name:
                continue
            started = time.perf_counter()
            try:
                if started - began > args.seconds:
                    raise TimeoutError(f"{args.seconds:.0f} s are over")
                found = row.run()
            except Exception as error:  # the other rows go on
                found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
            took = time.perf_counter() - started
            results.append({"family": family, "row": row.name, **found, "row_seconds": round(took, 1)})
            args.json.write_text(json.dumps(results, indent=1))
            shown = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in found.items()}
            print(f"{family:8} {row.name:44} {'  '.join(f'{k} {v}' for k, v in shown.items())}", flush=True)
    return int(any("error" in result or result.get("wrong") for result in results))


if __name__ == "__main__":
    raise SystemExit(main())
