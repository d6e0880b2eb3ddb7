"""How adapter files call the layers of text encoders that several families have, and who knows them by it; imports no
torch."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.formats.clients import Names

ALL = ("ComfyUI", "Forge", "diffusers", "A1111")


def elsewhere(dialect: str, begins: str, *known_to: str, component: str = "denoiser") -> Names:
    """Names that other programs write, by the pattern of how they begin."""
    return Names(dialect=dialect, component=component, names=f"{begins}.*", known_to=known_to, written=False)


def clip_names(component: str, number: str, folder: str, kohya: Sequence[str], encoder: str = "") -> tuple[Names, ...]:
    """The layers of a CLIP. `number`: kohya's, in `lora_te1_`; `folder`: its folder in a diffusers folder; `kohya`: who
    knows it in kohya's names; `encoder`: ComfyUI's name of it, a pattern, where that is not the component's."""
    comfy = rf"text_encoders\.{encoder or component}\..*"
    peft = ("ComfyUI", "Forge", "diffusers")
    return (
        Names(dialect="kohya", component=component, names=f"lora_te{number}_.*", known_to=tuple(kohya)),
        Names(dialect="comfy", component=component, names=comfy, known_to=("ComfyUI",)),
        Names(dialect="peft", component=component, names=rf"{folder}\..*", known_to=peft),
    )


def t5_names(number: str) -> tuple[Names, ...]:
    """The layers of a T5, which diffusers loads no adapter for. `number`: kohya's, in `lora_te3_`."""
    return (
        Names(dialect="kohya", component="t5xxl", names=f"lora_te{number}_.*", known_to=("ComfyUI", "Forge")),
        Names(dialect="comfy", component="t5xxl", names=r"text_encoders\.t5xxl\..*", known_to=("ComfyUI",)),
    )
