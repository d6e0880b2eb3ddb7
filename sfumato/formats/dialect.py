"""Adapter key names as other programs spell them: one record each, by which `adapters/files.py` writes and reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sfumato.errors import UserError
from sfumato.formats.names import KeyMap, Rule

ModulePath = tuple[str, str]
"""(component, native path of the layer): ("denoiser", "input_blocks.1.1.transformer_blocks.0.attn1.to_q")."""
AdapterTensors = dict[str, Tensor]
"""What an adapter keeps for a layer, in kohya's and LyCORIS' names: "lora_down.weight", "alpha", "hada_w1_a" ..."""

DOWN, UP, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
PEFT_NAMES = {DOWN: "lora_A.weight", UP: "lora_B.weight"}
"""For `Dialect.tensor_names`: what PEFT, and with it diffusers and ComfyUI, calls the two factors of a LoRA."""
READ_AS = {
    "lora_A.weight": DOWN,
    "lora_B.weight": UP,
    "lora_A.default.weight": DOWN,
    "lora_B.default.weight": UP,
    "lora.down.weight": DOWN,
    "lora.up.weight": UP,
    "lora_magnitude_vector": DORA,
    "lora_magnitude_vector.weight": DORA,
    "lora_magnitude_vector.default.weight": DORA,
}
"""Leaf spellings of PEFT and of old diffusers; files mix them with any dialect's paths, so all are read in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one program names the tensors of an adapter."""

    name: str
    prefix: Mapping[str, str]
    """component -> what stands before the path, separator included; a component that is not here cannot be named."""
    read_also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """component -> what other programs' files have in place of its `prefix`: read, never written."""
    keys: Mapping[str, KeyMap] = field(default_factory=dict)
    """component -> table native -> foreign; a component that is not here keeps its native names."""
    separator: Literal[".", "_"] = "."
    """What joins the parts of the path."""
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    """native leaf -> foreign leaf; a leaf that is not here keeps its name."""
    fold_alpha: bool = False
    """No alpha is written; alpha / rank is multiplied into lora_up (PEFT). Such a dialect holds LoRA alone."""

    def names(self, path: ModulePath) -> tuple[tuple[str, ...], Rule | None]:
        """Foreign names of a layer, without leaf: one, or one per piece of a fused layer; and the rule that cuts it."""
        component, module = path
        if component not in self.prefix:
            raise UserError(
                f"the {self.name} names have no place for {component!r}; they hold {', '.join(self.prefix)}"
            )
        match = self.keys[component].match(module, native=True) if component in self.keys else None
        paths = match.foreign() if match else (module,)
        return tuple(
            self.prefix[component] + p.replace(".", self.separator) for p in paths
        ), match.rule if match else None

    def spellings(self, component: str, name: str) -> tuple[str, ...]:
        """A name of `names` as it is written, then as it is read besides."""
        path = name.removeprefix(self.prefix[component])
        return name, *(prefix + path for prefix in self.read_also.get(component, ()))


def usual(
    kohya: Mapping[str, str], comfy: Mapping[str, str], peft: Mapping[str, str], keys: Mapping[str, KeyMap]
) -> dict[str, Dialect]:
    """The dialects of a family, by name: the prefixes of each, and the tables to diffusers' names, on which PEFT's are
    built.

    kohya's and ComfyUI's are built on native names.
    """
    return {
        "kohya": Dialect(name="kohya", prefix=kohya, separator="_"),
        "comfy": Dialect(name="comfy", prefix=comfy, tensor_names=PEFT_NAMES),
        "peft": Dialect(
            name="peft",
            prefix=peft,
            keys=keys,
            # With .weight, which PEFT reads as well as its own files without it; transformers' text encoders need it.
            tensor_names={**PEFT_NAMES, DORA: "lora_magnitude_vector.weight"},
            fold_alpha=True,
        ),
    }
