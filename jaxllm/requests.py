"""From a prompt and its parameters to what the engine works on, and the output that its updates come to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from jaxllm.engine.request import Request, RequestParams
from jaxllm.outputs import RequestOutput
from jaxllm.prompts import Prompt, RequestError, tokenize
from jaxllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxllm.engine.engine import Engine
    from jaxllm.engine.tokenizer import Tokenizer


def make_request(
    engine: Engine,
    request_id: int,
    prompt: Prompt,
    params: SamplingParams | None,
    *,
    priority: float,
    cache_salt: str | None,
    streaming: bool,
) -> tuple[RequestOutput, Request]:
    """The output and the engine's request for one prompt; arguments as for `LLM.generate_async`.

    Raises:
        ValueError: the prompt or the parameters are bad.
    """
    if params is None:
        params = SamplingParams()
    elif not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params = {params!r} must be a SamplingParams")
    params.validate()  # fields may have been changed since it was made
    if not isinstance(priority, int | float) or isinstance(priority, bool):
        raise RequestError(f"priority = {priority!r} must be a number")
    tokenizer = engine.tokenizer
    text, token_ids = tokenize(prompt, params, tokenizer, engine.model_config.vocab_size)
    if tokenizer is None and params.stop_strings:
        raise RequestError(
            f"stop = {params.stop!r} needs a tokenizer, and this LLM has none (skip_tokenizer_init=True); "
            "use stop_token_ids"
        )
    # best_of: generate more sequences than are returned, and rank them by their log-probability.
    ranked = params.num_sequences > params.n
    engine_params = replace(
        params,
        n=params.num_sequences,
        best_of=None,
        logprobs=0 if ranked and params.logprobs is None else params.logprobs,
    )
    result = RequestOutput(
        request_id,
        text,
        token_ids,
        params.num_sequences,
        streaming=streaming,
        abort=engine.abort,
        make_decoder=_decoder_maker(tokenizer, params) if tokenizer is not None and params.detokenize else None,
        strip_stop_token=not params.include_stop_str_in_output,
        echo=not params.exclude_input_from_output,
        keep=params.n if ranked else None,
        keep_logprobs=params.logprobs is not None,
    )
    request = Request(
        request_id,
        token_ids,
        cast(RequestParams, engine_params),
        priority=priority,
        cache_salt=cache_salt,
        on_update=result.on_update,
        prefix_cache=params.prompt_logprobs is None,
        stream=streaming,
    )
    return result, request


def _decoder_maker(tokenizer: Tokenizer, params: SamplingParams) -> Callable[[], Any]:
    from jaxllm.engine.tokenizer import IncrementalDecoder

    return lambda: IncrementalDecoder(tokenizer, params.skip_special_tokens)
