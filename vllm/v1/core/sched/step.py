"""A step while it is put together, and the message to the workers that it becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.output import CachedRequestData, NewRequestData

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.request import Request

__all__ = ["LastDecodes", "Step"]


class LastDecodes:
    """What a step of decodes alone told the workers; nothing of it may be changed."""

    __slots__ = ("num_scheduled_tokens", "req_ids", "running")

    def __init__(
        self, running: list[Request], req_ids: list[str], num_scheduled_tokens: dict[str, int]
    ) -> None:
        self.running = running
        self.req_ids = req_ids
        self.num_scheduled_tokens = num_scheduled_tokens


class Step:
    """Which requests take part, how many tokens of each, and the blocks that they gained.

    ``counts`` and ``blocks`` (block ids per group, or None) run in step with ``running``, the
    requests that ran before; ``admitted_counts`` with ``admitted``, those that begin or resume.
    ``budget`` is how many more tokens may be computed. ``is_decode`` says that all of ``running``
    compute one token each.
    """

    __slots__ = (
        "admitted",
        "admitted_counts",
        "blocks",
        "budget",
        "counts",
        "is_decode",
        "preempted",
        "running",
    )

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.is_decode = False
        self.running: list[Request] = []
        self.counts: list[int] = []
        self.blocks: list[tuple[list[int], ...] | None] = []
        self.admitted: list[Request] = []
        self.admitted_counts: list[int] = []
        self.preempted: set[str] = set()

    def remove(self, request: Request) -> bool:
        """Take a running request out and its tokens back; False where it is not in the step."""
        if request not in self.running:
            return False
        index = self.running.index(request)
        del self.running[index]
        del self.blocks[index]
        self.budget += self.counts.pop(index)
        return True

    @property
    def has_structured_output_requests(self) -> bool:
        return any(request.use_structured_output for request in (*self.running, *self.admitted))

    def follow(self, last: LastDecodes) -> CachedRequestData | None:
        """What to tell the workers where this step goes on with ``last``; None where it does not.

        Only where nothing takes tokens back: counts are those of the step before, one further.
        """
        if not self.is_decode or self.admitted or self.preempted or self.running != last.running:
            return None
        return CachedRequestData(req_ids=last.req_ids, new_block_ids=self.blocks, as_expected=True)

    def make_request_data(
        self, kv_cache_manager: KVCacheManager
    ) -> tuple[list[NewRequestData], CachedRequestData, dict[str, int]]:
        """What the workers need to know of requests new to them and of the others.

        The third is the number of tokens by request id.
        """
        running = self.running
        req_ids = [request.request_id for request in running]
        num_scheduled_tokens = dict(zip(req_ids, self.counts, strict=True))
        cached = CachedRequestData(
            req_ids=req_ids,
            new_block_ids=self.blocks,
            num_computed_tokens=[request.num_computed_tokens for request in running],
            num_output_tokens=[
                request.num_expected_tokens - request.num_prompt_tokens for request in running
            ],
        )
        new: list[NewRequestData] = []
        for request, count in zip(self.admitted, self.admitted_counts, strict=True):
            request_id = request.request_id
            num_scheduled_tokens[request_id] = count
            block_ids = kv_cache_manager.get_block_ids(request_id)
            if request.num_preemptions:
                cached.resumed_req_ids.add(request_id)
                cached.all_token_ids[request_id] = request.all_token_ids.copy()
                cached.req_ids.append(request_id)
                cached.new_block_ids.append(block_ids)
                cached.num_computed_tokens.append(request.num_computed_tokens)
                cached.num_output_tokens.append(request.num_output_tokens)
            else:
                new.append(
                    NewRequestData(
                        request_id,
                        request.prompt_token_ids,
                        request.sampling_params,
                        block_ids,
                        request.num_computed_tokens,
                        request.encoder_token_ids,
                    )
                )
        return new, cached, num_scheduled_tokens

    def advance(self) -> None:
        """Count the step's tokens as computed: later steps come after it on the device too."""
        if self.is_decode:
            for request in self.running:
                request.num_computed_tokens += 1
        else:
            for request, count in zip(self.running, self.counts, strict=True):
                request.num_computed_tokens += count
        for request, count in zip(self.admitted, self.admitted_counts, strict=True):
            request.num_computed_tokens += count

    def expect_tokens(self) -> None:
        """Count what the step is going to sample; after ``advance``."""
        for request in (*self.running, *self.admitted):
            if request.num_computed_tokens >= request.num_expected_tokens:
                request.num_expected_tokens += 1
