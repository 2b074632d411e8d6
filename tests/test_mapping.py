"""The layout that parallel sizes stand for: both readings of tp x ep, what contradicts, and the order of ranks."""

from __future__ import annotations

import logging
import math

import pytest

from jaxllm.mapping import CpType, Mapping, StarConfig, nearest_layouts
from jaxllm.models.config import ModelConfig
from jaxllm.models.fit import check_mapping, head_ranks

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("devices", "sizes", "shape"),
    [
        (1, {}, (1, 1, 1, 1)),
        (8, {"tp": 4}, (1, 1, 1, 4)),  # fewer than there are
        (8, {"tp": 4, "pp": 2}, (2, 1, 1, 4)),
        (8, {"tp": 2, "ep": 4}, (1, 1, 4, 2)),  # the page's Mixtral: tp x ep devices
        (16, {"tp": 16, "ep": 4}, (1, 1, 4, 4)),  # the page's DeepSeek-V3: ep is a part of tp
        (64, {"tp": 16, "ep": 4}, (1, 1, 4, 16)),  # the first reading, because the devices are there
        (None, {"tp": 16, "ep": 4}, (1, 1, 4, 16)),
        (63, {"tp": 16, "ep": 4}, (1, 1, 4, 4)),
        (64, {"tp": 16, "ep": 4, "moe_tp": 4}, (1, 1, 4, 4)),  # moe_tp decides
        (64, {"tp": 16, "ep": 4, "moe_tp": 16}, (1, 1, 4, 16)),
        (64, {"tp": 16, "moe_tp": 4}, (1, 1, 4, 4)),  # TensorRT-LLM derives ep
        (16, {"tp": 16, "moe_tp": 16}, (1, 1, 1, 16)),
        (8, {"tp": 8, "ep": -1, "moe_tp": -1}, (1, 1, 1, 8)),
        (8, {"tp": 2, "ep": 2, "pp": 2, "cp": 2}, (2, 2, 2, 1)),
        (16, {"tp": 2, "ep": 2, "pp": 2, "cp": 2}, (2, 2, 2, 2)),
    ],
)
def test_sizes(devices, sizes, shape):
    mapping = Mapping.resolve(devices, **sizes)
    assert mapping.shape == shape and mapping.world_size == math.prod(shape)


def test_the_log_says_how_tp_and_ep_were_read(caplog):
    with caplog.at_level(logging.INFO, logger="jaxllm.mapping"):
        Mapping.resolve(8, tp=2)
        assert not caplog.messages
        Mapping.resolve(8, tp=2, ep=4)
        Mapping.resolve(16, tp=16, ep=4)
    first, second = caplog.messages
    assert "2 and moe_expert_parallel_size 4 are read as tp x ep x pp x cp = 8 devices" in first
    assert "tp x pp x cp = 16 devices, expert groups being a part of tp" in second


@pytest.mark.parametrize(
    ("devices", "sizes", "parts"),
    [
        (4, {"tp": 8}, ("the layout tp=8 needs 8 devices, but only 4 cpu device(s)", "what fits: tp=4", "DEVICES=8")),
        (
            4,
            {"tp": 8, "ep": 4},
            ("needs 32 devices (tp x ep x pp x cp), or 8 with the expert groups a part", "only 4", "ep=2 tp=2"),
        ),
        (
            4,
            {"tp": 2, "ep": 4},
            ("needs 8 devices", "or 2 with", "ep=4 does not allow because it does not divide tp=2"),
        ),
        (4, {"tp": 2, "pp": 4}, ("pp=4 x tp=2 needs 8", "what fits: pp=4; pp=2 tp=2; tp=4)")),
        (3, {"cp": 4}, ("cp=4 needs 4 devices", "what fits: cp=3")),
        (1, {"tp": 2, "cp": 2}, ("what fits: tp=1)",)),
        (8, {"tp": 0}, ("tensor_parallel_size = 0 must be an integer of at least 1",)),
        (8, {"pp": True}, ("pipeline_parallel_size = True",)),
        (8, {"cp": 2.0}, ("context_parallel_size = 2.0",)),
        (8, {"ep": -2}, ("moe_expert_parallel_size = -2",)),
        (8, {"tp": 8, "ep": 2, "moe_tp": 3}, ("contradicts", "or use 8 (for 16 devices) or 4 (for 8 devices)")),
        (8, {"pp": 2, "pp_partition": [1]}, ("has 1 stages",)),
        (8, {"star": StarConfig(4, 4)}, ("cp_type is None",)),
        (8, {"cp_type": CpType.STAR}, ("give a StarConfig",)),
    ],
)
def test_refused_in_one_line(devices, sizes, parts):
    with pytest.raises(ValueError) as caught:
        Mapping.resolve(devices, platform="cpu", **sizes)
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert part in text, text


