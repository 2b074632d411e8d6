"""What XLA makes of the step: the collectives that were written and no others, and pages updated in place."""

from __future__ import annotations

import re
from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.engine.batch import BatchShape
from jaxllm.engine.buckets import Bucket
from jaxllm.engine.forward import KV_AXES, StepFunctions
from jaxllm.mapping import Mapping
from jaxllm.models.config import ModelConfig
from jaxllm.models.registry import config_from_hf
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh
from jaxllm.weights.resolve import resolve_model
from tests.tiny_llm import MODEL

pytestmark = pytest.mark.quick

PAGES, PAGE = 37, 4
BUCKETS = [Bucket(4, 0), Bucket(4, 2), Bucket(0, 2)]
COLLECTIVES = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast"


def config() -> ModelConfig:
    found = resolve_model(MODEL).config
    assert found is not None
    return config_from_hf(found)


@cache
def compiled(tp: int, bucket: Bucket) -> tuple[str, tuple[int, ...], int]:
    """HLO text of the compiled step, the shape of one rank's share of a page pool, and the number of pools."""
    cfg, mesh = config(), make_mesh(Mapping(tp=tp))
    functions = StepFunctions(cfg, Layout(Mapping(tp=tp), np.dtype(np.float32)), mesh)
    layout = functions.layout
    shape = (PAGES * layout.size("pages"), *functions.kv_shape(PAGE))
    pool = jax.ShapeDtypeStruct(shape, np.float32, sharding=layout.sharding(mesh, *KV_AXES))
    everywhere = NamedSharding(mesh, PartitionSpec())
    batch = BatchShape(bucket, 8, 16)
    last_token = jax.ShapeDtypeStruct((5,), np.int32, sharding=everywhere)
    packed = jax.ShapeDtypeStruct(batch.shape, np.int32, sharding=everywhere)
    step = jax.jit(functions.forward(batch), donate_argnums=(1, 2))
    program = step.lower(functions.abstract_weights(), [pool] * cfg.num_layers, last_token, packed).compile()
    return program.as_text(), (PAGES, 2, shape[2] // tp, *shape[3:]), cfg.num_layers


def operations(text: str, names: str) -> list[str]:
    """The instructions of these kinds; asynchronous ones count once."""
    return re.findall(rf"= [^=]*? ((?:{names})(?:-start)?)\(", text)


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_collectives(tp: int, bucket: Bucket) -> None:
    found = [name.removesuffix("-start") for name in operations(compiled(tp, bucket)[0], COLLECTIVES)]
    layers = config().num_layers
    # two per layer (attention, MLP) and the embedding; greedy gathers the best logit and its token of each rank
    reduces, gathers = (2 * layers + 1, 2) if tp > 1 else (0, 0)
    assert found.count("all-reduce") == reduces
    assert found.count("all-gather") <= gathers  # XLA may send both in one
    assert (found.count("all-gather") > 0) == (tp > 1)
    assert len(found) == found.count("all-reduce") + found.count("all-gather")


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
@pytest.mark.parametrize("tp", [1, 2])
def test_pools_are_updated_in_place(tp: int, bucket: Bucket) -> None:
    text, pool, count = compiled(tp, bucket)
    size = "f32\\[" + ",".join(map(str, pool)) + "\\]"
    assert re.search(size, text), "the pools have this shape"
    assert not re.findall(rf"= {size}\S* (?:copy|copy-start|transpose)\(", text)
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text) or re.search(r"input_output_alias=\{(.*)", text)
    assert aliases is not None
    # every pool, and last_token
    assert len(re.findall(r"(?:may|must)-alias", aliases.group(1))) == count + 1


def test_the_search_finds_what_it_looks_for() -> None:
    text = "  %x = f32[37,1,4,16]{3,2,1,0} copy(%y)\n  ROOT %r = (f32[4]{0}, f32[4]{0}) all-reduce-start(%a, %b)"
    assert operations(text, "copy|all-reduce") == ["copy", "all-reduce-start"]
