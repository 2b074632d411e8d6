"""Eight fake CPU devices for every test, set before JAX starts a backend; and one compilation cache for the run."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure() -> None:
    import jax

    from jaxllm.engine.devices import prepare

    jax.config.update("jax_num_cpu_devices", 8)
    prepare()
