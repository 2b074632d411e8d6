"""Which matrices of a model are kept quantised, and how."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from jaxllm.formats import Format

HEAD = "lm_head.weight"
GROUP = 128
"""Inputs that share a scale in 4 bits, unless a checkpoint says otherwise."""
ONLINE = {"fp8": Format("fp8"), "int8": Format("int8"), "int4": Format("int4", group=GROUP)}
"""What a plain checkpoint can be quantised to while it is loaded."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """format: of the matrices of attention, MLPs and experts. head: whether that of the output is among them.

    ignored: regular expressions of modules that are not. cache: the checkpoint was made for keys and values in e4m3.
    """

    format: Format
    head: bool = False
    ignored: tuple[str, ...] = ()
    cache: bool = False

    def applies(self, names: Iterable[str]) -> bool:
        """Whether a parameter that is made of these tensors is quantised."""
        modules = [name.removesuffix(".weight") for name in names]
        if not self.head and HEAD.removesuffix(".weight") in modules:
            return False
        return not any(re.fullmatch(pattern, module) for pattern in self.ignored for module in modules)


def choose(found: Quantization | None, wanted: str | None, *, head: bool, widen: bool) -> Quantization | None:
    """What a model is kept in.

    Args:
        found: what its checkpoint is in; None: plain numbers.
        wanted: a key of `ONLINE`; None: as the checkpoint is.
        head: whether that is for the output matrix, too.
        widen: keep nothing quantised.

    Raises:
        ValueError: the checkpoint is in another format.
    """
    if found is not None and wanted is not None and found.format.kind != wanted:
        raise ValueError(
            f"quantization = {wanted!r}, but the checkpoint's weights are {found.format.kind} already; leave it out"
        )
    if wanted is not None and widen:
        raise ValueError(f"quantization = {wanted!r} contradicts dequantize_weights = True; leave one of them out")
    if widen:
        return None
    if found is None and wanted is not None:
        found = Quantization(ONLINE[wanted])
    return found if found is None or not head else replace(found, head=True)
