"""The one decoder that trainer and sampler share, its attention, and its checkpoints in Hugging Face layout."""

from bcr.model.decoder import Decoder, DecoderConfig
from bcr.model.huggingface import load_pretrained, save_pretrained

__all__ = ["Decoder", "DecoderConfig", "load_pretrained", "save_pretrained"]
