"""Low-rank adapters (LoRA, arXiv 2106.09685) over the decoder's linear layers: y = W x + alpha / rank * B A x, with W frozen.

The side path is computed as written, in one module that trainer and sampler share, so they see the same function (contract 1). The other
way, a working copy W + alpha / rank * B A rewritten after each update, would hold every adapted weight twice, round small updates away in
bfloat16, and cost the backward the full gradient of W, from which those of A and B would follow. Here the weights stand once; what is
trained, with its gradient, float32 master and moments, is rank * (inputs + outputs) numbers a matrix; a step does two thirds of the
arithmetic of full training; a forward does rank * (inputs + outputs) multiply-adds a token more, in two narrow products for each matrix.

Checkpoints hold the merged weights, and beside them the adapter alone (`adapter_files.py`). There is no dropout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from bcr.model.decoder import Decoder, DecoderConfig
from bcr.model.weights import FUSED, part_sizes

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Adapter:
    """Sizes and scale of a model's adapters. `base`: the path or hub name of the model without them."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    base: str | None = None

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def numbers(self, config: DecoderConfig) -> int:
        """How many numbers are trained in a dense decoder of these sizes."""
        hidden, inner = config.hidden_size, config.intermediate_size
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        both = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": query, "gate_proj": inner, "up_proj": inner, "down_proj": inner}
        return config.num_hidden_layers * self.rank * sum(hidden + both[target] for target in self.targets)


class LoraLinear(nn.Linear):
    """A frozen linear layer with adapters on spans of its outputs: one span for each part of a fused matrix that is a target.

    lora_A[P*rank, inputs] and lora_B[outputs of the P spans, rank] hold the parts below one another.
    """

    def __init__(self, base: nn.Linear, spans: Mapping[str, tuple[int, int]], adapter: Adapter) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.spans, self.scale, self.rank = dict(spans), adapter.scale, adapter.rank
        rows = sum(stop - start for start, stop in spans.values())
        self.lora_A = nn.Parameter(base.weight.new_zeros(len(spans) * adapter.rank, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_zeros(rows, adapter.rank))

    def forward(self, input: Tensor) -> Tensor:
        rows = input.contiguous()  # they may lie across, see `bcr.model.products`
        return _AdaptedLinear.apply(rows, self.weight, self.bias, self.lora_A, self.lora_B, [*self.spans.values()], self.scale)

    def parts(self) -> Iterator[tuple[str, tuple[int, int], Tensor, Tensor]]:
        """(target, its span of the outputs, A[rank, inputs], B[outputs, rank]) of each adapted part; A and B are views."""
        matrices = zip(self.lora_A.detach().split(self.rank), _split(self.lora_B.detach(), self.spans.values()), strict=True)
        for (name, span), (down, up) in zip(self.spans.items(), matrices, strict=True):
            yield name, span, down, up

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + scale * B A [outputs, inputs], computed in float32 (float64 where W is) and rounded once."""
        wide = self.weight.detach().to(torch.promote_types(self.weight.dtype, torch.float32), copy=True)
        for _, (start, stop), down, up in self.parts():
            wide[start:stop].addmm_(up.to(wide.dtype), down.to(wide.dtype), alpha=self.scale)
        return wide.to(self.weight.dtype)


class _AdaptedLinear(torch.autograd.Function):
    """One product for W, one for all of A, and for each span one that is added in place; in the backward no gradient of W."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, spans: Sequence[tuple[int, int]], scale: float
    ) -> Tensor:
        out, inner = F.linear(x, weight, bias), F.linear(x, down)
        for (start, stop), h, b in zip(spans, inner.chunk(len(spans), dim=1), _split(up, spans), strict=True):
            out[:, start:stop].addmm_(h, b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, inner)
        ctx.spans, ctx.scale = spans, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, inner = ctx.saved_tensors
        inner_grad, up_grad = torch.empty_like(inner), torch.empty_like(up)
        pieces = zip(
            ctx.spans,
            *(t.chunk(len(ctx.spans), dim=1) for t in (inner, inner_grad)),
            *(_split(t, ctx.spans) for t in (up, up_grad)),
            strict=True,
        )
        for (start, stop), h, h_grad, b, b_grad in pieces:
            here = upstream[:, start:stop]
            torch.mm(here, b, out=h_grad).mul_(ctx.scale)
            torch.mm(here.t(), h, out=b_grad).mul_(ctx.scale)
        x_grad = torch.mm(upstream, weight).addmm_(inner_grad, down) if ctx.needs_input_grad[0] else None
        return x_grad, None, None, torch.mm(inner_grad.t(), x), up_grad, None, None


def _split(stacked: Tensor, spans: Any) -> tuple[Tensor, ...]:
    return stacked.split([stop - start for start, stop in spans])


# ---- on a decoder -------------------------------------------------------------------------------------------------------------


def attach(model: Decoder, adapter: Adapter) -> Decoder:
    """Freeze the decoder and put adapters of zeros on its targets. ValueError for experts: peft's files have no place for theirs."""
    if model.config.num_experts and {*adapter.targets} & {*TARGETS[4:]}:
        raise ValueError(
            f"model.lora.targets is {list(adapter.targets)}; of a mixture of experts only {', '.join(TARGETS[:4])} can be adapted."
        )
    model.requires_grad_(False)
    for path, linear in [*model.layers.named_modules()]:
        owner, _, name = path.rpartition(".")
        spans = _spans(model, name, linear, adapter.targets)
        if spans:
            setattr(model.layers.get_submodule(owner), name, LoraLinear(linear, spans, adapter))
    model.adapter = adapter
    return model


def _spans(model: Decoder, name: str, linear: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Where the targets that this layer holds lie among its outputs."""
    spans, start = {}, 0
    names = FUSED.get(name, (name,))
    if not {*names} & {*targets}:
        return {}
    assert isinstance(linear, nn.Linear)
    for part, size in zip(names, part_sizes(name, linear.out_features, model.config), strict=True):
        if part in targets:
            spans[part] = (start, start + size)
        start += size
    return spans


@torch.no_grad()
def initialise(model: Decoder, seed: int) -> Decoder:
    """A uniform in +-1 / sqrt(inputs), B zero (as in peft): the model starts as its base."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        bound = 1 / math.sqrt(layer.in_features)
        layer.lora_A.copy_((2 * torch.rand(layer.lora_A.shape, generator=generator) - 1) * bound)
        layer.lora_B.zero_()
    return model


def merged_state(model: Decoder) -> dict[str, Tensor]:
    """The state dict of a plain decoder that computes the same."""
    layers = adapted_layers(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith((".lora_A", ".lora_B"))}
    return {**state, **{f"{name}.weight": layer.merged() for name, layer in layers.items()}}


def empty_twin(model: Decoder) -> Decoder:
    """A decoder of the same shape, adapters included, on the meta device."""
    with torch.device("meta"):
        twin = Decoder(model.config)
        return twin if model.adapter is None else attach(twin, model.adapter)


def adapted_layers(model: Decoder) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


# ---- in peft's files ----------------------------------------------------------------------------------------------------------
