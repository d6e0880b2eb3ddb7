"""Adapter key names as other programs spell them: one record each, by which `adapters/files.py` writes and reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from sfumato.errors import UserError, nearest
from sfumato.formats.names import KeyMap, Rule

ModulePath = tuple[str, str]
"""(component, native path of the layer): ("denoiser", "input_blocks.1.1.transformer_blocks.0.attn1.to_q")."""
AdapterTensors = dict[str, Tensor]
"""What an adapter keeps for a layer, in kohya's and LyCORIS' names: "lora_down.weight", "alpha", "hada_w1_a" ..."""

DOWN, UP, ALPHA, DORA = "lora_down.weight", "lora_up.weight", "alpha", "dora_scale"
MID = "lora_mid.weight"
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
}
"""Leaf spellings of PEFT; files mix them with any dialect's paths, so they are read in all."""
ALIASES = {"lycoris": "kohya", "diffusers": "peft"}
"""What programs call a dialect -> its name here. LyCORIS' files for A1111 and ComfyUI are kohya's, with leaves of their
own."""
NAMES = ("kohya", "comfy", "peft", *ALIASES)
"""Of the dialects that are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How one program names the tensors of an adapter."""

    name: str
    prefix: Mapping[str, str]
    """component -> what stands before the path, separator included; a component that is not here cannot be named."""
    keys: Mapping[str, KeyMap] = field(default_factory=dict)
    """component -> table native -> foreign; a component that is not here keeps its native names."""
    separator: Literal[".", "_"] = "."
    """What joins the parts of the path."""
    tensor_names: Mapping[str, str] = field(default_factory=dict)
    """native leaf -> foreign leaf; a leaf that is not here keeps its name."""
    fold_alpha: bool = False
    """No alpha is written; alpha / rank is multiplied into a factor (PEFT). Not every kind has such a form."""

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

    def holds(self, path: ModulePath) -> bool:
        """Whether it has a name for a layer."""
        component, module = path
        keys = self.keys.get(component)
        return component in self.prefix and (keys is None or keys.find(module, native=True) is not None)


NATIVE = Dialect(name="native", prefix={}, separator="_")
"""Paths as they are, joined as kohya joins them."""


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


def check_dialect(name: str) -> None:
    """Errors: `UserError` for what no dialect is called."""
    if name not in NAMES:
        raise UserError(f"--to {name}: expected {', '.join(NAMES)}{nearest(name, NAMES)}")


def with_aliases(dialects: Mapping[str, Dialect]) -> dict[str, Dialect]:
    """Dialects by all their names."""
    return {**dialects, **{alias: dialects[name] for alias, name in ALIASES.items() if name in dialects}}
