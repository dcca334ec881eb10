"""GSPO: the ratio of a whole rollout in place of each token's (arXiv 2507.18071, eq. 5 to 7 and, for advantages by token, 13 and 14).

    s = exp(mean over the rollout's tokens of (logprob - old_logprob))

is clipped like a token's ratio; its gradient reaches every token of the rollout alike. Where the advantages of a rollout's segments
differ, s is the same for all of them and each token keeps its own advantage (GSPO-token); where they are equal, that is GSPO itself. The
clips are those of a mean, so they are small: the paper has 3e-4 below and 4e-4 above.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bcr.learner.losses import SequenceRule
from bcr.learner.packs import Pack
from bcr_kernels import LossRule, policy_loss


def sequence_policy_loss(logprobs: Tensor, pack: Pack, rule: SequenceRule) -> tuple[Tensor, dict[str, Tensor]]:
    """The pack's share of the loss, and its metrics (those of `policy_loss`), from log-probs [C] with their gradient.

    `clipped_*`, `ratio_sum` and `loss_sum` are of the rollouts' ratios; mismatch and KL are of the tokens.
    """
    inside = pack.segment_ids >= 0
    advantages = torch.where(inside, pack.advantages[pack.segment_ids.clamp(min=0)], 0.0)
    log_ratio = torch.where(inside, logprobs - pack.old_logprobs, 0.0)
    of_rollout = rollout_means(log_ratio.detach(), inside, pack.counts)
    same_ratio = pack.old_logprobs + of_rollout + logprobs - logprobs.detach()  # s in value, each token's own in gradient
    plain = LossRule(clip_low=rule.clip_low, clip_high=rule.clip_high, importance_cap=rule.importance_cap)
    vectors = (pack.old_logprobs, advantages, pack.weights)
    losses, metrics = policy_loss(same_ratio, *vectors, plain, behaviour_logprobs=pack.behaviour_logprobs)
    of_tokens = policy_loss(logprobs.detach(), *vectors, plain, behaviour_logprobs=pack.behaviour_logprobs)[1]
    metrics |= {name: value for name, value in of_tokens.items() if "mismatch" in name or name == "policy_kl_sum"}
    loss = losses.sum()
    if rule.kl_coef > 0:
        silent = (pack.old_logprobs, torch.zeros_like(advantages), pack.weights)
        towards, kl = policy_loss(logprobs, *silent, replace(rule, importance_cap=None), reference_logprobs=pack.reference_logprobs)
        loss = loss + towards.sum()
        metrics |= {"loss_sum": metrics["loss_sum"] + kl["loss_sum"], "reference_kl_sum": kl["reference_kl_sum"], "tokens": kl["tokens"]}
    return loss, metrics


def rollout_means(values: Tensor, inside: Tensor, counts: list[int]) -> Tensor:
    """values[C] -> [C]: for each token the mean over the tokens of its rollout that are `inside`; float64 sums in a fixed order.

    >>> rollout_means(torch.tensor([0.0, 1.0, 2.0, 0.0, 5.0]), torch.tensor([False, True, True, False, True]), [3, 2]).tolist()
    [1.5, 1.5, 1.5, 5.0, 5.0]
    """
    sizes = torch.tensor(counts, device=values.device)
    ends = sizes.cumsum(0)

    def totals(column: Tensor) -> Tensor:
        running = torch.nn.functional.pad(column.double().cumsum(0), (1, 0))
        return running[ends] - running[ends - sizes]

    means = totals(torch.where(inside, values, 0.0)) / totals(inside).clamp(min=1)
    return means.to(values.dtype).repeat_interleave(sizes, output_size=values.shape[0])
