"""Attention over a paged cache, decode and prefill: ours beside its peers. `python -m bench.paged_attention [--help]`.

A case is R sequences with contexts from C / 2 to C, Q queries each, Hq heads, Hkv key heads, D. The limit of a decode step is its keys and
values read once at the rate of a large copy. The peers copy each context out of the cache, then use `scaled_dot_product_attention`: in one
padded batch with a mask, or sequence by sequence. "error" is the largest difference of an output from that of the first peer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bcr_kernels import paged_attention
from bench._protocol import Contender, copy_rate, default_device, matmul_peak, measure, print_header, print_json, print_rows

CUDA_CASES = [
    *((rows, context, 1, 16, 8, 128) for rows, context in ((256, 1024), (64, 4096), (8, 16_384))),
    *((rows, context, 1, 12, 2, 128) for rows, context in ((256, 1024), (8, 16_384))),
    (4, 2048, 1024, 16, 8, 128),
]
CPU_CASES = [(64, 512, 1, 8, 4, 32), (8, 2048, 1, 8, 4, 32), (2, 512, 256, 8, 4, 32)]


@dataclass
class Inputs:
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    tables: Tensor
    contexts: Tensor
    ends: Tensor
    queries: int
    lengths: list[int]


def inputs(case: tuple[int, ...], block_size: int, dtype: torch.dtype, device: str) -> Inputs:
    rows, longest, queries, heads, kv_heads, head_dim = case
    generator = torch.Generator().manual_seed(0)
    lengths = [longest] + [longest // 2 + (longest // 2) * row // rows for row in range(1, rows)]
    needed = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(needed), generator=generator).int()
    tables = torch.zeros(rows, max(needed), dtype=torch.int32)
    for row, ids in enumerate(order.split(needed)):
        tables[row, : len(ids)] = ids
    k, v = (torch.randn(sum(needed), block_size, kv_heads, head_dim, generator=generator).to(device, dtype) for _ in range(2))
    q = torch.randn(rows * queries, heads, head_dim, generator=generator).to(device, dtype)
    contexts = torch.tensor(lengths, dtype=torch.int32, device=device)
    ends = torch.arange(0, rows * queries + 1, queries, dtype=torch.int32, device=device)
    return Inputs(q, k, v, tables.to(device), contexts, ends, queries, lengths)


def ours(x: Inputs) -> Tensor:
    return paged_attention(x.q, x.k_cache, x.v_cache, x.tables, x.contexts, x.ends, max_query_length=x.queries)


def gathered_batch(x: Inputs) -> Tensor:
    """One padded copy of every context and one masked call."""
    rows, longest = len(x.lengths), max(x.lengths)
    keys, values = (cache[x.tables.long()].flatten(1, 2)[:, :longest].transpose(1, 2) for cache in (x.k_cache, x.v_cache))
    place = torch.arange(longest, device=x.q.device)
    last = x.contexts[:, None] - x.queries + torch.arange(x.queries, device=x.q.device)  # [R, Q]
    seen = (place <= last[:, :, None])[:, None]
    q = x.q.view(rows, x.queries, *x.q.shape[1:]).transpose(1, 2)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True).transpose(1, 2).flatten(0, 1)


def gathered_rows(x: Inputs) -> Tensor:
    """Sequence by sequence: no padding, one call each."""
    outs = []
    for row, length in enumerate(x.lengths):
        keys, values = (cache[x.tables[row].long()].flatten(0, 1)[:length].transpose(0, 1)[None] for cache in (x.k_cache, x.v_cache))
        q = x.q[row * x.queries : (row + 1) * x.queries].transpose(0, 1)[None]
        seen = torch.ones(x.queries, length, dtype=torch.bool, device=q.device).tril(length - x.queries)
        outs.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(outs)


PATHS: dict[str, Callable[[Inputs], Tensor]] = {
    "gather, padded batch, sdpa": gathered_batch,
    "gather, each sequence, sdpa": gathered_rows,
    "ours": ours,
}


def run_case(case: tuple[int, ...], block_size: int, device: str, dtype: torch.dtype, copied: float, repeats: int) -> dict[str, Any]:
    rows, longest, queries, heads, kv_heads, head_dim = case
    x = inputs(case, block_size, dtype, device)
    moved = 2 * sum(x.lengths) * kv_heads * head_dim * x.k_cache.element_size() + 2 * x.q.nbytes
    print_header(
        f"R = {rows}, to {longest}, queries {queries}, heads {heads} / {kv_heads} of {head_dim}: limit {moved / copied * 1e3:.3f} ms"
    )
    first = gathered_batch(x)
    contenders = []
    for name, path in PATHS.items():

        def run(path: Callable[[Inputs], Tensor] = path) -> Tensor:
            with torch.no_grad():
                return path(x)

        error = float((run().float() - first.float()).abs().max())
        what = "decode" if queries == 1 else "prefill"
        contenders.append(Contender(name, what, run, [], moved / copied, error))
    results = measure(contenders, peak=1.0, device=device, repeats=repeats)  # the work is a time already: see `limit`
    print_rows(results)
    names = ("sequences", "longest", "queries", "heads", "kv_heads", "head_dim")
    return dict(zip(names, case, strict=True)) | {"limit_seconds": moved / copied, "results": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", metavar="R,C,Q,Hq,Hkv,D", help="instead of the default cases; may be repeated")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=15)
    arguments, device = parser.parse_args(), default_device()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    copied = copy_rate(device)
    print(f"{device}, {dtype}: copy {copied / 1e9:.1f} GB/s; the share is that of the bytes a decode step must read")
    chosen: list[tuple[int, ...]] = CUDA_CASES if device == "cuda" else CPU_CASES
    if arguments.case is not None:
        chosen = [tuple(int(part) for part in text.split(",")) for text in arguments.case]
    cases = [run_case(case, arguments.block_size, device, dtype, copied, arguments.repeats) for case in chosen]
    print_json("paged_attention", device, dtype, matmul_peak(device, dtype), cases)


if __name__ == "__main__":
    main()
