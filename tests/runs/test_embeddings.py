"""Words that are learnt, as diffusers reads them, beside an adapter, for each block of the U-Net, and from captions as kohya makes them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from runs.test_families import changed, says
from tinies.cases import Case, cases
from training import Train, config

import sfumato
from sfumato import adapters, families
from sfumato.cli.main import main
from sfumato.config import DatasetConfig, SubsetConfig
from sfumato.errors import UserError
from sfumato.formats.clients import loads_in
from sfumato.formats.files import load, save
from sfumato.models import embedding_files
from sfumato.models.embeddings import Words, readers_of, unasked, widths_of
from sfumato.sampling.prompts import Prompt
from sfumato.train import devices, words
from sfumato.train.pipeline import Pipeline
from sfumato.train.trainables import Adapters
from sfumato.train.trainables.embedding import Embedding, NewWord

CASES = {case.name: case for case in cases()}
WORD: dict[str, Any] = {"token_string": "hoge", "num_vectors_per_token": 2}


@pytest.fixture
def images(images: Path) -> Path:
    for caption in images.glob("*.txt"):
        caption.write_text(f"a red hoge, {caption.stem}")
    return images


@pytest.mark.parametrize("case", [CASES["sd-1"], CASES["sdxl-base"]], ids=lambda case: case.name)
def test_diffusers_loads_what_was_saved(case: Case, tmp_path: Path) -> None:
    models, pipe, result = case.models(case.write(tmp_path)), copy.deepcopy(case.pipeline()), tmp_path / "x.safetensors"
    captions, vectors = ["a hoge in the rain", "rain"], {n: torch.randn(2, d) for n, d in widths_of(models).items()}
    with torch.no_grad():
        before = models.encode(models.tokenize(captions))
    learnt = Words(models, {"hoge": vectors})
    save(result, embedding_files.write("hoge", learnt.vectors()["hoge"], models))
    parts = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
    tensors = load(result)
    if "emb_params" in tensors:
        pipe.load_textual_inversion(str(result), token="hoge")
    else:
        for name, tensor in tensors.items():
            encoder, tokenizer = (getattr(pipe, part) for part in parts[name])
            pipe.load_textual_inversion({"hoge": tensor}, text_encoder=encoder, tokenizer=tokenizer)
    with torch.no_grad():
        wanted, found = case.encoded(pipe, captions), models.encode(models.tokenize(captions))
        if "emb_params" in tensors:
            pipe.unload_textual_inversion()
            pipe.load_textual_inversion(embedding_files.write("hoge", vectors, models, by_word=True))
            assert torch.equal(case.encoded(pipe, captions)["hidden"], wanted["hidden"])
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-4)
    assert (before["hidden"] - found["hidden"]).abs().max() > 1e-2


def test_files_of_others_are_read(model: Path, tmp_path: Path) -> None:
    """A1111's pickle, kohya's both, diffusers', its scripts', OneTrainer's beside an adapter, and one vector without rows."""
    models, rows = sfumato.load(model), torch.randn(3, 64)
    forms: dict[str, tuple[Any, str]] = {
        "a1111.pt": ({"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "name": "x", "step": 9}, "a1111"),
        "kohya.pt": ({"emb_params": rows.half()}, "kohya"),
        "diffusers.bin": ({"<cat-toy>": rows}, "<cat-toy>"),
        "bare.pt": (rows, "bare"),
        "comfy.safetensors": ({"clip_l": rows}, "comfy"),
        "scripts.safetensors": ({"text_encoders_0": rows}, "scripts"),
        "dots.safetensors": ({"bundle_emb.my.cat.clip_l": rows}, "my.cat"),
        "bundle.safetensors": ({"bundle_emb.cat.string_to_param.*": rows, "lora_te_x.alpha": rows[0, :1]}, "cat"),
    }
    for name, (content, word) in forms.items():
        path = tmp_path / name
        save(path, content) if name.endswith("safetensors") else torch.save(content, path)
        found = embedding_files.read(path, models, "weights")
        torch.testing.assert_close(found, {word: {"clip_l": rows}}, atol=1e-2, rtol=1e-2)
    save(tmp_path / "one.safetensors", {"emb_params": rows[0]})
    assert sfumato.load(model, embeddings=[tmp_path / "one.safetensors"]).tokenizers["clip_l"].words == {"one": 1}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"emb_params": torch.ones(2, 7)}, r"vectors \[2, 7\] for clip_l, which takes vectors of 64 numbers"),
        ({"clip_g": torch.ones(2, 64)}, "for clip_g, which this model does not have"),
        ({"a": torch.ones(2, 64), "b": torch.ones(2, 64)}, "no embedding is in it"),
        ({"emb_params": torch.full((1, 64), torch.nan)}, "NaN"),
        ({"IN01": torch.ones(2, 64)}, "for each of IN01, IN03, MID"),
        ({}, "no embedding is in it"),
        ({"string_to_token.*": torch.ones(1)}, "no embedding is in it"),
        ({"bundle_emb..clip_l": torch.ones(2, 64)}, "names no word"),
    ],
)
def test_other_files_are_refused(model: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], message: str) -> None:
    save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UserError, match=message):
        sfumato.load(model, embeddings=[tmp_path / "x.safetensors"])


