"""Our own sampler: batched decoding over a KV cache with the very decoder that is being trained."""

from bcr.records import Request, Rollout
from bcr.sampler.engine import Sampler
from bcr.sampler.sampling import SamplingParams

__all__ = ["Request", "Rollout", "Sampler", "SamplingParams"]
