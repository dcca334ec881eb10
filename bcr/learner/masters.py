"""AdamW for working weights that are narrower than float32: masters, moments and accumulated gradients stay in float32 (contract 4).

At a rate of 1e-6 an update is far below the rounding of a bfloat16 weight, so a plain bfloat16 optimizer hardly moves (arXiv 1710.03740).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)


class MasterAdamW(torch.optim.AdamW):
    """AdamW whose parameters are the masters of `weights`: float32 copies of the narrow ones, the others themselves.

    `step` updates the masters and writes the weights in place, rounded to nearest: whoever shares their storage sees the new ones. Inside
    `collecting()` a gradient that backward makes for a narrow weight is added to its master's, in float32, and freed at once.
    `state_dict` holds the masters too, for they are more than the weights tell.
    """

    def __init__(self, weights: Iterable[Tensor], **options: Any) -> None:
        weights = list(weights)
        masters = [weight.detach().float() if weight.dtype in NARROW else weight for weight in weights]
        super().__init__(masters, **options)
        self.master_of = {weight: master for weight, master in zip(weights, masters, strict=True) if master is not weight}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """While this lasts, gradients of narrow weights go to their masters."""
        hooks = [weight.register_post_accumulate_grad_hook(self._collect) for weight in self.master_of]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _collect(self, weight: Tensor) -> None:
        if weight.grad is None:  # the operation has added it to `accumulator(weight)`
            return
        master = self.master_of[weight]
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad.add_(weight.grad)
        weight.grad = None

    def accumulator(self, weight: Tensor) -> Tensor | None:
        """The float32 gradient of a narrow weight, zeros at first, for an operation that adds to it itself; None for other weights."""
        master = self.master_of.get(weight)
        if master is None:
            return None
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        return master.grad

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = super().step(closure)
        self._write()
        return loss

    @torch.no_grad()
    def _write(self) -> None:
        if self.master_of:
            torch._foreach_copy_(list(self.master_of), list(self.master_of.values()))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "masters": [master.detach() for master in self.master_of.values()]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Also puts the masters back, and the weights that follow from them. ValueError for a state of another precision."""
        saved = state_dict["masters"]
        if [tuple(master.shape) for master in saved] != [tuple(master.shape) for master in self.master_of.values()]:
            raise ValueError(
                f"the optimizer's state has {len(saved)} float32 masters and the model needs {len(self.master_of)} of its own shapes; "
                "resume with the model.dtype that the run began with."
            )
        super().load_state_dict({name: value for name, value in state_dict.items() if name != "masters"})
        for master, value in zip(self.master_of.values(), saved, strict=True):
            master.copy_(value)
        self._write()
