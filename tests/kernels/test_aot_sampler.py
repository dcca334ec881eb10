"""The gate of `test_aot.py` for the sampler's kernels: no spills, shared memory that fits, and the units that the device has."""

import importlib.util
from pathlib import Path

import pytest
from test_aot import compiled, environment, oldest_triton

PROGRAM = Path(__file__).with_name("aot_sampler.py")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


STATED_SPILLS = {("attention_kernel", "fp32"): 24}  # bytes, as docs/kernels.md says


def check(results: list[dict]) -> None:
    for r in results:
        allowed = STATED_SPILLS.get((r["kernel"], r["dtype"]), 0)
        what = f"{r['kernel']} {r['device']} {r['dtype']} {r['tile']} {r['variant']}"
        assert r["spill_bytes"] <= allowed, f"{what}: {r['spill_bytes']} bytes of registers spilled"
        assert r["shared"] <= r["shared_limit"], f"{what}: {r['shared']} bytes of shared memory"
        assert r["registers"] * r["threads"] <= 65_536, what
        if r["dtype"] == "fp32":
            assert r["tf32"] == r["wgmma"] == r["tcgen05"] == r["mma"] == 0, f"{what}: float32 on tensor cores"
        elif r["kernel"] == "sample_kernel" or r["variant"].startswith("prefill"):
            newest = {"sm_90": "wgmma", "sm_100": "tcgen05"}
            assert r[newest.get(r["device"], "mma")] > 0, f"{what}: no tensor cores, or older ones than the device has"
            assert (r["tma"] > 0) == ("tma" in r["variant"]), what
        elif r["variant"].startswith("decode"):
            assert r["mma"] + r["wgmma"] + r["tcgen05"] > 0, f"{what}: no tensor cores"
        if r["kernel"] == "attention_kernel":
            assert r["async"] > 0, f"{what}: keys and values are not loaded ahead"


def test_main_configurations(tmp_path: Path) -> None:
    results = compiled("fast", environment(tmp_path), PROGRAM)
    check(results)
    assert {(r["device"], r["variant"].split(",")[0]) for r in results if r["kernel"] == "attention_kernel"} == {
        (device, phase) for device in ("sm_80", "sm_90", "sm_100") for phase in ("decode", "prefill")
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_configuration(tmp_path: Path) -> None:
    check(compiled("full", environment(tmp_path), PROGRAM))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_oldest_triton(tmp_path: Path) -> None:
    check(compiled("full", oldest_triton(tmp_path), PROGRAM))
