"""schemathesis over /openapi.json: whatever the document allows is served, and whatever it does not is refused."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.serve.live import KEY, ROOT, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CONTEXT = 1024
SECONDS = int(os.environ.get("JAXLLM_FUZZ_SECONDS", "150"))


def test_the_document_and_the_server_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("schemathesis", reason="pip install schemathesis")
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from server_under_test import write_model

    model = tmp_path / "model"
    model.mkdir()
    write_model(model, "tiny")  # its tokenizer has tokens for any text
    pages = {"tokens_per_block": 16, "max_tokens": 50 * CONTEXT}
    settings = {"model": str(model), "tokenizer": str(model), "load_format": "dummy", "max_seq_len": CONTEXT,
                "kv_cache_config": pages}  # fmt: skip
    with serving(tmp_path, "--api_key", KEY, "--tool_parser", "hermes", settings=settings) as live:
        command = [
            sys.executable, "-c", "from schemathesis.cli import schemathesis; schemathesis()", "run",
            live.url + "/openapi.json", "-H", f"Authorization: Bearer {KEY}", "--checks", "all",
            "--continue-on-failure", "--request-timeout", "60",
            "--max-time", str(SECONDS), "--phases", "coverage,fuzzing",
        ]  # fmt: skip
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "SCHEMATHESIS_HOOKS": "tests.serve.schemathesis_hooks",
            "JAXLLM_TEST_CONTEXT": str(CONTEXT),
        }  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=500)
        print(done.stdout[-8000:], done.stderr[-2000:])
        cases = re.search(r"(\d+) generated", done.stdout)
        assert cases is not None and int(cases[1]) >= 1000
        assert done.returncode == 0
        assert not re.search(r'"status": 5\d\d', "\n".join(live.lines))
