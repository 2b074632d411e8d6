"""Tiny random models of every family, built with transformers and torch.

Nothing in them divides by anything convenient, windows are shorter than the prompts, rope scaling bites within a few
tokens, and weights are large, so that a mistake anywhere moves the logits by far more than rounding does.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 203
PROMPT_LENGTHS = (1, 2, 7, 17, 40)
NEW_TOKENS = 12
MIN_GAP = 2e-3
"""The best two logits of every greedy step are at least this far apart, so that rounding cannot change a token."""

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 74,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS_6_2 = {"num_attention_heads": 6, "num_key_value_heads": 2}
HEADS_8_2 = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8}
HEADS_9_3 = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 54}


def rope(kind: str = "default", theta: float = 10_000.0, **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


@dataclass(frozen=True)
class Case:
    """`settings` on top of SIZES; `dtype` of the stored weights; `legacy`: config.json as transformers 4 wrote it.

    mxfp4: experts are stored in four bits.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: str = "bfloat16"
    legacy: bool = False
    mxfp4: bool = False


LLAMA3 = rope(
    "llama3",
    500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=64)
YARN_TUNED = rope(
    "yarn",
    1_000_000.0,
    factor=4.0,
    original_max_position_embeddings=128,
    beta_fast=8.0,
    beta_slow=0.5,
    attention_factor=0.9,
    truncate=False,
)
YARN_MSCALE = rope("yarn", factor=8.0, original_max_position_embeddings=32, mscale=0.7, mscale_all_dim=1.2)
YARN_GPT_OSS = rope("yarn", factor=8.0, original_max_position_embeddings=32, truncate=False)
GEMMA3_ROPES = {
    "full_attention": rope("linear", 1_000_000.0, factor=8.0),
    "sliding_attention": rope("default", 10_000.0),
}

