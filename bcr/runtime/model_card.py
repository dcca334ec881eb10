"""The README.md that every checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping

from omegaconf import OmegaConf

import bcr


def model_card(headline: str, command: str, figures: Mapping[str, object], config: dict[str, object]) -> str:
    """Hugging Face model card: what this is, the command that made it, its figures and its whole config."""
    rows = "\n".join(f"| {name} | {shown(value)} |" for name, value in figures.items())
    return f"""---
library_name: transformers
tags: [reasoning, batched-contextual-reinforcement]
---

# {headline}

Made with bcr {bcr.__version__}:

```
{command}
```

| figure | value |
|---|---|
{rows}

```yaml
{OmegaConf.to_yaml(OmegaConf.create(config)).strip()}
```
"""


def shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
