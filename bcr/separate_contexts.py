"""N problems in N contexts that draw on one shared budget: the control that keeps BCR's budget and takes its context away.

A rollout of a bundle is a chain. Problem 1 is asked alone and may spend the whole budget; problem 2 is asked alone, with what is left; and
so on. A problem that finds nothing left is not answered. With N = 1 this is the ordinary rollout, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bcr.records import Bundle, Request, Rollout
from bcr.sampler import Sampler, SamplingParams


def sample_chains(sampler: Sampler, bundles: Sequence[Bundle], params: SamplingParams) -> list[list[Rollout]]:
    """`params.n` chains for each bundle, as one rollout each. N calls of `generate`: the k-th asks all k-th problems that have budget.

    The first problem is asked under the bundle's id, as an ordinary bundle is; a later one under an id of its own for each sample, for
    their budgets differ. So the tokens of a chain depend on its bundle and its sample alone, not on the others.
    """
    first = sampler.generate([Request(bundle.id, prompts_of(bundle)[0], bundle.budget) for bundle in bundles], params)
    chains = [[[rollout] for rollout in group] for group in first]
    single = replace(params, n=1)
    for place in range(1, max((len(bundle.problems) for bundle in bundles), default=0)):
        going, requests = [], []
        for bundle, group in zip(bundles, chains, strict=True):
            for sample, chain in enumerate(group):
                left = bundle.budget - sum(len(part.token_ids) for part in chain)
                if place < len(bundle.problems) and left > 0:
                    going.append(chain)
                    requests.append(Request(f"{bundle.id}/problem{place}/sample{sample}", prompts_of(bundle)[place], left))
        for chain, (part,) in zip(going, sampler.generate(requests, single), strict=True):
            chain.append(part)
    return [[joined(bundle, chain) for chain in group] for bundle, group in zip(bundles, chains, strict=True)]


def joined(bundle: Bundle, chain: Sequence[Rollout]) -> Rollout:
    """The parts of a chain as one rollout. It ends with "stop" if the last problem of the bundle was reached and its answer ended so."""
    whole = len(chain) == len(bundle.problems) and chain[-1].finish == "stop"
    return Rollout(
        bundle.id,
        [token for part in chain for token in part.token_ids],
        [logprob for part in chain for logprob in part.logprobs],
        "stop" if whole else "length",
        chain[0].policy_version,
        [len(part.token_ids) for part in chain] + [0] * (len(bundle.problems) - len(chain)),
    )


def prompts_of(bundle: Bundle) -> list[list[int]]:
    assert bundle.prompts is not None
    return bundle.prompts
