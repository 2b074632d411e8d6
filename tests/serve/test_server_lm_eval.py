"""lm-evaluation-harness against the server: log-likelihoods of a local task are those of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.serve.live import KEY, Live
from tests.tiny_llm import MODEL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROWS = [
    {"q": "The cat sat on", "choices": [" the mat", " a dog", "?"]},
    {"q": "One and one", "choices": [" are two", " is", " hello there"]},
    {"q": "Ice is", "choices": [" cold", " hot", " not so old"]},
]


def test_local_completions(live: Live, server_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="the comparison needs torch")
    lm_eval = pytest.importorskip("lm_eval", reason="pip install lm-eval[api]")
    pytest.importorskip("tenacity", reason="pip install lm-eval[api]")
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    task = {
        "task": "tiny_task", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "data.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": "choices",
        "doc_to_target": 0, "target_delimiter": "", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    directory = str(server_directory / "tokenizer")
    found = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": "tiny",
            "base_url": live.url + "/v1/completions",
            "tokenizer": directory,
            "tokenizer_backend": "huggingface",
            "max_length": 64,
            "num_concurrent": 1,
        },
        tasks=["tiny_task"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    samples: list[dict[str, Any]] = sorted(found["samples"]["tiny_task"], key=lambda sample: sample["doc_id"])
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert len(samples) == len(ROWS)
    for row, sample in zip(ROWS, samples, strict=True):
        for choice, (response,) in zip(row["choices"], sample["resps"], strict=True):
            context = tokenizer(row["q"], add_special_tokens=False).input_ids
            whole = tokenizer(row["q"] + choice, add_special_tokens=False).input_ids
            with torch.no_grad():
                logprobs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            wanted = sum(float(logprobs[at - 1, whole[at]]) for at in range(len(context), len(whole)))
            assert float(response[0]) == pytest.approx(wanted, abs=1e-3)