def test_a_word_takes_the_place_of_as_many_tokens_as_it_has_vectors(model: Path) -> None:
    """In any case and place, weighted, over several chunks, counted, and with other words beside it."""
    models = sfumato.load(model, max_token_length=150, weighted_captions=True)
    plain = models.tokenize(["x x x, y"])
    inner = Words(models, {"hoge": {"clip_l": torch.randn(3, 64)}})
    outer = Words(models, {"hoge2": {"clip_l": torch.randn(2, 64)}})
    first = models.tokenizers["clip_l"].first
    assert first == models.tokenizers["clip_l"].base.first + 3

    def ids(caption: str) -> list[int]:
        found: list[int] = models.tokenize([caption])["ids"].flatten().tolist()
        return [i - first for i in found if i >= first - 3]

    assert ids("a Hoge,(hoge2:1.5) hoge3 shoge") == [-3, -2, -1, 0, 1]
    weights = models.tokenize(["a (hoge:1.5)"])["weights"][0, 0]
    assert weights[:6].tolist() == [1, 1, 1.5, 1.5, 1.5, 1]
    long = models.tokenize(["hoge " * 30])["ids"][0]
    assert (long >= first - 3).sum(1).tolist() == [75, 15]
    assert models.tokenize_strategy.limits()[0].count(["hoge " * 30 + "hoge2"]) == [92]
    for short, inside in (("hoge", "hoge-x"), ("ge-x", "hoge-x")):
        for order in ((short, inside), (inside, short)):
            both = [Words(models, {word: {"clip_l": torch.randn(len(word), 64)}}) for word in order]
            own = {word: len([i for i in models.tokenize([word])["ids"].flatten() if i >= first + 2]) for word in order}
            assert own == {short: len(short), inside: len(inside)}  # neither takes the other apart
            for each in reversed(both):
                each.remove()
    told = models.tokenize_strategy.settings["vocabulary"]
    outer.remove(), inner.remove()  # type: ignore[func-returns-value]
    assert torch.equal(models.tokenize(["x x x, y"])["ids"], plain["ids"])
    again = Words(models, {"hoge": {"clip_l": torch.randn(3, 64)}})
    assert models.tokenize_strategy.settings["vocabulary"] != told  # captions are encoded anew
    again.remove()