CASES = {
    "llama_mha": Case("llama", {"num_key_value_heads": 3}, dtype="float32"),
    "llama_gqa_tied": Case("llama", {**HEADS_9_3, "tie_word_embeddings": True}, dtype="float16", legacy=True),
    "llama_llama3": Case("llama", {**HEADS_6_2, "rope_parameters": LLAMA3}),
    "llama_llama3_legacy": Case("llama", {**HEADS_6_2, "rope_parameters": {**LLAMA3, "factor": 32.0}}, legacy=True),
    "llama_linear": Case("llama", {"rope_parameters": rope("linear", factor=2.5)}, legacy=True),
    "llama_yarn": Case("llama", {**HEADS_6_2, "rope_parameters": YARN}),
    "llama_attention_bias": Case("llama", {"attention_bias": True}),
    "llama_mlp_bias": Case("llama", {"mlp_bias": True, "hidden_act": "gelu"}),
    "tinyllama": Case(
        "llama",
        {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5},
        legacy=True,
    ),
    "mistral_window": Case("mistral", {**HEADS_6_2, "num_hidden_layers": 3, "sliding_window": 8}),
    "mistral_full": Case("mistral", {"sliding_window": None, "rope_parameters": rope(theta=1_000_000.0)}, legacy=True),
    "qwen2": Case("qwen2", {"tie_word_embeddings": True, "rope_parameters": rope(theta=1_000_000.0)}, legacy=True),
    "qwen2_yarn": Case("qwen2", {**HEADS_6_2, "rope_parameters": YARN_TUNED, "max_position_embeddings": 512}),
    "qwen2_window": Case(
        "qwen2",
        {"num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
        legacy=True,
    ),
    "qwen3": Case("qwen3", {**HEADS_6_2, "rope_parameters": rope(theta=1_000_000.0)}),
    "qwen3_tied_bias": Case("qwen3", {**HEADS_9_3, "attention_bias": True, "tie_word_embeddings": True}, legacy=True),
    "mixtral": Case("mixtral", {**HEADS_8_2, "num_local_experts": 8, "num_experts_per_tok": 2}, legacy=True),
    "mixtral_window": Case(
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "intermediate_size": 37, "sliding_window": 8},
    ),
    "qwen3_moe": Case(
        "qwen3_moe",
        {
            **HEADS_6_2,
            "num_hidden_layers": 3,
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 21,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "rope_parameters": rope(theta=1_000_000.0),
        },
    ),
    "qwen3_moe_step": Case(
        "qwen3_moe",
        {
            **HEADS_9_3,
            "num_hidden_layers": 4,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 6,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
        legacy=True,
    ),
    "deepseek_v2": Case(
        "deepseek_v2",
        {
            **HEADS_6_2,
            "num_key_value_heads": 6,
            "head_dim": 6,
            "q_lora_rank": None,
            "kv_lora_rank": 14,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 9,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 19,
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
        legacy=True,
    ),
    "deepseek_v3": Case(
        "deepseek_v3",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "head_dim": 6,
            "q_lora_rank": 22,
            "kv_lora_rank": 14,
            "qk_nope_head_dim": 10,
            "qk_rope_head_dim": 6,
            "v_head_dim": 9,
            "first_k_dense_replace": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 19,
            "n_shared_experts": 2,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": YARN_MSCALE,
        },
    ),
    "gpt_oss": Case(
        "gpt_oss",
        {
            **HEADS_6_2,
            "num_hidden_layers": 3,
            "sliding_window": 6,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "intermediate_size": 21,
            "rope_parameters": {**YARN_GPT_OSS, "rope_theta": 150_000.0},
        },
    ),
    "gpt_oss_mxfp4": Case(
        "gpt_oss",
        {
            **HEADS_8_2,
            "hidden_size": 64,
            "sliding_window": 5,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "intermediate_size": 32,
            "rope_parameters": {**YARN_GPT_OSS, "rope_theta": 150_000.0},
        },
        legacy=True,
        mxfp4=True,
    ),
    "gemma3": Case(
        "gemma3_text",
        {
            **HEADS_6_2,
            "num_hidden_layers": 6,
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "tie_word_embeddings": True,
        },
    ),
    "gemma3_scaled": Case(
        "gemma3_text",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 5,
            "query_pre_attn_scalar": 24,
            "final_logit_softcapping": 12.0,
            "rope_parameters": GEMMA3_ROPES,
            "tie_word_embeddings": True,
        },
        legacy=True,
    ),
}


PLAIN = {"attn_implementation": "eager", "experts_implementation": "eager"}
"""The implementations of transformers that read like the papers, and have no demands on sizes."""


def build(case: Case, seed: int) -> Any:
    """A torch model with random weights that are exact in the case's dtype, held in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = json.loads(json.dumps({**SIZES, **case.settings}))  # transformers keeps and changes nested tables
    config = AutoConfig.for_model(case.model_type, **settings)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, **PLAIN, dtype=torch.float32)
    stored = getattr(torch, case.dtype)
    centre = 0.0 if case.model_type == "gemma3_text" else 1.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                value = centre + 0.3 * torch.randn_like(parameter)
            elif name.endswith("bias"):
                value = 0.5 * torch.randn_like(parameter)
            elif name.endswith("sinks"):
                value = torch.randn_like(parameter)
            elif case.model_type == "gpt_oss" and ".experts." in name:
                # large enough to be clamped
                value = random_mxfp4(parameter) if case.mxfp4 else 0.6 * torch.randn_like(parameter)
            else:
                value = 0.25 * torch.randn_like(parameter)
            parameter.copy_(value.to(stored).float())
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_((0.2 * torch.randn_like(buffer)).to(stored).float())
    return model.eval()


def random_mxfp4(like: Any) -> Any:
    """Random values that MXFP4 can hold, in blocks of 32 along the second axis of [E, columns, rows]."""
    import torch

    experts, columns, rows = like.shape
    nibbles = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.5, -1, -1.5, -2, -3, -4, -6])
    values = nibbles[torch.randint(len(nibbles), (experts, rows, columns // 32, 32))]
    exponents = torch.randint(-5, -2, (experts, rows, columns // 32, 1))
    return torch.ldexp(values, exponents).reshape(experts, rows, columns).transpose(1, 2)


def pack_mxfp4(values: Any) -> tuple[Any, Any]:
    """Blocks, uint8 [E, rows, columns / 32, 16], and scales, uint8 [E, rows, columns / 32], of [E, columns, rows]."""
    import torch

    experts, columns, rows = values.shape
    blocks = values.float().transpose(1, 2).reshape(experts, rows, columns // 32, 32)
    largest = blocks.abs().amax(-1)
    exponents = torch.where(largest > 0, torch.ceil(torch.log2(largest.clamp(min=1e-30) / 6)), torch.zeros(())).int()
    nibbles = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    scaled = torch.ldexp(blocks, -exponents[..., None])
    codes = (scaled[..., None] == nibbles).int().argmax(-1)
    if not torch.equal(nibbles[codes], scaled):
        raise ValueError("the values are none of MXFP4")
    return (codes[..., 0::2] + 16 * codes[..., 1::2]).to(torch.uint8), (exponents + 127).to(torch.uint8)


def prompts(seed: int) -> list[list[int]]:
    """Ragged prompts without special tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(3, VOCAB, n).tolist() for n in PROMPT_LENGTHS]


