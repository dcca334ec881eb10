"""The learner alone, on packs of stated lengths: a workload of `bench.train_step`, and what `make gpu` runs of it.

MFU counts the arithmetic that the update cannot avoid (a forward and a backward of twice that; the head on completions only; attention on
what precedes a token), whatever is recomputed, over the peak: that of the data sheet where the device is known, beside it the matmul
rate measured in the same run.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch

from bcr.analysis.costs import GPUS
from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import Example, make_pack
from bcr.learner.step import OptimizerConfig, optimizer_step
from bcr.model import Decoder, DecoderConfig
from bcr.records import Segment
from bench._protocol import _reset_peak, _resident_peak, matmul_peak, seconds_of
from bench._sampler_work import SHAPES

QWEN3 = DecoderConfig(max_position_embeddings=40_960, **SHAPES["qwen3-0.6b"])
LENGTHS = (4096, 3072, 2560, 2048, 1536, 1280, 1024, 768)  # of the rollouts of a pack, prompts included: 16,384 tokens
PROMPT = 256


def learner(
    device: str, repeats: int, shape: DecoderConfig = QWEN3, lengths: Sequence[int] = LENGTHS, prompt: int = PROMPT, packs: int = 2
) -> dict[str, Any]:
    """One update from `packs` packs of the same lengths, without and with activation checkpointing; prints a line each."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = Decoder(shape).to(dtype)
    if device == "cuda":
        for weight in model.parameters():  # drawn on the device: as good as any for time
            torch.nn.init.normal_(weight, std=0.02) if weight.dim() == 2 else torch.nn.init.ones_(weight)
    else:
        model.init_weights(0)
    optimizer, loss = OptimizerConfig().build(model), LossConfig()
    generator = torch.Generator().manual_seed(0)
    examples = [example(shape.vocab_size, length, prompt, generator) for length in lengths]
    total = Denominators.of(one.segments for one in examples * packs)
    pack = make_pack(examples, loss, total, device)

    def update() -> None:
        optimizer_step(model, optimizer, [pack] * packs, loss.rule(), temperature=1.0, lr=1e-6, grad_clip=1.0)

    flop, tokens, rate = packs * update_flop(shape, lengths, prompt), packs * sum(lengths), matmul_peak(device, dtype)
    sheet = data_sheet(torch.cuda.get_device_name()) if device == "cuda" else None
    print(f"{packs} packs of {sum(lengths):,} tokens ({', '.join(map(str, lengths))}; prompts of {prompt}), {device}, {dtype}")
    print(f"{'checkpointing':14s} {'seconds':>8s} {'tokens/s':>10s} {'MFU':>6s} {'of matmul':>9s} {'peak':>9s}")
    rows = []
    for checkpointing in (False, True):
        model.activation_checkpointing = checkpointing
        update()
        _reset_peak(device)
        seconds = statistics.median(seconds_of(update, device) for _ in range(repeats))
        held = torch.cuda.max_memory_allocated() if device == "cuda" else _resident_peak()
        mfu = flop / seconds / sheet if sheet else None
        rows.append(
            {"checkpointing": checkpointing, "seconds": seconds, "mfu": mfu, "share_of_matmul": flop / seconds / rate, "bytes": held}
        )
        shown = f"{mfu:6.1%}" if mfu else f"{'-':>6s}"
        print(f"{checkpointing!s:14s} {seconds:8.3f} {tokens / seconds:10,.0f} {shown} {flop / seconds / rate:9.1%} {held / 1e9:6.1f} GB")
    return {"lengths": list(lengths), "packs": packs, "flop": flop, "matmul_peak": rate, "data_sheet": sheet, "results": rows}


def example(vocabulary: int, length: int, prompt: int, generator: torch.Generator) -> Example:
    """A rollout of random tokens with one segment; `length` places in a pack."""
    drawn = torch.randint(0, vocabulary, (length + 1,), generator=generator).tolist()
    new = length + 1 - prompt
    return Example(drawn[:prompt], drawn[prompt:], [-10.0] * new, [Segment(0, 0, new)], [1.0])


def update_flop(shape: DecoderConfig, lengths: Sequence[int], prompt: int) -> float:
    """Multiply-adds, two each, of the forward and backward of one pack."""
    with torch.device("meta"):
        matrices = sum(weight.numel() for weight in Decoder(shape).layers.parameters() if weight.dim() == 2)
    head, width = shape.vocab_size * shape.hidden_size, shape.num_attention_heads * shape.head_dim * shape.num_hidden_layers
    attention = sum(2 * width * length * (length + 1) for length in lengths)  # scores and values over what precedes each token, and itself
    return 3 * (2 * matrices * sum(lengths) + 2 * head * sum(length + 1 - prompt for length in lengths) + attention)


def data_sheet(device: str) -> float | None:
    """Dense bfloat16 FLOP/s of a known GPU by the name that CUDA gives it."""
    known = {"H100": "h100", "H200": "h200", "A100": "a100", "RTX PRO 6000": "rtx_pro_6000", "4090": "rtx_4090"}
    return next((GPUS[key].tflops * 1e12 for name, key in known.items() if name in device), None)