def test_a_word_is_learnt_for_each_block(train: Train, images: Path, model: Path, tmp_path: Path) -> None:
    """Extended textual inversion: alike for all blocks it is a plain word; one for a single block changes what that reads."""
    folder = train("xti", "embedding", xti=True, init_word="red", **WORD)
    result, models = folder / "out.safetensors", sfumato.load(model)
    captions, rows = ["a hoge", "blue hoge"], load(result)
    assert list(readers_of(models)) == sorted(rows)
    plain = Words(models, {"hoge": {"clip_l": rows["MID"]}})
    wanted = says(models, captions)
    plain.remove()
    for name, same in (("alike", True), ("MID", False)):
        tensors = {n: rows["MID"] if same or n != name else torch.randn(2, 64) for n in rows}
        save(tmp_path / "hoge.safetensors", tensors)
        each = Words(models, embedding_files.read(tmp_path / "hoge.safetensors", models, "weights"))
        assert torch.allclose(says(models, captions), wanted, atol=1e-5) == same
        each.remove()
    assert all((rows[name] != rows["MID"]).any() for name in rows if name != "MID")
    # Two such words at once; of the second each block takes its own, too.
    first, alike = ({"clip_l": torch.randn(1, 64).repeat(len(rows), 1, 1)} for _ in range(2))
    both = [Words(models, {"hoge": first}), Words(models, {"piyo": alike})]
    found = says(models, ["a hoge piyo"])
    for each in reversed(both):
        each.remove()
    plain = Words(models, {"hoge": {"clip_l": first["clip_l"][0]}, "piyo": {"clip_l": alike["clip_l"][0]}})
    torch.testing.assert_close(found, says(models, ["a hoge piyo"]), atol=1e-5, rtol=1e-4)
    plain.remove()


def test_a_word_beside_an_adapter(train: Train, images: Path, model: Path) -> None:
    """Both are in one file, by which both are sampled and trained further; without it nothing of them is left."""
    folder = train(
        "both", network_train_unet_only=True, embedding_lr=0.1, save_every_n_steps=1, save_state=True, **WORD
    )
    result = folder / "out.safetensors"
    found = load(result)
    assert found["bundle_emb.hoge.clip_l"].shape == (2, 64)
    assert {name.split("_")[0] for name in found} == {"bundle", "lora"}
    pipe = Pipeline.of(config(pretrained_model_name_or_path=str(model)), torch.device("cpu"))
    captions = ["a hoge", "hoge"]
    before = says(pipe.models, captions)
    with pipe.adapted(result):
        both = says(pipe.models, captions)
        assert pipe.models.tokenizers["clip_l"].words == {"hoge": 2}
    assert torch.equal(says(pipe.models, captions), before)
    merged = Pipeline.of(config(pretrained_model_name_or_path=str(model)), torch.device("cpu"), [(result, 1.0)])
    torch.testing.assert_close(says(merged.models, captions), both, atol=1e-5, rtol=1e-4)
    assert (both - before).abs().max() > 1e-3
    facts = families.facts("sd").loads_in
    told = {each.client: each.text() for each in loads_in({name: tuple(t.shape) for name, t in found.items()}, facts)}
    assert "refuses a file with words in it" in told["diffusers"] and "words" not in told["ComfyUI"]
    further = train(
        "on",
        network_train_unet_only=True,
        network_weights=str(result),
        learning_rate=0.0,
        embedding_lr=0.1,
        unet_lr=1e-3,
        max_train_steps=1,
        **WORD,
    )
    moved = load(further / "out.safetensors")["bundle_emb.hoge.clip_l"] - found["bundle_emb.hoge.clip_l"]
    assert 0.05 < moved.abs().max() < 0.2
    with pytest.raises(UserError, match=r"network_weights .*: its word has 2 vectors, and num_vectors_per_token is 3"):
        NewWord(merged.models, config(network_weights=str(result), token_string="hoge", num_vectors_per_token=3))
    given = config(network_weights=str(result), network_dim=2, network_train_unet_only=True)
    (said,) = Adapters(merged.models, given, adapters.parse(given.network)).notices
    assert said == "network_weights has words, too, which are left out: hoge; token_string goes on learning one"
    resumed = train(
        "both2", network_train_unet_only=True, embedding_lr=0.1, resume=str(folder / "out-step00000001-state"), **WORD
    )
    assert not changed(load(resumed / "out.safetensors"), found)


