"""What the emulator offers to kernels a GPU has, too: no kernel passes tests by a name that is only theirs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jaxllm.kernels.cuda import rtc

EMULATOR = Path(__file__).parent / "emulator"
NAMES = sorted(path.name for path in EMULATOR.glob("*_on_cpu.h"))
FUNCTION = re.compile(r"^(?:inline|DEVICE) [\w:<>*& ]*?(\w+)\(", re.MULTILINE)
OTHERS = re.compile(r"__\w+|make_\w+|rsqrtf|named_barrier")
"""What the compiler brings, and what the emulator's own headers share."""


@pytest.mark.parametrize("name", NAMES)
def test_a_gpu_has_every_function_of_the_emulator(name: str) -> None:
    whole = (EMULATOR / name).read_text()
    for_kernels = re.sub(r"^namespace emulator \{.*?^\}  // namespace", "", whole, flags=re.MULTILINE | re.DOTALL)
    headers = "\n".join(path.read_text() for path in sorted(rtc.SOURCES.glob("*.cuh")))
    on_gpu = set(re.findall(r"\bDEVICE [\w:<>*& ]*?(\w+)\(", headers))
    offered = {function for function in FUNCTION.findall(for_kernels) if not OTHERS.fullmatch(function)}
    assert offered and not offered - on_gpu
