"""A checkpoint's chat template: Jinja text that wraps one user message as its model was trained to see it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True)
class ChatTemplate:
    """`render` gives the prompt up to where the model goes on.

    `thinking` reaches templates that know `enable_thinking` (Qwen3); None leaves it to their default.
    """

    template: str
    special_tokens: dict[str, str] = field(default_factory=dict)
    system: str | None = None
    thinking: bool | None = None

    def render(self, message: str) -> str:
        """Raises ValueError with the template's own reason, where it has one."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template  # takes a second; only checkpoints with a template need it

        system = [{"role": "system", "content": self.system}] if self.system else []
        options: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        conversation = [*system, {"role": "user", "content": message}]
        try:
            rendered, _ = render_jinja_template(
                [conversation], chat_template=self.template, add_generation_prompt=True, **self.special_tokens, **options
            )
        except TemplateError as error:
            raise ValueError(f"the checkpoint's chat template cannot be used ({error}); dialect.chat=false asks in plain text.") from error
        return rendered[0]


def read_chat_template(folder: Path, system: str | None = None, thinking: bool | None = None) -> ChatTemplate | None:
    """The template of a checkpoint folder: chat_template.jinja, or the one in tokenizer_config.json; None where there is neither.

    Of several named templates the one called `default` is taken.
    """
    config_file, file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else {}
    template = file.read_text(encoding="utf-8") if file.exists() else config.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not template:
        return None
    named = {name: config[name]["content"] if isinstance(config[name], dict) else config[name] for name in SPECIAL if config.get(name)}
    return ChatTemplate(template, named, system, thinking)
