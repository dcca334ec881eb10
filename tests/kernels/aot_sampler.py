"""Run as a program: compile the sampler's kernels ahead of time and print registers, spills and shared memory; see `aot.py`.

python tests/kernels/aot_sampler.py [fast|full]
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import triton
from aot import NAMES, SHARED_LIMIT, UNALIGNED_WIDTH, WIDTH, assemble, compiled_side_by_side, signature
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bcr_kernels._triton import attention_kernels, attention_tiles, kernels, sample_kernels, tiles
from bcr_kernels._triton.attention_tiles import AttentionTile
from bcr_kernels._triton.tiles import Tile

Capability = tuple[int, int]
Result = dict[str, Any]


def compile_one(
    kernel: Any, capability: Capability, dtype: torch.dtype, types: dict[str, str], constants: dict[str, Any], *, warps: int, stages: int
) -> Result:
    """What ptxas and the generated code say of one kernel on one device."""
    types = {argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names}
    multiples = {"q_stride", "k_stride", "v_stride"}  # of 16 elements, as the launcher finds them
    aligned = {(place,): [["tt.divisibility", 16]] for place, (name, kind) in enumerate(types.items()) if "*" in kind or name in multiples}
    architecture = capability[0] * 10 + capability[1]
    options = {"num_warps": warps, "num_stages": stages}
    compiled = triton.compile(ASTSource(kernel, types, constants, aligned), target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    log = assemble(ptx, architecture)
    return {
        "kernel": kernel.__name__,
        "device": f"sm_{architecture}",
        "dtype": NAMES[dtype],
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),  # type: ignore[index]
        "spill_bytes": sum(int(count) for count in re.findall(r"(\d+) bytes spill", log)),
        "threads": 32 * warps,
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "mma": ptx.count("mma.sync"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "async": ptx.count("cp.async."),
        "tf32": ptx.count("tf32"),
    }


def sample_case(capability: Capability, dtype: torch.dtype, tile: Tile, width: int, noisy: bool) -> Result:
    tile = tiles.sample_tile(tile)
    types = signature(dtype, tile, tile.tma) | {"keys": "*i64", "noisy": "*fp32", "best": "*fp32", "token": "*i32"}
    constants = {"WIDTH": width, "ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth, "GROUP": tile.group, "TMA": tile.tma}
    constants |= {} if noisy else {"noisy": None}
    result = compile_one(sample_kernels.sample_kernel, capability, dtype, types, constants, warps=tile.warps, stages=tile.stages)
    loads = "tma" if tile.tma else "pointers"
    return result | {"tile": f"{tile.rows}x{tile.cols}x{tile.depth}", "variant": f"{loads}, {'sampled' if noisy else 'greedy'}"}


def attention_case(
    capability: Capability, dtype: torch.dtype, tile: AttentionTile, head_dim: int, group: int, block_size: int, decode: bool
) -> Result:
    """Registers do not depend on the batch, the table or the context: these are run-time arguments."""
    data = f"*{NAMES[dtype]}"
    types = dict.fromkeys(("q", "k_cache", "v_cache", "out"), data)
    types |= dict.fromkeys(("block_tables", "context_lengths", "cu_query_lengths"), "*i32") | dict.fromkeys(
        ("span_out", "span_lse"), "*fp32"
    )
    types |= {"scale": "fp32"} | dict.fromkeys(("q_stride", "sequences", "table_width"), "i32")
    constants = {"KV_HEADS": 2, "GROUP": group, "HEAD_DIM": head_dim, "BLOCK_SIZE": block_size, "ROWS": tile.rows, "COLS": tile.cols}
    constants |= {"DIM": max(16, triton.next_power_of_2(head_dim)), "DECODE": decode, "SPAN": attention_tiles.SPAN}
    result = compile_one(attention_kernels.attention_kernel, capability, dtype, types, constants, warps=tile.warps, stages=tile.stages)
    variant = f"{'decode' if decode else 'prefill'}, D={head_dim}, {group} heads to a key head, blocks of {block_size}"
    return result | {"tile": f"{tile.rows}x{tile.cols}", "variant": variant}


def small_case(capability: Capability, dtype: torch.dtype, which: int) -> Result:
    """The merge, the store or the sum of partial sums."""
    data = f"*{NAMES[dtype]}"
    merge = dict.fromkeys(("span_out", "span_lse"), "*fp32") | dict.fromkeys(("context_lengths", "cu_query_lengths"), "*i32")
    merge |= {"out": data, "sequences": "i32"}
    merge_constants = {"HEADS": 16, "HEAD_DIM": 128, "DIM": 128, "SPAN": attention_tiles.SPAN}
    store = dict.fromkeys(("k", "v", "k_cache", "v_cache"), data) | {"slots": "*i64", "k_stride": "i32", "v_stride": "i32"}
    sums = {"partials": "*fp32", "sums": "*fp32", "rows": "i32", "tiles": "i32"}
    sum_constants = {"ROWS": tiles.SUM_ROWS, "TILES": tiles.SUM_TILES}
    chosen: list[tuple[Any, dict[str, str], dict[str, Any], int]] = [
        (attention_kernels.merge_spans_kernel, merge, merge_constants, 1),
        (attention_kernels.store_kernel, store, {"WIDTH": 1024, "PADDED": 1024}, 4),
        (kernels.sum_partials_kernel, sums, sum_constants, 4),
    ]
    kernel, types, constants, warps = chosen[which]
    return compile_one(kernel, capability, dtype, types, constants, warps=warps, stages=3) | {"tile": "", "variant": ""}


def attention_shapes(full: bool) -> list[tuple[int, int, int]]:
    """(head dimension, query heads to a key head, block size). Not all are powers of two."""
    if not full:
        return [(128, 2, 16)]
    return [(128, 2, 16), (128, 7, 256), (64, 6, 16), (80, 3, 5), (256, 4, 16), (32, 1, 16), (64, 64, 16)]


def cases(full: bool) -> list[Callable[[], Result]]:
    """ "fast": what the sampler of a bfloat16 model with heads of 128 uses on 8.0, 9.0 and 10.0."""
    chosen: list[Callable[[], Result]] = []
    capabilities: list[Capability] = [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)] if full else [(8, 0), (9, 0), (10, 0)]
    for capability in capabilities:
        for dtype in (torch.bfloat16, torch.float32) if full else (torch.bfloat16,):
            tile = tiles.nearest_tile(capability, dtype)
            widths = [(tile, WIDTH), (tiles.UNALIGNED_TILE, UNALIGNED_WIDTH)] if full and tile.tma else [(tile, WIDTH)]
            for used, width in widths:
                chosen += [partial(sample_case, capability, dtype, used, width, noisy) for noisy in ((True, False) if full else (True,))]
            for head_dim, group, block_size in attention_shapes(full):
                q = torch.empty(1, 1, head_dim, dtype=dtype)
                for decode in (True, False):
                    of_shape = attention_tiles.decode_tile(q, group) if decode else attention_tiles.prefill_tile(q, capability)
                    chosen.append(partial(attention_case, capability, dtype, of_shape, head_dim, group, block_size, decode))
            chosen += [partial(small_case, capability, dtype, which) for which in range(3)] if full else []
    return chosen


def call(case: Callable[[], Result]) -> Result:
    return case()


def main() -> None:
    print(f"triton {triton.__version__}")
    results = list(compiled_side_by_side(call, cases(sys.argv[1:] == ["full"])))
    for r in results:
        row = f"{r['kernel']:22} {r['device']:6} {r['dtype']:5} {r['tile']:11} {r['registers']:4} {r['spill_bytes']:6} {r['shared']:7}"
        print(f"{row} wgmma={r['wgmma']} tcgen05={r['tcgen05']} mma={r['mma']} async={r['async']}  {r['variant']}")
    print(json.dumps(results))


if __name__ == "__main__":
    main()
