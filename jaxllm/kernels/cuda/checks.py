"""The checks of all CUDA kernels, run once when an engine starts."""

from __future__ import annotations

from functools import cache, partial

from jaxllm.kernels.cuda import call
from jaxllm.kernels.grouped_matmul import cuda as experts_cuda
from jaxllm.kernels.grouped_matmul import ring_cuda, tiles_cuda
from jaxllm.kernels.linear import cuda as linear_cuda
from jaxllm.kernels.linear import narrow_cuda, quantized_cuda
from jaxllm.kernels.moe_token import cuda as moe_token
from jaxllm.kernels.paged_attention import decode_cuda, latent_cuda, prefill_cuda
from jaxllm.kernels.rope_write import cuda as rope_write
from jaxllm.kernels.router import cuda as router
from jaxllm.kernels.rows import cuda as rows


@cache
def check_kernels(quantized: bool = False, latent: bool = False, experts: bool = False) -> None:
    """Compares each kernel that can be used here with its reference; one that is wrong is not used.

    quantized: also those that only models with quantised weights use; latent: with latent attention; experts: with
    mixtures of experts.
    """
    first, second = prefill_cuda.CHECKS.items()
    checks = dict([(decode_cuda.KERNEL, decode_cuda.check), first])
    checks |= {rope_write.KERNEL: rope_write.check, linear_cuda.KERNEL: linear_cuda.check}
    checks |= {narrow_cuda.KERNEL: narrow_cuda.check} if any(narrow_cuda.MEGABYTES.values()) else {}
    checks |= {name: partial(rows.check, name) for name in rows.FASTER if rows.is_used(name)}
    checks |= {quantized_cuda.KERNEL: quantized_cuda.check} if quantized else {}
    checks |= {latent_cuda.KERNEL: latent_cuda.check} if latent else {}
    if experts:
        checks |= {experts_cuda.KERNEL: experts_cuda.check, tiles_cuda.KERNEL: tiles_cuda.check}
        checks |= {ring_cuda.KERNEL: ring_cuda.check, router.KERNEL: router.check}
        checks |= {moe_token.KERNEL: moe_token.check}
    if experts and quantized:
        for module in (experts_cuda, tiles_cuda):
            checks[module.QUANTIZED] = module.check_quantized
    call.check_all(checks)
    call.check_all(dict([second]))  # of use only where the first is not