def test_the_kind_of_context_parallelism():
    assert Mapping.resolve(4, cp=4).cp_type is CpType.ULYSSES
    assert Mapping.resolve(4, cp=4, cp_type=CpType.RING).cp_type is CpType.RING
    assert Mapping.resolve(4, cp_type=CpType.RING).cp_type is None  # nothing to split
    star = StarConfig(64, 8)
    assert Mapping.resolve(4, cp_type=CpType.STAR, star=star) == Mapping(cp_type=CpType.STAR, star=star)


def test_context_parallelism_needs_a_kind():
    with pytest.raises(ValueError, match=r"cp = 2 without a cp_type.*ULYSSES"):
        Mapping(cp=2)


def test_ranks_are_numbered_with_tp_fastest():
    mapping = Mapping(tp=2, ep=3, cp=2, pp=2, cp_type=CpType.RING)
    every = [mapping.coordinates(rank) for rank in range(mapping.world_size)]
    assert every == sorted(every) and len(set(every)) == 24
    assert every[:4] == [(0, 0, 0, 0), (0, 0, 0, 1), (0, 0, 1, 0), (0, 0, 1, 1)]
    assert every[6] == (0, 1, 0, 0) and every[12] == (1, 0, 0, 0)


def test_layers_of_the_stages():
    assert Mapping().stage_layers(5) == [range(5)]
    assert Mapping(pp=4).stage_layers(10) == [range(3), range(3, 6), range(6, 8), range(8, 10)]
    assert Mapping(pp=2, pp_partition=(1, 4)).stage_layers(5) == [range(1), range(1, 5)]
    with pytest.raises(ValueError, match=r"pp_partition = \[1, 4\] has 5 layers, but the model has 6"):
        Mapping(pp=2, pp_partition=(1, 4)).stage_layers(6)
    with pytest.raises(ValueError, match=r"pipeline_parallel_size = 4 is more than the model's 3 layers.*at most 3"):
        Mapping(pp=4).stage_layers(3)


def test_nearest_layouts_use_every_device():
    found = nearest_layouts(8, {"pp": 2, "cp": 1, "ep": 1, "tp": 8})
    assert [mapping.shape for mapping in found[:2]] == [(2, 1, 1, 4), (1, 1, 1, 8)]
    assert all(mapping.world_size == 8 and mapping.cp == 1 for mapping in found)


MODEL = ModelConfig("llama", 100, 64, 128, num_layers=5, num_heads=6, num_kv_heads=2, head_dim=16, max_position=256)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        (Mapping(pp=6), "at most 5"),
        (Mapping(pp=2, pp_partition=(2, 2)), "has 4 layers, but the model has 5"),
        (Mapping(tp=4, ep=2), "8 tensor-parallel ranks are more than the model's 6 attention heads"),
        (Mapping(tp=4, cp=2, cp_type=CpType.ULYSSES), "8 tensor-parallel ranks"),
        (
            Mapping(cp=16, cp_type=CpType.RING),
            "context_parallel_size = 16 with pages of 32 tokens needs a context of a",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_model(mapping, message):
    with pytest.raises(ValueError) as caught:
        check_mapping(mapping, MODEL, page_size=32)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_layouts_that_fit_the_model():
    fits = (
        Mapping(pp=5),
        Mapping(tp=6),
        Mapping(tp=8, attention_dp=True),
        Mapping(tp=4, cp=2, cp_type=CpType.RING),
        Mapping(cp=8, cp_type=CpType.HELIX),
    )
    for mapping in fits:
        check_mapping(mapping, MODEL, page_size=32)
    with pytest.raises(ValueError, match="the longest sequence has 128; use at most 4"):
        check_mapping(fits[-1], MODEL, page_size=32, max_seq_len=128)
    assert head_ranks(Mapping(tp=4, cp=2, cp_type=CpType.ULYSSES)) == 8
