"""The compilation cache that processes share: entries are seen whole or not at all, and a broken one is mended."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxllm.engine.compilation_cache import _say_once, enable_compilation_cache
from jaxllm.settings import ConfigError

pytestmark = pytest.mark.quick


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A compilation cache of its own for a test."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    enable_compilation_cache(str(tmp_path))
    compilation_cache.reset_cache()  # an engine of an earlier test has opened its own
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_again() -> list[str]:
    """Compiles a program as a new process would; returns what JAX warns of."""

    def program(x: jax.Array) -> jax.Array:
        return jnp.sin(x) @ jnp.cos(x) + 17

    jax.clear_caches()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        jax.jit(program).lower(jnp.zeros((3, 3))).compile()
    return [str(warning.message) for warning in seen if "compilation cache" in str(warning.message)]


def entry(folder: Path) -> Path:
    (path,) = folder.glob("jit_program-*-cache")
    return path


def test_an_entry_is_whole_when_it_appears(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    plain = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", lambda self, data: opened.append(self) or plain(self, data))
    assert compile_again() == []
    assert entry(folder).stat().st_size > 0
    assert opened, "nothing was written through pathlib: this test looks at the wrong place"
    assert not [path for path in opened if path.name.endswith("-cache")]  # none is written where readers look
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]  # nor left where it was


def test_an_entry_of_which_half_is_there_is_written_again(folder: Path) -> None:
    compile_again()
    path = entry(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(compile_again()) == 1  # JAX says that it cannot read it
    assert compile_again() == []


def test_a_disk_that_is_full_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, data: bytes) -> int:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    _say_once.cache_clear()
    assert compile_again() == compile_again() == []
    assert list(folder.iterdir()) == []
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert said == f"compiled programs are not kept: {str(folder)!r} cannot be written (No space left on device)"


def test_a_cache_that_cannot_be_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "file").touch()
    with pytest.raises(
        ConfigError, match=r"compilation_cache_dir: '.*file/xla' cannot be made \(Not a directory\); name"
    ):
        enable_compilation_cache(str(folder / "file" / "xla"))
    monkeypatch.setenv("JAXLLM_CACHE", str(folder / "file"))
    jax.config.update("jax_compilation_cache_dir", None)
    enable_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir is None  # type: ignore[attr-defined]
    (said,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert re.fullmatch(r"no compiled program is kept, .*'.*file/xla' cannot be made .*; set JAXLLM_CACHE", said)


def test_jax_s_own_cache_directory_is_left_where_it_is(folder: Path) -> None:
    enable_compilation_cache(None)
    assert jax.config.jax_compilation_cache_dir == str(folder)  # type: ignore[attr-defined]
    enable_compilation_cache("")
    assert jax.config.jax_compilation_cache_dir == str(folder)  # type: ignore[attr-defined]
