"""Run as a program: peak memory and seconds of one way to compute the head's loss on the CPU, as one line of JSON.

    python tests/kernels/memory_probe.py {forward|policy} {chunked|materialised} T H V

Peak memory is the rise of the resident set above what stands before the call (inputs and, for the policy loss, the gradients that it
returns, which are allocated and touched beforehand and so stand in both).
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr_kernels import LossRule, linear_logprob, linear_policy_loss, policy_loss


def peak_resident() -> int:
    """Bytes: the high-water mark since it was last reset."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def forward(how: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    with torch.no_grad():
        if how == "chunked":
            return linear_logprob(hidden, weight, targets).logprob.sum()
        return F.log_softmax(F.linear(hidden, weight), -1).gather(1, targets[:, None]).sum()


def policy(how: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    length = hidden.shape[0]
    old, ids = torch.full((length,), -12.0), torch.zeros(length, dtype=torch.int64)
    advantages, weights, rule = torch.ones(1), torch.full((length,), 1 / length), LossRule()
    if how == "chunked":
        loss = linear_policy_loss(
            hidden, weight, targets, old_logprobs=old, segment_ids=ids, advantages=advantages, weights=weights, rule=rule
        ).loss
    else:
        logprob = F.log_softmax(F.linear(hidden, weight), -1).gather(1, targets[:, None]).squeeze(1)
        loss = policy_loss(logprob, old, advantages[ids], weights, rule)[0].sum()
    loss.backward()
    return loss


def main() -> None:
    what, how = sys.argv[1:3]
    length, width, vocab = map(int, sys.argv[3:6])
    torch.manual_seed(0)
    with_gradient = what == "policy"
    hidden = torch.randn(length, width).requires_grad_(with_gradient)
    weight = (torch.randn(vocab, width) / width**0.5).requires_grad_(with_gradient)
    targets = torch.randint(0, vocab, (length,))
    run = policy if with_gradient else forward
    run(how, hidden[:8].detach().requires_grad_(with_gradient), weight[:64].detach().requires_grad_(with_gradient), targets[:8] % 64)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_resident()
    start, cpu = time.perf_counter(), time.process_time()
    value = run(how, hidden, weight, targets).item()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    returned = sum(tensor.grad.nbytes for tensor in (hidden, weight) if tensor.grad is not None)
    peak = peak_resident() - before - returned
    print(json.dumps({"what": what, "how": how, "value": value, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
