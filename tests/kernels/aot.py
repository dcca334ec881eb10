"""Run as a program: compile the kernels ahead of time, without a GPU, and print registers, spills and shared memory of each.

    python tests/kernels/aot.py [fast|full]

Every shipped tile is compiled for its own compute capability, and ptxas, which comes with Triton, reports what the hardware would get.
The last line is one JSON list. Must not run under TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from bcr_kernels._triton import kernels, tiles
from bcr_kernels._triton.tiles import Tile

WIDTH, VOCAB = 1536, 151_936
UNALIGNED_WIDTH = 1540  # rows of 3080 bytes: TMA cannot read them
SHARED_LIMIT = {(8, 0): 166_912, (8, 6): 101_376, (9, 0): 232_448, (10, 0): 232_448, (12, 0): 101_376}  # bytes a block may ask for
NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "exponentials_kernel": [{"STORE": store, "ENTROPY": entropy} for store in (True, False) for entropy in (True, False)],
    "rescue_kernel": [{"STORE": store, "ENTROPY": entropy} for store in (True, False) for entropy in (True, False)],
    "logit_gradient_kernel": [{}, {"entropy_slope": None}],
    "target_logit_kernel": [{}],
}


def signature(dtype: torch.dtype, tile: Tile, tma: bool) -> dict[str, str]:
    """The type of every argument that any of the kernels has."""
    data, vectors = NAMES[dtype], ("scale", "anchor", "log_total", "slope", "entropy_slope", "partials", "sums", "out")
    types = dict.fromkeys(vectors, "*fp32") | {"targets": "*i64", "overflowed": "*i8", "rows": "i32", "vocab": "i32"}
    types |= dict.fromkeys(("hidden", "weight", "exponentials", "gradient"), f"*{data}")
    if tma:
        types |= {"hidden": f"tensordesc<{data}[{tile.rows},{tile.depth}]>", "weight": f"tensordesc<{data}[{tile.cols},{tile.depth}]>"}
    return types


def compile_one(
    name: str, capability: tuple[int, int], dtype: torch.dtype, tile: Tile, width: int, variant: dict[str, Any]
) -> dict[str, Any]:
    """One kernel, one tile, one device: what ptxas and the generated code say."""
    kernel = getattr(kernels, name)
    tma = tile.tma and name in ("exponentials_kernel", "logit_gradient_kernel")
    constants: dict[str, Any] = {"WIDTH": width, "PITCH": -(-VOCAB // tile.cols) * tile.cols, "GROUP": tile.group, "TMA": tma}
    constants |= {"ROWS": tile.rows, "COLS": tile.cols, "DEPTH": tile.depth} | variant
    if name == "target_logit_kernel":
        constants |= {"ROWS": tiles.TARGET_ROWS, "DEPTH": tiles.TARGET_DEPTH}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = signature(dtype, tile, tma)
    types = {argument: "constexpr" if argument in constants else types[argument] for argument in kernel.arg_names}
    aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types.values()) if kind.startswith("*")}
    source = ASTSource(kernel, types, constants, aligned)
    architecture = capability[0] * 10 + capability[1]
    options = {"num_warps": 4 if name == "target_logit_kernel" else tile.warps, "num_stages": tile.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    log = assemble(ptx, architecture)
    return {
        "kernel": name,
        "device": f"sm_{architecture}",
        "dtype": NAMES[dtype],
        "tile": f"{tile.rows}x{tile.cols}x{tile.depth}",
        "loads": "tma" if tma else "pointers",
        "variant": ", ".join(f"{key}={value}" for key, value in variant.items()),
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),  # type: ignore[index]
        "spill_bytes": sum(int(count) for count in re.findall(r"(\d+) bytes spill", log)),
        "threads": 32 * options["num_warps"],
        "shared": compiled.metadata.shared,
        "shared_limit": SHARED_LIMIT[capability],
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "mma": ptx.count("mma.sync"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "tf32": ptx.count("tf32"),
    }


def assemble(ptx: str, architecture: int) -> str:
    """What `ptxas -v` says of the code."""
    name = f"sm_{architecture}" + ("a" if architecture >= 90 else "")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(architecture).path, "-v", f"--gpu-name={name}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def cases(full: bool) -> list[tuple]:
    """(kernel, capability, dtype, tile, width, variant). "fast": three devices, and one variant of all but the main kernel."""
    chosen = []
    for (capability, dtype), tile in tiles.TILES.items():
        targets = [capability] if dtype == torch.bfloat16 else [(8, 0), (9, 0), (10, 0)]  # the float32 tile serves all
        for target in targets:
            for name, variants in VARIANTS.items():
                shipped = tiles.RESCUE_TILE if name == "rescue_kernel" else tile
                for variant in variants if full or name == "exponentials_kernel" else variants[:1]:
                    chosen.append((name, target, dtype, shipped, WIDTH, variant))
                    if full and tile.tma:
                        chosen.append(
                            (name, target, dtype, shipped if name == "rescue_kernel" else tiles.UNALIGNED_TILE, UNALIGNED_WIDTH, variant)
                        )
    if full:
        return chosen
    main = ((8, 0), (9, 0), (10, 0))
    return [case for case in chosen if case[1] in main and (case[2] == torch.bfloat16 or case[1] == (9, 0))]


def compiled_side_by_side(call: Callable[[Any], Any], cases: list[Any]) -> Iterator[Any]:
    """`call` of every case in order, on all cores."""
    with multiprocessing.get_context("fork").Pool() as pool:
        yield from pool.imap(call, cases)


def compile_case(case: tuple) -> dict:
    return compile_one(*case)


def main() -> None:
    results = []
    print(f"triton {triton.__version__}")
    print(f"{'kernel':22} {'device':6} {'dtype':5} {'tile':11} {'loads':8} {'regs':>4} {'spills':>6} {'shared':>7}  variant")
    for r in compiled_side_by_side(compile_case, cases(sys.argv[1:] == ["full"])):
        results.append(r)
        row = f"{r['kernel']:22} {r['device']:6} {r['dtype']:5} {r['tile']:11} {r['loads']:8} {r['registers']:4} {r['spill_bytes']:6}"
        print(f"{row} {r['shared']:7}  {r['variant']}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
