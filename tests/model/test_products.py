"""Products of few rows turned round: the bits of `F.linear`, on this machine or not at all."""

import pytest
import torch
import torch.nn.functional as F

from bcr.model import ops, products
from bcr.model.activation import silu


def shapes() -> list[tuple[int, int, int]]:
    return [(rows, outputs, inputs) for rows in (16, 48, 64, 128) for outputs, inputs in ((512, 256), (100, 72), (96, 768), (1536, 256))]


@pytest.mark.parametrize("biased", [False, True])
@torch.inference_mode()
def test_the_bits_of_linear_in_either_layout(biased: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    turned = 0
    for rows, outputs, inputs in shapes():
        x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((rows, inputs), (outputs, inputs), (outputs,)))
        expected = F.linear(x, weight, bias if biased else None)
        for given in (x, x.t().contiguous().t()):
            found = products.linear(given, weight, bias if biased else None)
            assert torch.equal(found, expected)
            turned += not found.is_contiguous()
    assert turned  # on some shapes both ways agree everywhere we know


@torch.inference_mode()
def test_a_machine_on_which_the_two_ways_differ_takes_the_usual_one(monkeypatch: pytest.MonkeyPatch) -> None:
    way = products.turned
    monkeypatch.setattr(products, "turned", lambda *inputs: way(*inputs) * (1 + 2**-20))
    monkeypatch.setattr(products, "_agreed", {})
    x, weight = torch.randn(32, 40), torch.randn(24, 40)
    assert torch.equal(products.linear(x, weight), F.linear(x, weight))


def test_what_autograd_watches_and_other_rows_go_the_usual_way() -> None:
    layer = products.Linear(24, 40)
    assert layer(torch.randn(32, 24)).is_contiguous()
    with torch.inference_mode():
        for rows in (1, 15, 144):
            x = torch.randn(rows, 24)
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    products.linear(torch.randn(16, 24), layer.weight).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("width", [100, 344, 768])
def test_swiglu_has_the_same_bits_in_either_layout(width: int) -> None:
    """Also where threads would cut inside a vector, and where rows are no whole vectors."""
    gate_up = torch.randn(112, 2 * width, generator=torch.Generator().manual_seed(1)) * 4
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            expected = torch.cat([silu(row[None, :width].contiguous()) * row[None, width:] for row in gate_up])
            assert torch.equal(ops.swiglu(gate_up), expected)
            assert torch.equal(ops.swiglu(gate_up.t().contiguous().t()), expected)
    finally:
        torch.set_num_threads(before)
