"""A decoder-only transformer over packed tokens: RMSNorm, RoPE, grouped-query attention, SwiGLU.

One definition serves trainer and sampler (contract 1). It never sees batches or padding: tokens of any number of
sequences lie end to end in one [T] vector, and an attention object says where keys and values come from:
`bcr.model.attention.PackedAttention` in training, the sampler's KV cache in decoding.

Shape legend: T tokens, H hidden, Q query heads, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from bcr.model import ops
from bcr.model.experts import MixtureOfExperts
from bcr.model.mlp import SwiGLU
from bcr.model.products import linear
from bcr.model.rotary import RopeScaling, Rotary

if TYPE_CHECKING:
    from bcr.model.lora import Adapter

# attention(layer, query[T,Q,D], key[T,K,D], value[T,K,D]) -> [T,Q,D]
Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
Head = Callable[[Tensor, Tensor], Any]  # head(hidden[T,H], head_weight[V,H]) -> whatever its caller makes of them


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and switches, named as in Hugging Face configs. Raises ValueError for sizes that cannot work."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    qk_norm: bool = True
    qkv_bias: bool = False
    tie_word_embeddings: bool = False
    num_experts: int = 0  # 0: a dense model
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    mlp_only_layers: tuple[int, ...] = ()  # layers of a mixture model that are dense

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        for name in (*sizes, "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"model.num_attention_heads is {self.num_attention_heads}, which is no multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}; every key/value head serves a whole number of query heads."
            )
        if self.num_experts and not 1 <= self.num_experts_per_tok <= self.num_experts:
            raise ValueError(
                f"model.num_experts_per_tok is {self.num_experts_per_tok}; it must be from 1 to num_experts = {self.num_experts}."
            )
        if self.num_experts and self.moe_intermediate_size < 1:
            raise ValueError(f"model.moe_intermediate_size is {self.moe_intermediate_size}; it must be at least 1.")
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim is {self.head_dim}; rotary embeddings need an even number.")


class Decoder(nn.Module):
    """input_ids[T], position_ids[T] -> hidden[T,H] after the final norm; logits are `hidden @ head_weight.T`.

    The head is left to its caller because no caller wants the logits of every token: the learner goes through
    `bcr_kernels.linear_logprob`, the sampler needs one row for each sequence. Given as `head`, it runs inside the forward, whose result
    is then the head's: of sharded weights the head's is whole only there.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False  # True: the backward computes each layer's activations again instead of keeping them
        self.invariant = False  # True: the learner's forward takes the sampler's arithmetic, see `bcr.learner.forward`
        self.companions: dict[str, bytes] = {}  # files that came with the checkpoint it was loaded from; see `bcr.model.huggingface`
        self.adapter: Adapter | None = None  # low-rank adapters on its linear layers; see `bcr.model.lora`
        self.embed_tokens = TokenEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = Rotary(config.head_dim, config.rope_theta, config.max_position_embeddings, config.rope_scaling)

    @property
    def head_weight(self) -> Tensor:
        """The output projection [V,H]; the embedding itself where the two are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T,V] of hidden[T,H] for sampling, never rounded below float32: as the learner's head computes them (contract 1)."""
        weight = self.head_weight
        if weight.dtype not in (torch.bfloat16, torch.float16):
            return linear(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        return F.linear(hidden.float(), weight.float())

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention: Attention, head: Head | None = None) -> Any:
        hidden = self.embed_tokens(input_ids)
        rotation = self.rotary(position_ids)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer in self.layers:
            hidden = layer(hidden, rotation, attention, recompute)
        hidden = self.norm(hidden)
        return hidden if head is None else head(hidden, self.head_weight)

    @torch.no_grad()
    def init_weights(self, seed: int, std: float = 0.02) -> Decoder:
        """Normal(0, std) matrices, with the two projections onto the residual stream scaled down by sqrt(2 layers) (GPT-2)."""
        generator = torch.Generator().manual_seed(seed)
        residual_std = std / (2 * self.config.num_hidden_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                onto_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * (residual_std if onto_residual else std))
        return self


class TokenEmbedding(nn.Embedding):
    """The rows of the given ids; on a CPU the gradient of a narrow weight is summed in float32 and rounded once.

    torch adds it up there in the weight's own dtype, where the sum over a frequent token stops growing. On CUDA torch sums in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype == torch.bfloat16 and self.weight.device.type == "cpu":
            return _Lookup.apply(input, self.weight)
        return super().forward(input)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape = weight.shape
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        present, row = ids.unique(return_inverse=True)
        summed = torch.zeros(len(present), ctx.shape[1], dtype=torch.float32).index_add_(0, row, upstream.float())
        gradient = torch.zeros(ctx.shape, dtype=upstream.dtype)
        gradient[present] = summed.to(upstream.dtype)
        return None, gradient


class DecoderLayer(nn.Module):
    """Pre-norm attention and SwiGLU (or a mixture of them), each added to the residual stream."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = feed_forward(config, index)

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention, recompute: bool = False) -> Tensor:
        """`recompute`: the backward makes the activations again. Inside the layer, so that a sharded layer is whole by then."""
        if recompute:
            return checkpoint(self.compute, hidden, rotation, attention, use_reentrant=False, preserve_rng_state=False)
        return self.compute(hidden, rotation, attention)

    def compute(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotation, attention)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


def feed_forward(config: DecoderConfig, index: int) -> nn.Module:
    """The feed-forward block of layer `index`."""
    if config.num_experts == 0 or index in config.mlp_only_layers:
        return SwiGLU(config.hidden_size, config.intermediate_size)
    sizes = config.hidden_size, config.moe_intermediate_size, config.num_experts, config.num_experts_per_tok
    return MixtureOfExperts(*sizes, config.norm_topk_prob)


class SelfAttention(nn.Module):
    """Projections, optional q/k norm (Qwen3), RoPE; the attention itself is the caller's `attention` object."""

    def __init__(self, config: DecoderConfig, index: int) -> None:
        super().__init__()
        self.index, self.eps = index, config.rms_norm_eps
        self.head_dim = config.head_dim
        self.heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
        self.qkv_proj = nn.Linear(config.hidden_size, sum(self.heads) * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attention: Attention) -> Tensor:
        query_heads, key_heads, _ = self.heads
        qkv = self.qkv_proj(hidden).view(hidden.shape[0], sum(self.heads), self.head_dim)
        query_key, value = qkv.split((query_heads + key_heads, key_heads), dim=1)
        norms = None if self.q_norm is None or self.k_norm is None else (self.q_norm.weight, self.k_norm.weight)
        query, key = ops.query_and_key(query_key, query_heads, norms, self.eps, rotation)
        return self.o_proj(attention(self.index, query, key, value).flatten(1))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32 (float64 where x is)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)
