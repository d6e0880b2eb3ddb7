"""Images, captions and buckets.

The options of a subset and of a dataset fall back: subset -> dataset -> [general] -> flag -> default.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Interval

from sfumato.config.rules import (
    Amount,
    Count,
    Excludes,
    File,
    Folder,
    Must,
    Natural,
    Needs,
    NewFolder,
    PathTo,
    Record,
    Share,
    Side,
)

PRESERVED = "diff_output_preservation"
"""sd-scripts' name of an attribute of images: what they teach is the model's own prediction."""
ONLY_REGULARISATION = (
    "all of its folders hold regularisation images (is_reg), which are used only beside training images of the same "
    "dataset: "
    "put them into the [[datasets]] of the folder that they go with, or leave is_reg out"
)
_SPAN = Must(lambda span: 0 < span[0] <= span[1], "min,max such as 2.0,4.0, above 0")


def _all_plain(attributes: Mapping[str, Any]) -> bool:
    return all(isinstance(value, (bool, int, float, str)) for value in attributes.values())


def _says_whether(attributes: Mapping[str, Any]) -> bool:
    return isinstance(attributes.get(PRESERVED, False), bool)


_CLASS = Must(re.compile(r"\w+(\.\w+)+").fullmatch, "module.Class")
_DATASET_FILE = Excludes("dataset_config", why="dataset_config names the folders")
Interpolation = Literal["lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box"]


@dataclass(frozen=True, kw_only=True)  # no slots: two slotted bases cannot be joined
class CaptionOptions:
    """What happens to a caption each time its image is used."""

    caption_extension: Annotated[
        str,
        Must(re.compile(r"\.?[^./\\\0][^/\\\0]*", re.DOTALL).fullmatch, "the ending of caption files, such as .txt"),
    ] = ".txt"
    """Ending of the caption files."""
    shuffle_caption: bool = False
    """Shuffle the tags of a caption."""
    caption_separator: Annotated[str, Must(bool, "at least one character, such as a comma")] = ","
    """What stands between the tags of a caption."""
    keep_tokens: Natural = 0
    """Tags at the front that are neither shuffled nor dropped."""
    keep_tokens_separator: str | None = None
    """Mark in the caption that parts kept tags from the rest (a second one starts a kept end)."""
    secondary_separator: str | None = None
    """Mark within a tag that is turned into caption_separator after shuffling."""
    enable_wildcard: bool = False
    """Of `{a|b}` one is chosen each time; of a caption file of several lines, one line."""
    caption_prefix: str | None = None
    """Put before each caption."""
    caption_suffix: str | None = None
    """Put after each caption."""
    caption_dropout_rate: Share = 0.0
    """Chance that the caption is empty."""
    caption_dropout_every_n_epochs: Natural = 0
    """Every n-th epoch has empty captions."""
    caption_tag_dropout_rate: Share = 0.0
    """Chance that a tag is dropped."""
    token_warmup_min: Natural = 1
    """Tags shown at the start of token warm-up."""
    token_warmup_step: Amount = 0
    """Optimizer steps over which more and more tags are shown (below 1: share of the run)."""


@dataclass(frozen=True, kw_only=True)  # no slots: two slotted bases cannot be joined
class ImageOptions:
    """What happens to an image each time it is used."""

    num_repeats: Count = 1
    """Times each image is used in an epoch."""
    color_aug: bool = False
    """Vary hue and brightness slightly (not with cached latents)."""
    flip_aug: bool = False
    """Mirror half of the images."""
    random_crop: bool = False
    """Crop at a random place instead of the centre (not with cached latents)."""
    face_crop_aug_range: Annotated[tuple[float, float] | None, _SPAN] = None
    """`min,max`: cut out so many times the size of the face that the file's name tells (`name_x_y_w_h.png`: its centre
    and size in pixels), around it, by chance between the two (not with cached latents)."""
    alpha_mask: bool = False
    """Weigh the loss by the image's alpha channel."""
    resize_interpolation: Interpolation | None = None
    """How images are resized; default: area when shrinking, lanczos when enlarging."""
    validation_split: Share = 0.0
    """Share of a folder's images that are not trained on, but measured (1: all; of regularisation images and
    preserved ones: none)."""
    validation_seed: Natural = 42
    """What decides which images validation_split takes, and on which noise they are measured: the same for every
    seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubsetConfig(CaptionOptions, ImageOptions):
    """One folder of images."""

    image_dir: Annotated[str, PathTo("folder")] = ""
    """Folder of the images."""
    class_tokens: str | None = None
    """Caption of images that have no caption file."""
    is_reg: bool = False
    """These are regularisation images."""
    conditioning_data_dir: Folder = None
    """Folder of images with the same names: masks for masked_loss, or for a ControlNet the images to follow."""
    recursive: bool = False
    """Look into sub-folders as well."""
    metadata_file: File = None
    """JSON or JSONL file with the captions and tags of the images, which it names; image_dir is what its relative names
    start at."""
    dataset_class: Annotated[str | None, _CLASS] = None
    """Class of yours that gives images and captions, as `module.Class`; it is made with image_dir (see
    docs/datasets.md)."""
    custom_attributes: Annotated[
        Mapping[str, Any],
        Must(_all_plain, "values that are true, false, numbers or texts"),
        Must(_says_whether, f"{PRESERVED} = true or false"),
    ] = field(default_factory=dict, hash=False)
    """What else is to be known of these images, by name: a table of true, false, numbers and texts.
    diff_output_preservation: their target is what the model predicts without its adapter."""

    @property
    def source(self) -> str:
        """What names the images: a class, a metadata file or a folder."""
        return self.dataset_class or self.metadata_file or self.image_dir

    @property
    def preserved(self) -> bool:
        """Whether its images teach what the model predicts without its adapter."""
        return bool(self.custom_attributes.get(PRESERVED))

    @property
    def learnt(self) -> bool:
        """Whether its images are what is to be learnt, not what is to stay as it is."""
        return not (self.is_reg or self.preserved)


@dataclass(frozen=True, kw_only=True)  # no slots: two slotted bases cannot be joined
class BucketOptions:
    """Sizes that images are brought to."""

    resolution: tuple[Side, Side] = (512, 512)
    """Size of training, `512` or `W,H`: the area of a bucket is at most this."""
    enable_bucket: bool = False
    """Bring each image to the bucket of the nearest aspect ratio instead of one size."""
    min_bucket_reso: Side = 256
    """Shortest side of a bucket."""
    max_bucket_reso: Side = 1024
    """Longest side of a bucket."""
    bucket_reso_steps: Annotated[int, Interval(ge=8, le=16384)] = 64
    """Sides of buckets are multiples of this."""
    bucket_no_upscale: bool = False
    """Never enlarge an image."""
    skip_image_resolution: tuple[Side, Side] | None = None
    """Leave out images of at most this many pixels, `512` or `W,H`: of small ones in a folder that stands in several
    datasets of other resolutions, say."""

    @property
    def bucket_limits(self) -> tuple[int, int]:
        """(shortest side, longest side) of buckets; sides that are no multiples of the step are widened to the next, as
        in sd-scripts."""
        step = self.bucket_reso_steps
        return max(step, self.min_bucket_reso // step * step), -(-self.max_bucket_reso // step) * step


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig(BucketOptions):
    """Some folders that share a resolution and a batch size."""

    subsets: tuple[SubsetConfig, ...] = ()
    """The folders."""
    batch_size: Count = 1
    """Images a batch."""
    network_multiplier: float = 1.0
    """Strength of the adapter on these images."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Record, CaptionOptions, ImageOptions, BucketOptions):
    """Where images come from, and defaults for the datasets."""

    dataset_config: File = None
    """Dataset file (TOML or JSON) with [general], [[datasets]] and [[datasets.subsets]]."""
    train_data_dir: Annotated[Folder, _DATASET_FILE] = None
    """Folder of folders `<repeats>_<class tokens>` in place of dataset_config; where a ControlNet is trained, the
    folder of the images itself."""
    in_json: Annotated[File, _DATASET_FILE] = None
    """Metadata file (JSON or JSONL) with captions and tags; train_data_dir is then the folder of the images that it
    names."""
    dataset_class: Annotated[str | None, _CLASS, _DATASET_FILE, Excludes("in_json")] = None
    """Class of yours that gives images and captions, as `module.Class`; it is made with train_data_dir (see
    docs/datasets.md)."""
    reg_data_dir: Annotated[Folder, _DATASET_FILE, Needs("train_data_dir"), Excludes("in_json", "dataset_class")] = None
    """Folder of folders `<repeats>_<class tokens>` with regularisation images."""
    train_batch_size: Count = 1
    """Images a batch, where the dataset file says nothing."""
    dataset_repeats: Count = 1
    """Times each image is used in an epoch, where the dataset file says nothing."""
    class_tokens: str | None = None
    """Caption of images that have no caption file, where the dataset file says nothing."""
    conditioning_data_dir: Folder = None
    """Folder of images with the same names, where the dataset file says nothing: masks for masked_loss, or for a
    ControlNet the images to follow."""
    cache_latents: bool = False
    """Encode each image once and keep the latents."""
    cache_latents_to_disk: bool = False
    """Keep the latents on disk, for later runs (implies cache_latents)."""
    cache_text_encoder_outputs: bool = False
    """Encode each caption once and keep the outputs (the text encoder is not trained then)."""
    cache_text_encoder_outputs_to_disk: bool = False
    """Keep the text outputs on disk, for later runs (implies cache_text_encoder_outputs)."""
    cache_dir: Annotated[NewFolder, Needs("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk")] = None
    """Where caches on disk live; default: `~/.cache/sfumato`."""
    skip_unreadable: bool = False
    """Train without the images that cannot be read, instead of stopping."""
