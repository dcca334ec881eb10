"""Fixed threads, and small decoders whose random weights are scaled so that the entropy of the next token is 0.5 to 3 nats."""

import signal
from collections.abc import Callable

import pytest
import torch

from bcr.model import Decoder, DecoderConfig

torch.set_num_threads(2)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell starts background jobs deaf to Ctrl-C, and so all that they start
    signal.signal(signal.SIGINT, signal.default_int_handler)

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}


@pytest.fixture(scope="session")
def make_decoder() -> Callable[..., Decoder]:
    """make_decoder(seed=0, **changes to SIZES): a new Qwen3-shaped decoder; norms and biases are random too."""

    def make(seed: int = 0, **changes: object) -> Decoder:
        model = Decoder(DecoderConfig(**{**SIZES, **changes})).init_weights(seed, std=0.3)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    noise = torch.rand(parameter.shape, generator=generator)
                    parameter.copy_(noise - 0.5 if name.endswith("bias") else noise + 0.5)
        return model

    return make
