"""The gate that needs no GPU: every shipped tile compiles for its device without spills, fits it, and uses the right units."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import bcr_kernels

PROGRAM = Path(__file__).with_name("aot.py")
OLDEST_TRITON = "3.6.0"  # what torch 2.11 brings
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


def environment(tmp_path: Path, *overlay: str) -> dict[str, str]:
    """Without the interpreter, with a cache of its own, and with `overlay` before the installed packages."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([*overlay, str(Path(bcr_kernels.__file__).parents[1])])
    return {**inherited, "PYTHONPATH": path, "TRITON_CACHE_DIR": str(tmp_path / "cache")}


def compiled(mode: str, variables: dict[str, str], program: Path = PROGRAM) -> list[dict]:
    run = subprocess.run([sys.executable, str(program), mode], env=variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    *table, last = run.stdout.splitlines()
    print("\n".join(table))
    return json.loads(last)


def check(results: list[dict]) -> None:
    for r in results:
        what = f"{r['kernel']} {r['device']} {r['dtype']} {r['loads']} {r['variant']}"
        assert r["spill_bytes"] == 0, f"{what}: {r['spill_bytes']} bytes of registers spilled"
        assert r["shared"] <= r["shared_limit"], f"{what}: {r['shared']} bytes of shared memory"
        assert r["registers"] * r["threads"] <= 65_536, what
        if r["kernel"] == "target_logit_kernel":
            continue
        if r["dtype"] == "fp32":
            assert r["tf32"] == r["wgmma"] == r["tcgen05"] == r["mma"] == 0, f"{what}: float32 on tensor cores"
        else:
            newest = {} if r["kernel"] == "rescue_kernel" else {"sm_90": "wgmma", "sm_100": "tcgen05"}
            assert r[newest.get(r["device"], "mma")] > 0, f"{what}: no tensor cores, or older ones than the device has"
            assert (r["tma"] > 0) == (r["loads"] == "tma"), what


def test_main_configurations(tmp_path: Path) -> None:
    results = compiled("fast", environment(tmp_path))
    check(results)
    assert {(r["device"], r["kernel"]) for r in results if r["dtype"] == "bf16"} == {
        (device, kernel)
        for device in ("sm_80", "sm_90", "sm_100")
        for kernel in ("exponentials_kernel", "rescue_kernel", "logit_gradient_kernel", "target_logit_kernel")
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_configuration(tmp_path: Path) -> None:
    check(compiled("full", environment(tmp_path)))


def oldest_triton(tmp_path: Path) -> dict[str, str]:
    """The environment with an older Triton laid over the installed one (numpy below 2.4: its interpreter needs that)."""
    overlay = tmp_path / "overlay"
    packages = [f"triton=={OLDEST_TRITON}", "numpy<2.4"]
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(overlay), *packages], check=True)
    variables = environment(tmp_path, str(overlay))
    version = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__version__)"], env=variables, capture_output=True, text=True
    )
    assert version.stdout.strip() == OLDEST_TRITON
    return variables


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_oldest_triton(tmp_path: Path) -> None:
    variables = oldest_triton(tmp_path)
    check(compiled("full", variables))
    folder = PROGRAM.with_name("interpreter")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    run = subprocess.run(command, env={**variables, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]
