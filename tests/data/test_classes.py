"""Images that a class of the user's gives."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import dataset, plan, tokenize

from sfumato.config import SubsetConfig
from sfumato.data.loader import Loader
from sfumato.errors import UserError

CLASS = '''
import io
from PIL import Image
class Squares:
    """Squares in shades, one of them by the bytes of a file."""
    def __init__(self, folder): self.folder = folder
    def names(self): return ["a/0.png", "a/1.png", "2"]
    def caption(self, name): return {"2": None, "half": "\\ud800"}.get(name, f"{self.folder} {name}\\n\\nsecond")
    def image(self, name):
        image = Image.new("RGBA", (64, 96), (50, 100, 150, 255))
        if name != "a/1.png":
            return image
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
class Bad(Squares):
    def caption(self, name): return 1 / 0 if name == "2" else name
    def image(self, name): return "no image" if name == "a/0.png" else super().image(name)
class Twice(Squares):
    def names(self): return ["a", "a"]
class Half(Squares):
    def names(self): return ["half"]
class Halved(Squares):
    def names(self): return ["\\udcff"]
class Dot(Squares):
    def names(self): return ["."]
class Blank(Squares):
    def image(self, name): return Image.new("RGB", (0, 64))
class Few:
    def __init__(self, folder): ...
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    name = f"mine_{tmp_path.name.replace('-', '_')}"
    Path(f"{name}.py").write_text(CLASS)
    return name


def of(name: str, **options: Any) -> SubsetConfig:
    return SubsetConfig(dataset_class=name, image_dir="seen", **options)


def test_what_a_class_gives_is_trained_on_as_files_are(module: str) -> None:
    found = plan(dataset(of(f"{module}.Squares", class_tokens="thing", alpha_mask=True)))
    images = [item.image for item in found.items]
    assert [image.name for image in images] == ["a/0.png", "a/1.png", "2"]
    assert [image.captions for image in images] == [("seen a/0.png", "second"), ("seen a/1.png", "second"), ("thing",)]
    assert {(image.width, image.height) for image in images} == {(64, 96)}
    loader = Loader(plan=found, seed=0, tokenize=tokenize, workers=2)
    batches = [batch for step in loader.epoch(0) for batch in step.batches]
    assert sorted(caption for batch in batches for caption in batch.captions) == [
        "seen a/0.png",
        "seen a/1.png",
        "thing",
    ]
    for batch in batches:
        assert batch.pixels is not None and batch.mask is not None and bool((batch.mask == 1).all())
        assert torch.allclose(batch.pixels[0, :, 0, 0], torch.tensor([50, 100, 150]) / 127.5 - 1)


def test_what_a_class_cannot_give_is_listed_as_files_are(module: str) -> None:
    with pytest.raises(UserError) as caught:
        plan(dataset(of(f"{module}.Bad")))
    assert "2 images cannot be used" in str(caught.value)
    assert "a/0.png: image(): expected a PIL image or bytes, found str" in str(caught.value)
    assert "2: caption(): ZeroDivisionError: division by zero" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere_to_be_found.Class", "No module named 'nowhere_to_be_found' \\(looked for in "),
        ("{}.Nothing", "AttributeError"),
        ("{}.Half", "caption\\(\\): expected text, found half of a character"),
        ("{}.Halved", "expected texts such as a/b.png"),
        ("{}.Blank", "a/0.png: has no pixels: it is 0x64"),
        ("{}.Dot", "expected texts such as a/b.png"),
        ("{}.Few", "has no names, caption, image: it needs names\\(\\) ->"),
        ("{}.Twice", "expected each name once"),
    ],
)
def test_a_class_that_is_none_is_refused(module: str, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan(dataset(of(name.format(module))))
