"""Bad input gets a ValueError that begins with the argument's name, before anything is computed."""

import importlib.util
import os
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

import bcr_kernels
from bcr_kernels import LossRule, linear_logprob, linear_policy_loss

T, H, V, S = 4, 8, 11, 2
HEAD: dict[str, Any] = {"hidden": torch.randn(T, H), "weight": torch.randn(V, H), "targets": torch.arange(T)}
PACK: dict[str, Any] = {
    "old_logprobs": torch.zeros(T),
    "segment_ids": torch.tensor([0, 1, 1, -1]),
    "advantages": torch.ones(S),
    "weights": torch.ones(T),
    "rule": LossRule(),
}
BAD_HEAD = [
    ("hidden", torch.randn(2, T, H)),
    ("hidden", torch.randn(T, H, dtype=torch.float16)),
    ("hidden", torch.ones(T, H, dtype=torch.int64)),
    ("hidden", [[1.0]]),
    ("weight", torch.randn(V, H + 1)),
    ("weight", torch.randn(V)),
    ("weight", torch.randn(0, H)),
    ("weight", torch.randn(V, H, dtype=torch.bfloat16)),
    ("weight", torch.randn(V, H, device="meta")),
    ("targets", torch.zeros(T + 1, dtype=torch.int64)),
    ("targets", torch.zeros(T)),
    ("targets", torch.zeros(T, 1, dtype=torch.int64)),
    ("targets", torch.zeros(T, dtype=torch.int64, device="meta")),
    ("targets", torch.tensor([0, 1, V, 2])),
    ("targets", torch.tensor([0, 1, -1, 2])),
    ("temperature", 0.0),
    ("temperature", -1.0),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "warm"),
    ("temperature", torch.tensor(1.0)),
    ("temperature", torch.ones(T + 1)),
    ("temperature", torch.tensor([1.0, 0.0, 1.0, 1.0])),
    ("temperature", torch.tensor([1.0, float("nan"), 1.0, 1.0])),
    ("temperature", torch.ones(T, requires_grad=True)),
    ("active_tokens", T + 1),
    ("active_tokens", 2),
    ("backend", "cuda"),
]
BAD_PACK = [
    ("old_logprobs", torch.zeros(T + 1)),
    ("segment_ids", torch.zeros(T)),
    ("segment_ids", torch.tensor([0, 1, S, -1])),
    ("segment_ids", torch.tensor([0, 1, 1, -2])),
    ("advantages", torch.ones(S, 1)),
    ("advantages", torch.ones(S, dtype=torch.int64)),
    ("advantages", torch.ones(S, device="meta")),
    ("weights", torch.ones(T - 1)),
    ("rule", None),
    ("behaviour_logprobs", torch.zeros(T + 1)),
    ("reference_logprobs", torch.zeros(T)),
    ("weight_grad_accumulator", torch.zeros(V, H)),  # weight requires no gradient
]


def names(cases: list[tuple[str, Any]]) -> list[str]:
    return [f"{name}-{index}" for index, (name, _) in enumerate(cases)]


@pytest.mark.parametrize(("name", "value"), BAD_HEAD, ids=names(BAD_HEAD))
def test_bad_heads_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        linear_logprob(**(HEAD | {name: value}))
    with pytest.raises(ValueError, match=rf"^{name}: "):
        linear_policy_loss(**(HEAD | PACK | {name: value}))


@pytest.mark.parametrize(("name", "value"), BAD_PACK, ids=names(BAD_PACK))
def test_bad_packs_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: "):
        linear_policy_loss(**(HEAD | PACK | {name: value}))


def test_a_wrong_accumulator_is_refused() -> None:
    weight = HEAD["weight"].clone().requires_grad_()
    for accumulator in (torch.zeros(V, H + 1), torch.zeros(V, H, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"^weight_grad_accumulator: must be torch.float32 \[11, 8\]"):
            linear_policy_loss(**(HEAD | PACK | {"weight": weight}), weight_grad_accumulator=accumulator)


def test_a_distributed_weight_is_refused(tmp_path) -> None:
    """FSDP2 hands out DTensors; a kernel that reads their storage reads another rank's memory."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        weight = DTensor.from_local(HEAD["weight"], mesh, [torch.distributed.tensor.Shard(0)])
        with pytest.raises(ValueError, match=r"^weight: is a DTensor; pass a whole tensor"):
            linear_logprob(**(HEAD | {"weight": weight}))
    finally:
        torch.distributed.destroy_process_group()


def test_triton_needs_cuda() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter runs Triton kernels on a CPU")
    if importlib.util.find_spec("triton") is None:
        with pytest.raises(ValueError, match=r"^backend: is 'triton', but triton is not installed"):
            linear_logprob(**HEAD, backend="triton")
    else:
        with pytest.raises(ValueError, match=r"^backend: is 'triton', which needs CUDA, but hidden is on cpu"):
            linear_logprob(**HEAD, backend="triton")


def test_every_exported_name_exists_and_is_documented() -> None:
    for name in bcr_kernels.__all__:
        assert getattr(bcr_kernels, name).__doc__, name
    assert callable(bcr_kernels.policy_loss), "the function, not the module of the same name"
    assert callable(bcr_kernels.linear_logprob)
