#!/usr/bin/env bash
# From a fresh clone to generated text: makes a virtual environment, installs, and runs a real model (SmolLM2-135M).
# Usage: bash scripts/demo.sh ["your question"]
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
jaxllm generate smollm2-135m --chat --max-tokens 96 "${1:-What is the capital of France, and what is it known for?}"
