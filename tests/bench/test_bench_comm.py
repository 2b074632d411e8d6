"""`jaxllm bench comm` measures the collective that it names, over the axes that it names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxllm.bench import comm
from jaxllm.bench.comm import AXES, COLLECTIVES, emit, groups, in_words, parse_sizes, run_comm
from jaxllm.cli import main
from jaxllm.config import EngineConfig
from jaxllm.parallel.layout import Layout
from jaxllm.parallel.mesh import make_mesh
from jaxllm.settings import ConfigError

CONFIG = EngineConfig(model="none", tensor_parallel_size=2, moe_expert_parallel_size=2, context_parallel_size=2)


def test_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = run_comm(CONFIG, [64], ["all_reduce", "ppermute"], repeat=1)
    wanted = {(name, axes) for name in ("all_reduce", "ppermute") for axes in ("cp", "ep", "tp")} | {
        ("all_reduce", "ep+tp")
    }
    assert {(row.collective, row.axes) for row in rows} == wanted
    assert {row.ranks for row in rows if row.axes == "ep+tp"} == {4}
    for row in rows:
        share = 1.0 if row.collective == "ppermute" else 2 * (row.ranks - 1) / row.ranks
        assert row.size == 64 and row.bus == pytest.approx(64 * share / (1e-6 * row.microseconds) / 1e9)
    emit(rows, str(tmp_path / "comm.json"))
    assert "GB/s on the bus" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "comm.json").read_text())["rows"]) == len(rows)


@pytest.mark.parametrize("own", [False, True])
def test_sums_of_a_step(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the step itself would use, over the ranks of its weights, each after the other."""
    mesh, used, checked = make_mesh(CONFIG.resolve_mapping(8)), [], []

    def add_up(x, residual, group, ranks, norm):
        used.append((x.shape, ranks))
        total = residual + jax.lax.psum(x, ("ep", "tp"))
        return total, comm.rms_norm(total, norm)

    monkeypatch.setattr(comm, "SUMS", 3)
    monkeypatch.setattr(comm, "all_reduce_few", add_up)
    group = SimpleNamespace(
        array=jnp.zeros((8, 6), jnp.uint32),
        axes=("ep", "tp"),
        spec=PartitionSpec(AXES),
        raise_if_failed=lambda: checked.append(1),
    )
    layout = Layout(CONFIG.resolve_mapping(8), np.dtype(np.float32))
    functions = SimpleNamespace(
        layout=layout, mesh=mesh, group=group if own else None, cfg=SimpleNamespace(hidden_size=8)
    )
    found = comm.sum_seconds(functions, 2, repeat=2)
    assert len(found) == 2 and min(found) > 0
    assert used == ([((2, 8), 4)] * 9 if own else []) and len(checked) == int(own)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_each_step_is_the_collective(name: str) -> None:
    """On numbers that tell ranks apart, against numpy."""
    mesh = make_mesh(CONFIG.resolve_mapping(8))
    axes = ("tp",)
    assert groups(mesh) == [("cp",), ("ep",), ("tp",), ("ep", "tp")]
    x = np.arange(8 * 4, dtype=np.float32).reshape(4, 2, 4)  # pairs of neighbours on tp
    step = jax.shard_map(
        lambda x: COLLECTIVES[name][0](x, axes), mesh=mesh, in_specs=PartitionSpec(AXES), out_specs=PartitionSpec(AXES),
        check_vma=False,
    )  # fmt: skip
    found = np.asarray(jax.jit(step)(jnp.asarray(x.reshape(-1)))).reshape(4, 2, 4)
    a, b = x[:, 0], x[:, 1]
    both, total = np.concatenate([a[:, :2], b[:, 2:]], 1), a + b
    wanted = {
        "all_reduce": (total, total),
        "all_gather": (both, both),
        "reduce_scatter": (np.concatenate([total[:, :2], a[:, 2:]], 1), np.concatenate([total[:, 2:], b[:, 2:]], 1)),
        "all_to_all": (np.concatenate([a[:, :2], b[:, :2]], 1), np.concatenate([a[:, 2:], b[:, 2:]], 1)),
        "ppermute": (b, a),
    }[name]
    np.testing.assert_array_equal(found, np.stack(wanted, 1))


def test_sizes_in_words() -> None:
    assert parse_sizes("64, 8K,1MiB,2G") == [64, 8192, 2**20, 2**31]
    assert [in_words(size) for size in (64, 8192, 3 * 2**19, 2**31)] == ["64 B", "8 KiB", "1.5 MiB", "2 GiB"]
    for text in ("", "K", "1.5M", "0", "8T"):
        with pytest.raises(ConfigError, match="--sizes = "):
            parse_sizes(text)


def test_what_cannot_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "comm"]) != 0
    assert "one device has nobody to talk to" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--collectives = 'gossip' is not known; use all_reduce"):
        run_comm(CONFIG, [64], ["gossip"])
