"""What a weight file is and of which family, from its metadata, names and shapes; imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from sfumato import families
from sfumato.errors import UserError
from sfumato.formats import coded, files
from sfumato.models import locate
from sfumato.models.detection import ADAPTER_TENSOR, CLAIMS, WHOLE, Detected, Kind, Shapes, has

CALLED: Mapping[Kind, str] = {
    "adapter": "an adapter (such as a LoRA), not a base model: give it as --network_weights, "
    "and the model it was trained on here",
    "vae": "a VAE, not a base model: give it as --vae",
    "text_encoder": "a text encoder alone, not a base model",
    "embedding": "a textual inversion embedding, not a base model",
    "controlnet": "a ControlNet, not a base model",
}

FUTURE = {
    "Qwen-Image": r"(.*[._])?(transformer_blocks[._]\d+[._](img|txt)_(mod[._]1|mlp[._]net)[._].*|txt_norm\.weight)",
    "FLUX.2": r"(.*[._])?((double|single)_stream_modulation(_img|_txt)?)[._].*",
    "Z-Image": r"(.*[._])?(layers[._]\d+[._]attention[._](to_[qkv]|to_out[._]0)[._].*|cap_pad_token)",
}
"""Models that sfumato does not train yet, and the names that they are known by; a family of theirs is asked first."""

OTHERS = {
    "ip_adapter": (
        "an IP-Adapter (an image as prompt), which sfumato does not train",
        r"(ip_adapter|image_proj)\..*|.*\.(to_[kv]_ip|ip_adapter_double_stream_[kv]_proj)\..*",
    ),
    "hypernetwork": ("a hypernetwork, which sfumato does not train", r"\d+\.[01]\.linear(\.?\d+)\.(weight|bias)"),
    "upscaler": (
        "an upscaler of images (ESRGAN, SwinIR or the like), not a base model",
        r"(params(_ema)?\.)?(model\.1\.sub\.0\.RDB1\.|body\.0\.rdb1\.|layers\.0\.residual_group\.|conv_after_body\.).*",
    ),
    "clip_vision": (
        "an image encoder (CLIP vision), not a base model",
        r"(.*\.)?(vision_model\.encoder\.layers\.0\.|visual\.transformer\.resblocks\.0\.).*",
    ),
}
"""Kinds of files that belong to no family -> what they are, and pattern of the names by which they are known."""

SEEMS = {
    "an adapter (such as a LoRA) for a model that its names do not tell, not a base model": ADAPTER_TENSOR,
    "an embedding (textual inversion) for a text encoder of unusual size, not a base model": (
        r"(string_to_param\.)?emb_params|bundle_emb\..*"
    ),
    "a VAE of a model that is not supported yet": r"(encoder|decoder)\.conv_in\.weight",
    "a language model, such as some models read captions with, not a base model": (
        r"(model\.|language_model\.)*layers\.\d+\.self_attn\.q_proj\.weight"
    ),
}
"""What a file is, if not of which model -> pattern of the names by which it is known."""


def identify(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> Detected | None:
    """What a file with these tensors is; None: no family knows it.

    The family that its metadata name is asked first, and believed only if the tensors' names and shapes may be its.
    """
    claims = _claims(metadata or {})
    order = [*claims, *(name for name in families.names() if name not in claims)]
    return next((found for name in order if (found := _recognised(name, shapes, claims.get(name)))), None)


def _claims(metadata: Mapping[str, str]) -> dict[str, str]:
    """The family that the metadata name, and the variant that they name of it."""
    for key in CLAIMS:
        for name in families.names():
            if (variant := families.facts(name).signature.claim(metadata, key)) is not None:
                return {name: variant}
    return {}


def _recognised(family: str, shapes: Shapes, claim: str | None = None) -> Detected | None:
    """What the family knows the tensors as; None if those that it knows by name have shapes that it cannot read."""
    with suppress(KeyError, ValueError, IndexError, TypeError):
        return families.facts(family).signature.detect(shapes, claim)
    return None


def detect_file(name: str | Path, flag: str = "pretrained_model_name_or_path") -> Detected:
    """The base model `name` (a file, a diffusers folder or a hub id).

    Errors: a `UserError` of one line that says what the file seems to be when it is no whole model of a known family.
    """
    path = locate.local(str(name), flag)
    if path.is_dir():
        return _folder(path, flag)
    shapes, metadata = _header([path], flag)
    found = identify(shapes, metadata)
    if found is None:
        raise UserError(f"{flag}: {path} is {unknown(shapes)}")
    if found.kind != "checkpoint":
        raise UserError(f"{flag}: {path} is {CALLED[found.kind]}")
    if found.refused:
        raise UserError(f"{flag}: {path} is {found.refused}")
    if lacking := set(families.facts(found.family).needed) - set(found.parts):
        raise UserError(
            f"{flag}: {path} holds no {' and no '.join(sorted(lacking))}; a whole model is needed, as a single file or "
            "a diffusers folder"
        )
    return found


@contextmanager
def control_net(name: str, family: str, *, lite: bool = False) -> Iterator[None]:
    """Where the file of a control net for this family cannot be read as one, the error says what it is, if that is
    known. `lite`: whether a ControlNet-LLLite would do."""
    try:
        yield
    except UserError as error:
        path = Path(name).expanduser()
        if path.is_file() and (what := _other_than_control(path, family, lite)):
            raise UserError(f"{path} is {what}, not a ControlNet of {families.family(family).title}") from error
        raise


def _other_than_control(path: Path, family: str, lite: bool) -> str:
    with suppress(UserError):
        found = identify(*_header([path], ""))
        if found and found.kind != "controlnet":
            return CALLED.get(found.kind, "a base model").partition(",")[0]
        small = found and found.dialect == "lllite"
        if found and (found.family != family or (small and not lite)):
            return f"a ControlNet{'-LLLite' if small else ''} of {families.family(found.family).title}"
    return ""


def unknown(shapes: Shapes) -> str:
    """What a file that no family knows seems to be, as the end of a sentence."""
    for model, pattern in FUTURE.items():
        if has(shapes, pattern):
            return f"of {model}, which is not supported yet"
    if kind := other_kind(shapes):
        return OTHERS[kind][0]
    for what, pattern in SEEMS.items():
        if has(shapes, pattern):
            return what
    if not shapes:
        return "an empty file, without a tensor"
    first = ", ".join(repr(key) for key in list(shapes)[:2])
    return f"no model that sfumato knows (its tensors: {len(shapes)}, {first} ...)"


def other_kind(shapes: Shapes) -> str:
    """The kind, of `OTHERS`, of a file that no family knows; "" if it is none of them."""
    return next((kind for kind, (_, pattern) in OTHERS.items() if has(shapes, pattern)), "")


def _header(paths: Sequence[Path], flag: str) -> tuple[Shapes, Mapping[str, str]]:
    """Names, shapes and metadata of some files, if their weights can be read."""
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        header = files.read_header(path)
        scaling = coded.companions(header.tensors, coded.find(path, header))
        found = {name: info.shape for name, info in header.tensors.items() if name not in scaling}
        locate.refuse_quantised(f"{flag}: {path}", found)
        shapes |= found
        metadata |= header.metadata
    return shapes, metadata


def _folder(path: Path, flag: str) -> Detected:
    index = locate.index_of(path)
    if index is None:
        raise UserError(
            f"{flag}: the folder {path} has no model_index.json: expected a diffusers folder, or a single file"
        )
    pipeline = str(locate.read_json(index).get("_class_name"))
    for name in families.names():
        if pipeline in families.facts(name).pipelines:
            denoiser = path / families.facts(name).denoiser_folder
            shapes, _ = _header(locate.weight_files(denoiser), flag)
            for folder, prefix in families.facts(name).denoiser_beside.items():
                found_beside, _ = _header(locate.weight_files(path / folder), flag)
                shapes = {**shapes, **{prefix + key: shape for key, shape in found_beside.items()}}
            found = _recognised(name, shapes)
            if found and found.refused:
                raise UserError(f"{flag}: {path} is {found.refused}")
            if found and found.kind == "checkpoint":
                return replace(found, parts=WHOLE)
            raise UserError(f"{flag}: {denoiser} is {unknown(shapes)}")
    raise UserError(f"{flag}: the folder {path} holds a {pipeline}, which is not supported yet")
