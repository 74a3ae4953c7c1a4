"""Data for models that read more than text: what is read, how much of it, and what is said where that fails."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import complaint
from tiny_media import processor_of, write_images, write_other, write_sounds
from tiny_others import build_other

from smoothquant_ext.errors import SmoothQuantError
from smoothquant_ext.inputs import data_kind, enough_samples, read_batches
from smoothquant_ext.media import IMAGES, LONGEST, find_media, read_captions, read_image, read_sound


def loaded(name: str) -> tuple[Any, Any]:
    return build_other(name), processor_of(name)


def test_an_encoder_reads_whole_texts(tmp_path: Path) -> None:
    """Windows of an encoder are framed as its tokenizer frames a text, those of a language model only begin so."""
    from tokenizers.processors import TemplateProcessing

    model, tokenizer = loaded("BertModel")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    (tmp_path / "text.txt").write_text("w5 w6 w7 " * 40)
    batches = read_batches((model, tokenizer), str(tmp_path / "text.txt"), 3, 10)
    assert [batch["input_ids"].shape for batch in batches] == [(1, 10)] * 3
    assert all((batch["input_ids"][0, 0], batch["input_ids"][0, -1]) == (1, 2) for batch in batches)
    windows = read_batches((build_other("BertLMHeadModel"), tokenizer), str(tmp_path / "text.txt"), 3, 10)
    assert isinstance(windows, torch.Tensor)
    assert not bool((windows == 2).any())


def test_a_decoder_reads_what_the_model_answers(tmp_path: Path) -> None:
    model, tokenizer = loaded("MarianMTModel")
    (tmp_path / "text.txt").write_text("w5 w6 w7 " * 40)
    batches = read_batches((model, tokenizer), str(tmp_path / "text.txt"), 2, 10)
    answers = [batch["decoder_input_ids"] for batch in batches]
    assert all(answer[0, 0] == model.config.decoder_start_token_id for answer in answers)
    expected = model.generate(batches[0]["input_ids"], max_new_tokens=64, do_sample=False, num_beams=1)
    assert torch.equal(answers[0], expected)
    model.generation_config = None  # it cannot answer then
    lone = read_batches((model, tokenizer), str(tmp_path / "text.txt"), 2, 10)
    assert lone[0]["decoder_input_ids"].shape[1] >= 1


@pytest.mark.parametrize(("suffix", "rate"), [("wav", 8_000), ("wav", 16_000), ("flac", 44_100)])
def test_sounds_have_the_rate_of_the_model(suffix: str, rate: int, tmp_path: Path) -> None:
    import soundfile

    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate).astype(np.float32)
    soundfile.write(tmp_path / f"tone.{suffix}", np.stack([tone, tone], axis=1), rate)
    sound = read_sound(tmp_path / f"tone.{suffix}", 16_000)
    assert abs(len(sound) - 16_000) <= 2
    spectrum = np.abs(np.fft.rfft(sound))
    assert abs(spectrum.argmax() / len(sound) * 16_000 - 440) < 2


def test_of_a_long_sound_a_part(tmp_path: Path) -> None:
    import soundfile

    ramp = np.linspace(-0.5, 0.5, 100 * (LONGEST + 20), dtype=np.float32)
    soundfile.write(tmp_path / "long.wav", ramp, 100, subtype="FLOAT")
    sound, again, other = (read_sound(tmp_path / "long.wav", 100, seed) for seed in (1, 1, 2))
    assert len(sound) == 100 * LONGEST
    assert np.array_equal(sound, again)
    assert not np.array_equal(sound, other)


def test_files_are_drawn_with_a_seed(tmp_path: Path) -> None:
    write_images(tmp_path / "photos" / "below", 8)
    files = find_media(str(tmp_path / "photos"), IMAGES, seed=0)
    assert len(files) == 8
    assert files == find_media(str(tmp_path / "photos"), IMAGES, seed=0)
    assert files != find_media(str(tmp_path / "photos"), IMAGES, seed=1)
    assert find_media(str(files[0]), IMAGES, seed=0) == [files[0]]
    batches = read_batches(loaded("ViTForImageClassification"), str(tmp_path / "photos"), 3, 0)
    assert [batch["pixel_values"].shape for batch in batches] == [(1, 3, 16, 16)] * 3
    with pytest.warns(UserWarning, match="holds 8 images, not 99: using those"):
        assert len(read_batches(loaded("ViTForImageClassification"), str(tmp_path / "photos"), 99, 0)) == 8


def test_captions(tmp_path: Path) -> None:
    photos = write_images(tmp_path / "photos", 2)
    (photos / "3.png").write_bytes((photos / "0.png").read_bytes())
    (photos / "3.txt").write_text(" a cat \n")
    (photos / "4.png").write_bytes((photos / "0.png").read_bytes())
    pairs = dict(read_captions(sorted(photos.glob("*.png"))))
    assert sorted(file.name for file in pairs) == ["0.png", "1.png", "3.png"]
    assert pairs[photos / "3.png"] == "a cat"
    (photos / "metadata.jsonl").write_text('{"file_name": "0.png"}\nno json')
    with pytest.raises(SmoothQuantError, match=r"line 2 of .*metadata.jsonl is no JSON with 'file_name'"):
        list(read_captions(sorted(photos.glob("*.png"))))


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SmoothQuantError, match=r"absent does not exist: give a folder of files that end in \.png"):
        find_media(str(tmp_path / "absent"), IMAGES, 0)
    with pytest.raises(SmoothQuantError, match="holds no file that ends in"):
        find_media(str(tmp_path), IMAGES, 0)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"nothing")
    with pytest.raises(SmoothQuantError, match=r"broken\.png cannot be read as an image"):
        read_image(broken)
    with pytest.raises(SmoothQuantError, match=r"broken\.png cannot be read as a sound"):
        read_sound(broken, 16_000)
    import soundfile

    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 16_000)
    with pytest.raises(SmoothQuantError, match="is a sound without samples"):
        read_sound(tmp_path / "empty.wav", 16_000)
    for package, read in (("PIL", lambda: read_image(broken)), ("soxr", lambda: read_sound(broken, 16_000))):
        with monkeypatch.context() as without:
            without.setitem(importlib.import_module("sys").modules, package, None)
            with pytest.raises(SmoothQuantError, match=r"needs the package \w+ to be read; install smoothquant-ext\[m"):
                read()


def test_kinds() -> None:
    kinds = {
        "BertModel": "text",
        "T5ForConditionalGeneration": "text",
        "LlavaForConditionalGeneration": "text",
        "ViTForImageClassification": "images",
        "WhisperForConditionalGeneration": "sound",
        "CLIPModel": "images with captions",
    }
    assert {name: data_kind(build_other(name)) for name in kinds} == kinds
    assert enough_samples(build_other("ViTForImageClassification"), 512) > enough_samples(
        build_other("Wav2Vec2ForCTC"), 512
    )
    model = build_other("BertModel")
    model.main_input_name = "point_clouds"
    with pytest.raises(SmoothQuantError, match="BertModel reads point_clouds, which this command cannot prepare"):
        data_kind(model)


def test_sentences_of_the_commands(tmp_path: Path) -> None:
    vit = write_other("ViTForImageClassification", tmp_path / "vit")
    clip = write_other("CLIPModel", tmp_path / "clip")
    sounds = write_sounds(tmp_path / "recordings", 1)
    bare = write_images(tmp_path / "bare", 1)
    (bare / "metadata.jsonl").unlink()
    quantize = ("quantize", vit, "-o", tmp_path / "w8a8")
    assert complaint(*quantize).startswith("ViTForImageClassification reads images: name a folder of them with --calib")
    assert "holds no file that ends in .png" in complaint(*quantize, "--calib", sounds)
    assert "holds no image with a caption, which CLIPModel compares" in complaint(
        "quantize", clip, "-o", tmp_path / "w8a8", "--calib", bare
    )
    assert "does not continue texts, so it can only be compared" in complaint("eval", vit, "--text", bare)
    assert "which does not continue texts; run it with transformers' pipelines" in complaint("generate", vit, "hello")
    bert = write_other("BertModel", tmp_path / "bert")
    assert "is BertModel, which does not continue texts" in complaint("serve", bert)
    (tmp_path / "text.txt").write_text("w5 w6 w7 " * 400)
    calib = ("--calib", tmp_path / "text.txt", "--samples", "4", "--seqlen", "24")
    assert "returns no logits, which its predictions would be seen by: without them --auto-skip cannot" in complaint(
        "quantize", bert, "-o", tmp_path / "w8a8", *calib, "--auto-skip", "1"
    )
    assert "BertModel does not continue texts, so it has no perplexity for --max-ppl-increase" in complaint(
        "quantize", bert, "-o", tmp_path / "w8a8", *calib, "--max-ppl-increase", "1%"
    )
    assert not (tmp_path / "w8a8").exists()
