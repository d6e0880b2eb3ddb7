"""network_args of kohya's lora_anima, loha and lokr that are Anima's own; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.models.block_choices import Arguments


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkArgs(Arguments):
    """Which parts have adapters besides the blocks of the image."""

    train_llm_adapter: bool = False
    """Adapters on the text adapter as well, which makes of Qwen3's states what the image attends to."""

    def sets(self) -> tuple[str, ...]:
        """See `Arguments.sets`."""
        return ("llm_adapter",) if self.train_llm_adapter else ()
