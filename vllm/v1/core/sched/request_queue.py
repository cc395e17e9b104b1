"""Requests that wait, in the order of a policy. Every operation is O(1) or O(log n)."""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from enum import Enum

from vllm.errors import ConfigError
from vllm.v1.request import Request

__all__ = [
    "FCFSRequestQueue",
    "PriorityRequestQueue",
    "RequestQueue",
    "SchedulingPolicy",
    "create_request_queue",
]


class SchedulingPolicy(Enum):
    FCFS = "fcfs"
    PRIORITY = "priority"


class RequestQueue(ABC):
    """A queue of requests with distinct ids."""

    @abstractmethod
    def add_request(self, request: Request) -> None:
        """Queue a request that has just arrived."""

    @abstractmethod
    def prepend_request(self, request: Request) -> None:
        """Queue a request again that was taken before; as near the front as the policy lets."""

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """``prepend_request`` for several, the first of which will be nearest the front."""
        for request in reversed(list(requests)):
            self.prepend_request(request)

    @abstractmethod
    def peek_request(self) -> Request:
        """The next request, left in place. Raises IndexError where there is none."""

    @abstractmethod
    def pop_request(self) -> Request:
        """The next request. Raises IndexError where there is none."""

    @abstractmethod
    def remove_request(self, request: Request) -> None:
        """Take ``request`` out, wherever it is. Raises KeyError if it is not queued."""

    @abstractmethod
    def __contains__(self, request: Request) -> bool: ...

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __iter__(self) -> Iterator[Request]:
        """In the order of service."""


class FCFSRequestQueue(RequestQueue):
    """First come, first served."""

    def __init__(self) -> None:
        self._requests: OrderedDict[str, Request] = OrderedDict()

    def add_request(self, request: Request) -> None:
        self._requests[request.request_id] = request

    def prepend_request(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self._requests.move_to_end(request.request_id, last=False)

    def peek_request(self) -> Request:
        for request in self._requests.values():
            return request
        raise IndexError("the queue is empty")

    def pop_request(self) -> Request:
        request = self.peek_request()
        del self._requests[request.request_id]
        return request

    def remove_request(self, request: Request) -> None:
        del self._requests[request.request_id]

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests.values())


class PriorityRequestQueue(RequestQueue):
    """The smallest ``priority`` first, then the earliest arrival.

    A heap; removed requests stay in it, unqueued, until they come to its top.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Request]] = []
        self._entry_of: dict[str, int] = {}
        self._next_entry = 0

    def add_request(self, request: Request) -> None:
        self._next_entry += 1
        self._entry_of[request.request_id] = self._next_entry
        heapq.heappush(
            self._heap, (request.priority, request.arrival_time, self._next_entry, request)
        )

    def prepend_request(self, request: Request) -> None:
        self.add_request(request)

    def _drop_removed(self) -> None:
        heap = self._heap
        while heap and self._entry_of.get(heap[0][3].request_id) != heap[0][2]:
            heapq.heappop(heap)

    def peek_request(self) -> Request:
        self._drop_removed()
        return self._heap[0][3]

    def pop_request(self) -> Request:
        self._drop_removed()
        request = heapq.heappop(self._heap)[3]
        del self._entry_of[request.request_id]
        return request

    def remove_request(self, request: Request) -> None:
        del self._entry_of[request.request_id]
        self._drop_removed()

    def __contains__(self, request: Request) -> bool:
        return request.request_id in self._entry_of

    def __len__(self) -> int:
        return len(self._entry_of)

    def __iter__(self) -> Iterator[Request]:
        for *_, entry, request in sorted(self._heap, key=lambda item: item[:3]):
            if self._entry_of.get(request.request_id) == entry:
                yield request


def create_request_queue(policy: SchedulingPolicy | str) -> RequestQueue:
    """The queue of a policy.

    Raises:
        ConfigError: there is no such policy.
    """
    try:
        policy = SchedulingPolicy(policy)
    except ValueError:
        raise ConfigError(
            f"--scheduling-policy must be fcfs or priority, not {policy!r}",
            parameter="scheduling_policy",
            value=policy,
        ) from None
    return FCFSRequestQueue() if policy is SchedulingPolicy.FCFS else PriorityRequestQueue()
