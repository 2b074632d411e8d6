"""What XLA makes of the step: the collectives that were written and no others, and pages updated in place."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.engine.batch import Packer
from jaxllm.engine.buckets import Bucket
from jaxllm.engine.forward import KV_AXES, StepFunctions
from jaxllm.mapping import CpType, Mapping, StarConfig
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


STAR = StarConfig(block_size=2 * PAGE, anchor_size=PAGE)
LAYOUTS = {
    "one device": Mapping(),
    "tp": Mapping(tp=2),
    "attention DP": Mapping(tp=2, attention_dp=True),
    **{kind.name: Mapping(cp=2, cp_type=kind, star=STAR if kind is CpType.STAR else None) for kind in CpType},
    "tp RING": Mapping(tp=2, cp=3, cp_type=CpType.RING),
    "tp HELIX": Mapping(tp=2, cp=3, cp_type=CpType.HELIX),
    "attention DP ULYSSES": Mapping(tp=2, cp=2, cp_type=CpType.ULYSSES, attention_dp=True),
}


@cache
def compiled(name: str, bucket: Bucket) -> tuple[str, tuple[int, ...], int]:
    """HLO text of the compiled step, the shape of one rank's share of a page pool, and the number of pools."""
    cfg, layout = config(), Layout(LAYOUTS[name], np.dtype(np.float32))
    mesh = make_mesh(layout.mapping)
    functions = StepFunctions(cfg, layout, mesh)
    shape = (PAGES * layout.size("pages"), *functions.kv_shape(PAGE))
    pool = jax.ShapeDtypeStruct(shape, np.float32, sharding=layout.sharding(mesh, *KV_AXES))
    everywhere = NamedSharding(mesh, PartitionSpec())
    packer = Packer(tile=8, width=16, max_batch_size=4, layout=layout, page_size=PAGE)
    batch = packer.shape(bucket)
    last_token = jax.ShapeDtypeStruct((5,), np.int32, sharding=everywhere)
    packed = jax.ShapeDtypeStruct(batch.shape, np.int32, sharding=layout.sharding(mesh, "requests"))
    step = jax.jit(functions.forward(batch), donate_argnums=(1, 2))
    program = step.lower(functions.abstract_weights(), [pool] * cfg.num_layers, last_token, packed).compile()
    return program.as_text(), (PAGES, 2, shape[2] // layout.size("kv_heads"), *shape[3:]), cfg.num_layers


def operations(text: str, names: str) -> list[str]:
    """The instructions of these kinds; asynchronous ones count once."""
    return re.findall(rf"= [^=]*? ((?:{names})(?:-start)?)\(", text)


def expected(name: str, bucket: Bucket) -> Counter[str]:
    """Collectives of a step, one layer's times the layers, then those of a step."""
    layout = Layout(LAYOUTS[name], np.dtype(np.float32))
    decodes, tiles, cp = bucket.decodes > 0, bucket.tiles > 0, layout.mapping.cp
    layer: Counter[str] = Counter()
    step: Counter[str] = Counter()
    wide, heads = layout.size("ffn") > 1, layout.size("head_out") > 1
    if layout.mapping.attention_dp:
        layer += Counter({"all-gather": 1, "reduce-scatter": 1})  # around the FFN
        step += Counter({"all-gather": 3, "reduce-scatter": 1})  # token ids, rows and slots; embedding
    elif wide:
        layer["all-reduce"] += 1
        step["all-reduce"] += 1  # embedding
    if heads:
        layer["all-reduce"] += 1
    if wide:
        step["all-gather"] += 2  # greedy: the best logit of each rank and its token
    if layout.mapping.prompt_parts > 1 and tiles:
        step["all-reduce"] += 1  # rows to sample from
    match layout.cp_type:
        case CpType.HELIX:
            layer["all-to-all"] += 1
        case CpType.ULYSSES:
            layer += Counter({"all-gather": int(decodes), "all-to-all": 2 * tiles})
        case CpType.RING | CpType.STAR:
            layer["all-gather"] += decodes
            # prompts: what only some steps need is inside of a condition
            layer += Counter({"all-gather": int(tiles), "all-to-all": int(tiles)})
            if layout.cp_type is CpType.RING:
                layer["collective-permute"] += (cp - 1) * tiles
            else:
                layer["all-reduce"] += tiles  # the anchors
    layers = config().num_layers
    return Counter({kind: layers * layer[kind] + step[kind] for kind in layer | step}) + Counter()


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives(name: str, bucket: Bucket) -> None:
    if len(jax.devices()) < LAYOUTS[name].world_size:
        pytest.skip(f"needs {LAYOUTS[name].world_size} devices")
    text = compiled(name, bucket)[0]
    found = Counter(kind.removesuffix("-start") for kind in operations(text, COLLECTIVES))
    assert found == expected(name, bucket)
    # greedy needs two numbers of each rank, never the logits
    ranks = Layout(LAYOUTS[name], np.dtype(np.float32)).size("vocab")
    share = -(-config().vocab_size // ranks)
    assert (f"f32[{bucket.rows},{share}]" in text) or LAYOUTS[name].attention_dp, "the logits have this shape"
    for shape in re.findall(r"= \(?\w+\[([\d,]+)\]\S* all-gather", text):
        assert not {share, share * ranks} & set(map(int, shape.split(",")))


@pytest.mark.parametrize("bucket", BUCKETS, ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_pools_are_updated_in_place(name: str, bucket: Bucket) -> None:
    if len(jax.devices()) < LAYOUTS[name].world_size:
        pytest.skip(f"needs {LAYOUTS[name].world_size} devices")
    text, pool, count = compiled(name, bucket)
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
