"""Whose turn it is to be decoded, where the decoding sequences take turns: the micro-batches of a pipeline."""

from __future__ import annotations

from collections.abc import Iterable

from jaxllm.engine.request import Sequence


def whose_turn(decoding: Iterable[Sequence], *, number: int, turns: int, most: int, ahead: bool) -> list[Sequence]:
    """The sequences to be decoded in step `number` of several micro-batches, at most `most`, in order of rank.

    Only those whose last token is known, or was sampled at least `turns` steps ago; with `ahead` those that have waited
    longest even if their last token is younger. Who has waited longest comes first in any case, hence nobody starves.
    """
    going = [seq for seq in decoding if seq.num_computed < seq.max_len - 1]
    if ahead:
        oldest = min((seq.last_step for seq in going if not seq.wait_for_token), default=-1)
        ready = [
            seq
            for seq in going
            if not seq.num_pending or (seq.num_pending == 1 and seq.last_step == oldest and not seq.wait_for_token)
        ]
    else:
        ready = [
            seq for seq in going if not seq.num_pending or (number - seq.last_step >= turns and not seq.wait_for_token)
        ]
    # The quotas of `turns` consecutive steps add up to everybody and differ by at most one.
    turn = number % turns
    quota = (turn + 1) * len(going) // turns - turn * len(going) // turns
    quota = min(max(quota, 1), most)
    if len(ready) > quota:
        ready = sorted(sorted(ready, key=lambda seq: seq.last_step)[:quota], key=lambda seq: seq.rank)
    return ready
