"""The OpenAI-compatible server: an engine process, frontends that speak HTTP, and a supervisor that starts both.

    jaxllm serve -> supervisor.py -> engine_process.py   the engine and its Unix socket; no HTTP, no tokenisation
                                  -> frontend.py         HTTP, tokenisation, text; no jax

wire.py is what they say to each other.
"""
