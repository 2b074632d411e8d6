"""The settings of mixtures of experts."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from jaxllm.settings import Strict, load_yaml, one_of

MOE_BACKENDS = ("AUTO", "XLA")
MOE_BACKENDS_ELSEWHERE = (
    "CUTEDSL", "CUTLASS", "DEEPGEMM", "DENSEGEMM", "MARLIN", "MEGAMOE_CUTEDSL", "MEGAMOE_DEEPGEMM", "TRITON", "TRTLLM",
    "VANILLA", "WIDEEP",
)  # fmt: skip


class MoeLoadBalancerConfig(Strict):
    """Which experts are where, as TensorRT-LLM's load balancer has it; in YAML or JSON, or as a file of that.

    Attributes:
        num_slots: places for experts in a layer, on all devices together; more than there are experts make room for
            copies of those with the most tokens. None = as many as the assignments have, or as there are experts.
        initial_global_assignments: of a layer by its number, the expert of each slot; other layers have the experts in
            order, and the first ones once more in the slots that are left.
        layer_updates_per_iter: layers whose experts move after a step, to where the load of the last steps wants them;
            0 = none ever do.
        iters_per_reading: steps between two readings of the load.
    """

    num_slots: int | None = Field(default=None, ge=1)
    initial_global_assignments: dict[int, list[int]] | None = None
    layer_updates_per_iter: int = Field(default=0, ge=0)
    iters_per_reading: int = Field(default=128, ge=1)

    @field_validator("initial_global_assignments", mode="before")
    @classmethod
    def _layers_by_number(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        bad = [key for key in value if not isinstance(key, int) and not (isinstance(key, str) and key.isdigit())]
        if bad:
            raise ValueError(f"initial_global_assignments names layer {bad[0]!r}, which is no number")
        return {int(key): slots for key, slots in value.items()}  # JSON has no other keys than strings


class MoeConfig(Strict):
    """How mixtures of experts are computed.

    Attributes:
        backend: of the experts' products: AUTO takes the fastest that this device has; XLA runs everywhere. The names
            that TensorRT-LLM has (CUTLASS, TRTLLM, ...) mean AUTO.
        dispatch: how tokens come to experts on other devices: "replicate" (every device has all tokens, and the sums
            are added up), "all_to_all" (tokens are sent to their experts, in rounds of messages of a fixed size),
            "ragged" (the same in messages as long as they need to be), or "auto": of the first two, for each size of
            step, the one that a reckoning of bytes and latency finds faster.
        exchange_from: with "auto", tokens of a device from which they are sent, in place of the reckoning.
        max_num_tokens: tokens of all devices that the experts of a layer work on at a time, which bounds their memory;
            more go in turns. None = all of a step.
        load_balancer: a `MoeLoadBalancerConfig`, or a file of its settings in YAML or JSON; None = each expert is in
            one place, in order.
        disable_finalize_fusion: without effect: the results of a token's experts are always added in one order.
    """

    backend: str = "AUTO"
    dispatch: Literal["auto", "replicate", "all_to_all", "ragged"] = "auto"
    exchange_from: int | None = Field(default=None, ge=1)
    max_num_tokens: int | None = Field(default=None, ge=1)
    load_balancer: MoeLoadBalancerConfig | None = None
    disable_finalize_fusion: bool = False

    @field_validator("load_balancer", mode="before")
    @classmethod
    def _from_file(cls, value: Any) -> Any:
        return load_yaml(value) if isinstance(value, (str, os.PathLike)) else value

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str) -> str:
        if value.upper() not in (*MOE_BACKENDS, *MOE_BACKENDS_ELSEWHERE):
            near = difflib.get_close_matches(value.upper(), (*MOE_BACKENDS, *MOE_BACKENDS_ELSEWHERE), n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use {one_of(MOE_BACKENDS)}"
            raise ValueError(f"moe_config.backend = {value!r} is unknown; {hint}")
        return value.upper()

    @model_validator(mode="after")
    def _exchange_when(self) -> MoeConfig:
        if self.exchange_from is not None and self.dispatch != "auto":
            raise ValueError(
                f"moe_config.exchange_from = {self.exchange_from} has no meaning with dispatch = {self.dispatch!r}; "
                "leave one of them out"
            )
        return self

    @property
    def alias(self) -> str | None:
        """The backend, if it is one of another engine's."""
        return None if self.backend in MOE_BACKENDS else self.backend

    @property
    def method(self) -> Literal["replicate", "all_to_all", "ragged"] | None:
        """The dispatch; None for auto."""
        return None if self.dispatch == "auto" else self.dispatch
