"""What tests of the scheduler share: requests, and one step with its results."""

from dataclasses import dataclass

from jaxllm.engine.blocks import PagePool
from jaxllm.engine.request import Request
from jaxllm.engine.scheduler import Scheduler
from jaxllm.engine.step import Step

EOS = 0


@dataclass
class Params:
    n: int = 1
    max_tokens: int | None = 8
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    end_id: int | None = None


def make(pages: int = 64, page_size: int = 4, prefix_cache: bool = True, **options) -> Scheduler:
    options = {"max_batch_size": 4, "max_num_tokens": 32, "max_seq_len": 64, "eos_token_ids": [EOS]} | options
    return Scheduler(PagePool(pages, page_size, prefix_cache), **options)


def prompt(length: int, first: int = 100) -> list[int]:
    return list(range(first, first + length))


def add(scheduler: Scheduler, tokens: list[int], request_id: int | None = None, **kwargs) -> Request:
    params = Params(**{name: kwargs.pop(name) for name in list(kwargs) if name in Params.__dataclass_fields__})
    request = Request(scheduler._roster.arrivals if request_id is None else request_id, tokens, params, **kwargs)
    scheduler.add(request)
    return request


def chunks(step: Step) -> list[tuple[int, int, int, bool]]:
    return [(c.seq.request.request_id, c.start, c.stop, c.samples) for c in step.prefills]


def ids(sequences) -> list[int]:
    return [seq.request.request_id for seq in sequences]


def turn(scheduler: Scheduler, token: int = 7) -> Step:
    """One step and its results, all the same token."""
    step = scheduler.schedule()
    assert step is not None
    scheduler.update(step, [token] * step.num_rows)
    scheduler.check()
    return step
