"""A mixture, whose experts stay in memory up to a bound; the least recently used expert is removed first."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import ModelMixin

from prunekit.data.prompt_encoder import PromptEncoder
from prunekit.methods.router import Router
from prunekit.runtime.errors import UserError

DEFAULT_GUIDANCE = 7.5


@dataclass
class Slot:
    """An expert in memory, and how many threads use it."""

    model: ModelMixin
    users: int = 0


class Experts:
    """N denoisers by index, loaded when they are used; safe for many threads.

    A thread that needs an expert for which there is no room waits until other threads release their experts, so the
    bounds always hold. No other thread can overtake the waiting thread.

    Args:
        load: returns the denoiser of expert i on a device and in a dtype.
        num_weights: returns the number of weights of expert i without loading it.
        num_experts: N.
        device, dtype: device and dtype of loaded experts.
        max_resident: largest number of experts in memory; None: all.
        max_bytes: largest size of all loaded weights in bytes; None: no bound. A single expert may exceed it.

    """

    def __init__(
        self,
        load: Callable[[int, torch.device, torch.dtype], ModelMixin],
        num_weights: Callable[[int], int],
        num_experts: int,
        device: torch.device,
        dtype: torch.dtype,
        max_resident: int | None = None,
        max_bytes: int | None = None,
    ):
        if max_resident is not None and max_resident < 1:
            raise UserError(f"max_resident={max_resident}: at least 1, or None for all {num_experts} experts")
        if max_bytes is not None and max_bytes < 1:
            raise UserError(f"max_bytes={max_bytes}: at least 1, or None for no bound")
        self.load, self.num_weights, self.num_experts = load, num_weights, num_experts
        self.device, self.dtype = device, dtype
        self.max_resident, self.max_bytes = max_resident, max_bytes
        self._slots: OrderedDict[int, Slot] = OrderedDict()  # least recently used first
        self._turn = threading.Lock()  # held by the thread that is next, so that no thread overtakes it
        self._changed = threading.Condition()

    @property
    def resident(self) -> list[int]:
        """The experts in memory, least recently used first."""
        with self._changed:
            return list(self._slots)

    @contextmanager
    def use(self, index: int) -> Iterator[ModelMixin]:
        """Yield expert `index`, and keep it in memory within the context; a thread may use one expert at a time."""
        if not 0 <= index < self.num_experts:
            raise UserError(f"expert {index}: there are {self.num_experts}, 0 to {self.num_experts - 1}")
        with self._turn, self._changed:
            slot = self._slots.get(index) or self._enter(index)
            self._slots.move_to_end(index)
            slot.users += 1
        try:
            yield slot.model
        finally:
            with self._changed:
                slot.users -= 1
                self._changed.notify_all()

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the experts in memory to a device and a dtype, and load later experts there."""
        with self._turn, self._changed:
            self.device, self.dtype = device, dtype
            for slot in self._slots.values():
                slot.model.to(device=device, dtype=dtype)

    def size(self, index: int) -> int:
        """Return the bytes of an expert's weights in memory."""
        return self.num_weights(index) * self.dtype.itemsize

    def _enter(self, index: int) -> Slot:
        """Make room for an expert and load it; the caller holds `_turn`, so no other thread loads one meanwhile."""
        size = self.size(index) if self.max_bytes is not None else 0
        self._changed.wait_for(lambda: self._make_room(size))
        self._slots[index] = slot = Slot(self.load(index, self.device, self.dtype))
        return slot

    def _make_room(self, size: int) -> bool:
        """Drop unused experts until an expert of `size` bytes fits; return whether it fits."""
        while self._slots and not self._fits(size):
            unused = next((index for index, slot in self._slots.items() if not slot.users), None)
            if unused is None:
                return False
            del self._slots[unused]
        return True

    def _fits(self, size: int) -> bool:
        if self.max_resident is not None and len(self._slots) >= self.max_resident:
            return False
        return self.max_bytes is None or size + sum(map(self.size, self._slots)) <= self.max_bytes


@dataclass(frozen=True)
class Mixture:
    """The experts of a pipeline, and the router that assigns prompts to them.

    router, encoder: the router and its prompt encoder; None if there is a single expert.
    guidance: default guidance scale.
    info: JSON values about the mixture's source, such as `recipe` (a hash) and `method`.
    """

    experts: Experts
    router: Router | None = None
    encoder: PromptEncoder | None = None
    guidance: float = DEFAULT_GUIDANCE
    info: dict[str, Any] = field(default_factory=dict)

    def route(self, prompts: Sequence[str]) -> torch.Tensor:
        """Return the expert index of each prompt, LongTensor (n,); see the function `route`."""
        return route(prompts, self.router, self.encoder)


def route(prompts: Sequence[str], router: Router | None, encoder: PromptEncoder | None) -> torch.Tensor:
    """Return the expert index of each prompt, LongTensor (n,); not safe for threads.

    A prompt's expert does not depend on the other prompts.
    """
    if router is None or encoder is None:
        return torch.zeros(len(prompts), dtype=torch.long)
    return router.route(encoder.encode(list(prompts)))
