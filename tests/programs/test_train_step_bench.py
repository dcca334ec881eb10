"""The bench of a training step at tiny shapes: it runs, and the arithmetic it measures against is what torch counts."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from bcr.learner.losses import Denominators, LossConfig
from bcr.learner.packs import make_pack
from bcr.learner.step import pack_loss
from bcr.model import Decoder, DecoderConfig
from bench._learner_step import example, learner, update_flop

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
TINY = DecoderConfig(vocab_size=61, head_dim=16, max_position_embeddings=128, **SIZES)


def test_the_learner_and_its_bench_run_without_the_config_library():
    """Where torch and triton are and nothing else was installed, as `make gpu` takes a machine."""
    absent = ("hydra", "omegaconf", "datasets", "liger_kernel", "math_verify", "transformers", "peft")
    program = f"import sys; sys.modules.update(dict.fromkeys({absent})); import bench.train_step, bcr.learner.learner"
    subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[2], check=True, env=os.environ | {"PYTHONPATH": "kernels:."})


def test_the_learner_bench_runs_on_a_cpu():
    measured = learner("cpu", repeats=1, shape=TINY, lengths=(40, 24), prompt=8, packs=2)
    assert [row["checkpointing"] for row in measured["results"]] == [False, True]
    assert all(row["seconds"] > 0 and row["share_of_matmul"] > 0 for row in measured["results"])
    assert measured["flop"] == 2 * update_flop(TINY, (40, 24), 8)


def test_the_arithmetic_of_an_update_is_what_torch_counts():
    """But for attention, of which torch counts both halves, and two of the head's three products: it does not count `addmm_`."""
    lengths, prompt = [32, 32], 8
    generator = torch.Generator().manual_seed(0)  # one for all: each has a prompt of its own
    examples = [example(TINY.vocab_size, length, prompt, generator) for length in lengths]
    pack = make_pack(examples, LossConfig(), Denominators.of(one.segments for one in examples))
    with FlopCounterMode(display=False) as counter:
        pack_loss(Decoder(TINY).init_weights(0), pack, LossConfig().rule(), 1.0)[0].backward()
    counts = {str(operation): count for operation, count in counter.get_flop_counts()["Global"].items()}
    products = sum(count for operation, count in counts.items() if "attention" not in operation)
    width = TINY.num_attention_heads * TINY.head_dim * TINY.num_hidden_layers
    attention = 3 * sum(2 * width * length * (length + 1) for length in lengths)
    added = 2 * 2 * TINY.vocab_size * TINY.hidden_size * sum(length + 1 - prompt for length in lengths)
    assert products + added == update_flop(TINY, lengths, prompt) - attention
