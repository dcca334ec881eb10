"""The adapters that a run asks for: new ones, those of a folder, or none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from bcr.model.adapter_files import load_adapter, read_adapter_config
from bcr.model.decoder import Decoder
from bcr.model.lora import TARGETS, Adapter, attach, initialise


@dataclass
class LoraConfig:
    """What a run asks for: nothing, or new adapters of `rank` (alpha None: twice the rank; targets None: all seven), or those at `path`."""

    rank: int | None = None
    alpha: float | None = None
    targets: list[str] | None = None
    path: str | None = None  # a folder with an adapter in peft's files, which brings its own rank, alpha and targets

    def adapter(self, base: str | None) -> Adapter | None:
        """The adapter that is meant, if any; ValueError, with one sentence, for what cannot be. `base` names the model it belongs to."""
        given = [name for name in ("rank", "alpha", "targets") if getattr(self, name) is not None]
        if self.path is not None:
            if given:
                value = getattr(self, given[0])
                raise ValueError(f"model.lora.{given[0]} is {value}; the adapter at model.lora.path brings its own: leave it out.")
            return replace(read_adapter_config(Path(self.path)), base=base)
        if self.rank is None:
            if given:
                raise ValueError(
                    f"model.lora.{given[0]} is {getattr(self, given[0])}, but no adapter is asked for; give model.lora.rank too."
                )
            return None
        alpha = 2.0 * self.rank if self.alpha is None else self.alpha
        targets = TARGETS if self.targets is None else tuple(self.targets)
        if self.rank < 1:
            raise ValueError(f"model.lora.rank is {self.rank}; it must be at least 1.")
        if not alpha > 0:
            raise ValueError(f"model.lora.alpha is {alpha}; it must be positive.")
        if not targets or len({*targets}) < len(targets) or not {*targets} <= {*TARGETS}:
            raise ValueError(f"model.lora.targets is {list(targets)}; it must name some of {', '.join(TARGETS)}, each once.")
        return Adapter(self.rank, alpha, tuple(target for target in TARGETS if target in targets), base)


def adapt(model: Decoder, config: LoraConfig, base: str | None, seed: int) -> Decoder:
    """Attach the adapter that `config` asks for, if any: read from its `path`, or else new. ValueError where it does not fit."""
    adapter = config.adapter(base)
    if adapter is None:
        return model
    attach(model, adapter)
    if config.path is None:
        return initialise(model, seed)
    load_adapter(model, Path(config.path))
    return model