def torch_logits(model: Any, tokens: list[int]) -> np.ndarray:
    """Float32 logits [len(tokens), vocab] of one sequence, without batching or cache."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


def torch_greedy(model: Any, prompt: list[int], count: int) -> tuple[list[int], float]:
    """Greedy tokens, ignoring end tokens, and the smallest gap between the two best logits on the way."""
    tokens = list(prompt)
    gap = float("inf")
    for _ in range(count):
        last = torch_logits(model, tokens)[-1]
        second, first = np.sort(last)[-2:]
        gap = min(gap, float(first - second))
        tokens.append(int(last.argmax()))
    return tokens[len(prompt) :], gap


def save(model: Any, case: Case, directory: Path) -> None:
    """Write the model as a Hugging Face directory with weights in the case's dtype."""
    import torch

    # the model itself stays in float32
    state = {key: value.to(getattr(torch, case.dtype)) for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    model.save_pretrained(directory, state_dict=dict(state))
    (directory / "generation_config.json").unlink(missing_ok=True)
    (directory / "model.safetensors").chmod(0o644)
    if case.mxfp4:
        save_mxfp4(state, directory)
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), "dtype": case.dtype}
    config = legacy_config(config) if case.legacy else config
    if case.mxfp4:
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_mxfp4(state: dict[str, Any], directory: Path) -> None:
    """The weights as OpenAI published gpt-oss: every stack of experts as blocks and scales."""
    from safetensors.torch import save_file

    out = {}
    for name, value in state.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[f"{name}_blocks"], out[f"{name}_scales"] = pack_mxfp4(value)
        else:
            out[name] = value.contiguous()
    save_file(out, directory / "model.safetensors", metadata={"format": "pt"})


def legacy_config(config: dict[str, Any]) -> dict[str, Any]:
    """The same settings in the words of transformers 4."""
    config = dict(config)
    config["torch_dtype"] = config.pop("dtype")
    config["transformers_version"] = "4.45.0"
    ropes = config.pop("rope_parameters")
    full = dict(ropes.get("full_attention", ropes))
    config["rope_theta"] = full.pop("rope_theta")
    config["rope_scaling"] = full if full["rope_type"] != "default" else None
    if "sliding_attention" in ropes:
        config["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        config["sliding_window_pattern"] = config.pop("layer_types").index("full_attention") + 1
        config.pop("_sliding_window_pattern", None)
    if config["model_type"] == "qwen3_moe":
        config["num_experts"] = config.pop("num_local_experts")
    if config["model_type"] in ("qwen2", "qwen3"):
        config.pop("layer_types", None)
    return config
