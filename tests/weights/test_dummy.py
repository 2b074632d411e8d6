from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from jaxllm.mapping import Mapping
from jaxllm.parallel.heads import split_segments
from jaxllm.parallel.mesh import make_mesh
from jaxllm.parallel.params import ParamSpec, Segment
from jaxllm.weights.dummy import dummy_params

TP = ("ep", "tp")
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


def specs(tp: int) -> dict[str, ParamSpec]:
    heads = -(-3 // tp) * tp
    q = [Segment("q" if h < 3 else None, h * 8 % 24, h * 8 % 24 + 8) for h in range(heads)]
    k = [Segment("k", 0, 8)] * tp
    qkv = [s for i in range(tp) for s in (*q[i * heads // tp : (i + 1) * heads // tp], k[i])]
    o = tuple(Segment(s.name and "o", s.start, s.stop) for s in q)
    return {
        "qkv": ParamSpec((sum(s.size for s in qkv), 64), F32, (TP, None), tuple(qkv)),
        "o": ParamSpec((64, heads * 8), BF16, (None, TP), o, axis=1),
        "a.norm": ParamSpec((64,), F32, (None,), (Segment("n", 0, 64),), offset=1.0),
        "qkv_bias": ParamSpec((sum(s.size for s in qkv),), F32, (TP,), tuple(qkv)),
        "other": ParamSpec((24, 64), F32, (TP, None), (Segment("other", 0, 24),)),
    }


def unfused(params: dict[str, object], tp: int) -> dict[str, np.ndarray]:
    """Checkpoint rows back out of a layout."""
    out: dict[str, np.ndarray] = {}
    for path, spec in specs(tp).items():
        value, at = np.moveaxis(np.asarray(params[path]), spec.axis, 0), 0
        for s in spec.segments:
            rows = value[at : at + s.size]
            at += s.size
            if s.name is None:
                assert not rows.any()
            else:
                key = f"{path}/{s.name}/{s.start}"
                assert key not in out or np.array_equal(out[key], rows)  # replicas agree
                out[key] = rows
    return out


def test_same_function_in_every_layout(mesh_of: Callable[[int], Mesh]) -> None:
    one = unfused(dummy_params(specs(1), mesh_of(1), 7), 1)
    for tp in (2, 4, 8):
        other = unfused(dummy_params(specs(tp), mesh_of(tp), 7), tp)
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def test_experts_are_the_same_in_every_layout() -> None:
    found = []
    for ep, tp in ((1, 1), (2, 4)):
        segments = [s for e in range(4) for r in range(tp) for s in split_segments(f"down{e}", 12, tp, r)]
        spec = ParamSpec((4, 8, 12), F32, (("ep",), None, ("tp",)), tuple(segments), axis=2, stacked=True)
        found.append(np.asarray(dummy_params({"down": spec}, make_mesh(Mapping(ep=ep, tp=tp)), 7)["down"]))
    np.testing.assert_array_equal(*found)
    alone = ParamSpec((8, 12), F32, (None, None), (Segment("down2", 0, 12),), axis=1)
    np.testing.assert_array_equal(found[0][2], dummy_params({"x": alone}, make_mesh(Mapping()), 7)["x"])


def test_values(mesh_of: Callable[[int], Mesh]) -> None:
    big = {"w": ParamSpec((512, 1024), F32, (TP, None), (Segment("w", 0, 512),))}
    params = dummy_params({**specs(1), **big}, mesh_of(1), 0)
    assert (np.asarray(params["a.norm"]) == 1).all()
    assert 0 < np.abs(np.asarray(params["qkv_bias"])).max() <= 0.02
    assert params["o"].dtype == BF16
    w = np.asarray(params["w"])
    assert abs(w.mean()) < 1e-3 and abs(w.std() * 32 - 1) < 0.02
    # rows and columns are not correlated
    assert np.abs(np.corrcoef(w[:64])[~np.eye(64, dtype=bool)]).max() < 0.2
    assert np.abs(np.corrcoef(w[:, :64].T)[~np.eye(64, dtype=bool)]).max() < 0.25
    assert len(np.unique(w)) > 0.95 * w.size


def test_seed(mesh_of: Callable[[int], Mesh]) -> None:
    a, b, c = (np.asarray(dummy_params(specs(1), mesh_of(1), s)["other"]) for s in (0, 0, 1))
    assert np.array_equal(a, b) and not np.isclose(a, c).any(axis=1).all()
    q = np.asarray(dummy_params(specs(1), mesh_of(1), 0)["qkv"])
    assert not np.isclose(q[:8], q[24:32]).any()  # the same rows of another tensor differ
