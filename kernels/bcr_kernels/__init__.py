"""Log-prob, entropy, policy loss and samples from hidden states, with no [tokens, vocabulary] tensor in memory; paged attention.

Triton is imported on the first call that runs on CUDA, so the package imports (and runs on a CPU) where Triton is missing.
"""

from bcr_kernels._checks import set_debug
from bcr_kernels.linear_logprob import LogProbs, linear_logprob
from bcr_kernels.linear_policy_loss import PolicyLossOutput, linear_policy_loss
from bcr_kernels.linear_sample import Sample, linear_sample
from bcr_kernels.paged_attention import paged_attention, store_kv
from bcr_kernels.policy_loss import LossRule, add_metrics, policy_loss
from bcr_kernels.segments import (
    problem_mean_weights,
    segment_counts,
    segment_ids_from_boundaries,
    sequence_ids_from_cu_seqlens,
    sequence_mean_token_mean_weights,
    sequence_mean_token_sum_weights,
    token_mean_weights,
)

__all__ = [
    "LogProbs",
    "LossRule",
    "PolicyLossOutput",
    "Sample",
    "add_metrics",
    "linear_logprob",
    "linear_policy_loss",
    "linear_sample",
    "paged_attention",
    "policy_loss",
    "problem_mean_weights",
    "segment_counts",
    "segment_ids_from_boundaries",
    "sequence_ids_from_cu_seqlens",
    "sequence_mean_token_mean_weights",
    "sequence_mean_token_sum_weights",
    "set_debug",
    "store_kv",
    "token_mean_weights",
]
