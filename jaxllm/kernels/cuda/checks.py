"""The checks of all CUDA kernels, run once when an engine starts, while it loads weights and compiles."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from jaxllm.kernels.cuda import call
from jaxllm.kernels.cuda.verdicts import Verdicts
from jaxllm.kernels.dense_layer import cuda as dense_layer
from jaxllm.kernels.grouped_matmul import cuda as experts_cuda
from jaxllm.kernels.grouped_matmul import ring_cuda, tiles_cuda
from jaxllm.kernels.linear import cuda as linear_cuda
from jaxllm.kernels.linear import fp8_cuda, narrow_cuda, quantized_cuda, tall_cuda, wide_cuda
from jaxllm.kernels.moe_token import cuda as moe_layers
from jaxllm.kernels.paged_attention import decode_cuda, latent_cuda, prefill_cuda, rope_cuda
from jaxllm.kernels.rope_write import cuda as rope_write
from jaxllm.kernels.router import cuda as router
from jaxllm.kernels.rows import cuda as rows

_lock = threading.Lock()
_begun: dict[tuple[bool, ...], Future[bool]] = {}


class Checking:
    """Checks that may still be under way. Programs that are compiled meanwhile trust the kernels.

    over: they were over before.
    """

    def __init__(self, outcome: Future[bool], over: bool):
        self._outcome = outcome
        self._over = over

    def join(self) -> bool:
        """Waits for the checks; False if a kernel was turned off that programs traced since `begin_checks` may hold."""
        return self._outcome.result() or self._over


def begin_checks(quantized: bool = False, latent: bool = False, experts: bool = False) -> Checking:
    """Compares each kernel that can be used here with its reference; one that is wrong is not used.

    quantized: also those that only models with quantised weights use; latent: with latent attention; experts: with
    mixtures of experts.
    """
    wanted = (quantized, latent, experts)
    with _lock:
        outcome = _begun.get(wanted)
        if outcome is not None:
            return Checking(outcome, outcome.done())
        pool = ThreadPoolExecutor(1, "checks")
        _begun[wanted] = outcome = pool.submit(_check, *wanted)
        pool.shutdown(wait=False)
        return Checking(outcome, over=False)


def check_kernels(quantized: bool = False, latent: bool = False, experts: bool = False) -> None:
    """`begin_checks`, and waits for them."""
    begin_checks(quantized, latent, experts).join()


def _check(quantized: bool, latent: bool, experts: bool) -> bool:
    """Whether all agreed, now or before."""
    first, second = prefill_cuda.CHECKS.items()
    checks = dict([(decode_cuda.KERNEL, decode_cuda.check), first])
    checks |= {rope_write.KERNEL: rope_write.check, linear_cuda.KERNEL: linear_cuda.check}
    checks |= {rope_cuda.KERNEL: rope_cuda.check} if rope_cuda.is_used() else {}
    checks |= {narrow_cuda.KERNEL: narrow_cuda.check} if narrow_cuda.is_used() else {}
    checks |= {narrow_cuda.NORMS: narrow_cuda.check_norms} if narrow_cuda.makes_norms() else {}
    checks |= {wide_cuda.KERNEL: wide_cuda.check} if wide_cuda.is_used() else {}
    checks |= {tall_cuda.KERNEL: tall_cuda.check}
    checks |= {dense_layer.KERNEL: dense_layer.check} if dense_layer.is_used() else {}
    checks |= {name: partial(rows.check, name) for name in rows.KERNELS if rows.is_used(name)}
    checks |= {quantized_cuda.KERNEL: quantized_cuda.check} if quantized else {}
    checks |= {fp8_cuda.KERNEL: fp8_cuda.check} if quantized else {}
    checks |= {latent_cuda.KERNEL: latent_cuda.check} if latent else {}
    if experts:
        checks |= {experts_cuda.KERNEL: experts_cuda.check, tiles_cuda.KERNEL: tiles_cuda.check}
        checks |= {ring_cuda.KERNEL: ring_cuda.check, router.KERNEL: router.check}
        checks[moe_layers.KERNEL] = moe_layers.check
    if experts and quantized:
        for module in (experts_cuda, ring_cuda, tiles_cuda):
            checks[module.QUANTIZED] = module.check_quantized
    if not any(map(call.usable, checks)):
        return True
    verdicts = Verdicts.read()
    outcome = call.check_all({kernel: check for kernel, check in checks.items() if kernel not in verdicts})
    verdicts.add({kernel for kernel, agreed in outcome.items() if agreed})
    # Of use only where the first is not; its check does nothing where it is, which is no verdict to keep.
    outcome |= call.check_all(dict([second]))
    return all(outcome.values())