def test_a_word_that_hides_another_is_told(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "hoge.safetensors", tmp_path / "more" / "Hoge.safetensors"
    other.parent.mkdir()
    for path in (one, other):
        save(path, {"emb_params": torch.randn(2, 64)})
    files = config(
        pretrained_model_name_or_path=str(model), textual_inversion_embeddings=(str(one), str(other)), **WORD
    )
    models = devices.outline_models(files)
    told = " ".join(capsys.readouterr().err.split())
    assert f"{other}: another file has the same word, which this one's takes the place of: Hoge" in told
    (said,) = NewWord(models, files).notices
    assert said == "token_string hoge: a file has the same word, which it takes the place of"
    assert unasked(models, ["blue", "a HOGE"]) == [] and unasked(models, ["hogehoge"]) == ["hoge"]


def test_what_does_nothing_for_a_word_is_told(
    model: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = {"pretrained_model_name_or_path": str(model), "dialect": "diffusers", **WORD}
    trained = [Embedding(sfumato.load(model), config(**base, xti=xti)) for xti in (True, False)]
    assert ["dialect diffusers: no effect" in " ".join(each.notices) for each in trained] == [True, False]
    save(tmp_path / "unasked.safetensors", {"emb_params": torch.randn(2, 64)})
    given = config(
        pretrained_model_name_or_path=str(model), textual_inversion_embeddings=(str(tmp_path / "unasked.safetensors"),)
    )
    for text in ("a cat", "an unasked cat"):
        Pipeline.of(given, torch.device("cpu"), only=[Prompt(prompt=text, width=64, height=64)])
    assert capsys.readouterr().err.count("unasked: no prompt has this word") == 1


def test_captions_are_sentences_about_the_word(images: Path) -> None:
    plain = config(token_string="hoge", use_object_template=True)
    subset = SubsetConfig(image_dir=str(images), shuffle_caption=True, caption_prefix="x", caption_dropout_rate=0.1)
    other = SubsetConfig(image_dir=str(images), is_reg=True)
    from sfumato.data.plan import make_plan
    from sfumato.data.store import FileIndex

    plan = make_plan((DatasetConfig(subsets=(subset, other), resolution=(64, 64)),), FileIndex(None))
    found = words.told(plan, plain)
    lines = {line for item in found.items if not item.image.is_reg for line in item.image.captions}
    assert len(words.OBJECT) == len(lines) == 27 and {"a photo of a hoge", "a photo of one hoge"} <= lines
    assert len(words.STYLE) == 19
    assert found.digest() == plan.digest()
    options, kept = found.datasets[0].subsets
    assert (options.enable_wildcard, options.shuffle_caption, options.caption_prefix) == (True, False, None)
    assert options.caption_dropout_rate == 0.1 and kept == other
    assert words.told(plan, config(token_string="HOGE")) is plan
    with pytest.raises(UserError, match="token_string: 'hog' is in no caption"):
        words.told(plan, config(token_string="hog"))


def test_kohyas_command_line_learns_what_ours_draws(model: Path, images: Path, tmp_path: Path) -> None:
    """The script for extended textual inversion, with kohya's defaults; its file is drawn by `sfumato sample`."""
    folder = tmp_path / "set"
    folder.mkdir()
    images.rename(folder / "1_images")
    said = launch(
        "train_textual_inversion_XTI",
        f"""
        --pretrained_model_name_or_path {model} --train_data_dir {folder} --output_dir {tmp_path / "out"} --token_string hoge
        --init_word red --num_vectors_per_token 71 --max_train_steps 1 --learning_rate 0.1 --resolution 64
        --caption_extension .txt --cache_latents --seed 1
        """.split(),
        tmp_path,
    )
    assert "5 of 5 captions have more than the 75 tokens that CLIP reads" in said
    result = tmp_path / "out" / "hoge.pt"
    assert result.is_file() and "kohya's default pt is used" in said
    command = (
        f"--pretrained_model_name_or_path {model} --output_dir {tmp_path} --width 64 --height 64 --steps 1 --seed 1"
    )
    drawn = []
    for more in (["--textual_inversion_embeddings", str(result)], []):
        assert not main(["sample", *command.split(), "--prompt", "a hoge", *more])
        (path,) = (tmp_path / "sample").glob("*.png")
        drawn.append(path.read_bytes())
        path.unlink()
    assert drawn[0] != drawn[1]
