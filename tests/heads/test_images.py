import io
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, ViTImageProcessorPil

from distill.errors import DataError
from distill.heads.images import CONFIG, Preprocessing, encode_image, read_image, reread, written
from distill.readers import image_reader

RNG = np.random.default_rng(0)


def saved(processor, folder):
    processor.save_pretrained(folder)
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessorPil(size={"height": 16, "width": 24}),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, resample=3, image_mean=[0.1, 0.2, 0.3]),
        ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False),
        CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 18}),
    ],
)
@pytest.mark.parametrize("shape", [(8, 8, 3), (37, 51, 3), (51, 20, 3), (16, 16, 3), (16, 18, 3), (20, 24, 3)])
def test_pixels_are_those_of_the_image_processor(processor, shape, tmp_path):
    image = RNG.integers(0, 256, shape, np.uint8)
    ours = Preprocessing.of(saved(processor, tmp_path))
    wanted = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    found = ours.normalise(ours.pixels(image))
    assert found.shape == ours.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_an_image_is_the_same_from_a_file_bytes_lists_and_grey(tmp_path):
    grey = RNG.integers(0, 256, (8, 8), np.uint8)
    path = tmp_path / "one.png"
    path.write_bytes(encode_image(grey))
    for given in (str(path), path, path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, grey.tolist()):
        np.testing.assert_array_equal(read_image(given), grey)
    pixels = Preprocessing((8, 8), None, 2, 1.0, (0.0,) * 3, (1.0,) * 3).pixels(grey)
    np.testing.assert_array_equal(pixels, np.stack([grey] * 3))
    one = Preprocessing((8, 8), None, 2, 1.0, (0.0,), (1.0,)).pixels(np.stack([grey] * 3, axis=2))
    np.testing.assert_array_equal(one, grey[None])


def test_what_json_keeps_is_given_back():
    pixels = RNG.integers(0, 256, (3, 5, 7), np.uint8)
    np.testing.assert_array_equal(reread(json.loads(json.dumps(written(pixels)))).array, pixels)


def test_pixels_that_were_read_are_not_read_again():
    """Of a crop's own size an image is still resized first, and what a model saw of one is not."""
    images = Preprocessing((20, 0), (16, 18), 3, 1.0, (0.0,) * 3, (1.0,) * 3)
    seen = images.pixels(RNG.integers(0, 256, (37, 51, 3), np.uint8))
    kept = reread(json.loads(json.dumps(written(seen.transpose(1, 2, 0)))))
    np.testing.assert_array_equal(images.pixels(kept), seen)
    assert not np.array_equal(images.pixels(kept.array), seen)
    with pytest.raises(DataError, match=r"pixels of shape \(3, 16, 18\) were not read by this model, which reads"):
        Preprocessing((20, 0), (16, 16), 3, 1.0, (0.0,) * 3, (1.0,) * 3).pixels(kept)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (b"not an image", "12 bytes do not decode as an image"),
        ("nowhere.png", "there is no such image file"),
        ([[1, 2], [3]], "rows of unequal length"),
        ([[1, 300], [3, 4]], "numbers from 1 to 300 are no pixels"),
        ([1, 2, 3], r"an array of 1 dimensions \(3,\) is no image"),
        (None, "None is no image"),
    ],
)
def test_what_is_no_image_is_refused_in_one_line(given, reason):
    with pytest.raises(DataError, match=reason) as caught:
        read_image(given)
    assert "\n" not in str(caught.value)


def test_an_image_that_is_cut_off_is_refused():
    file = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)).save(file, "PNG")
    with pytest.raises(DataError, match="do not decode"):
        read_image(file.getvalue()[:200])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"do_pad": True, "size": {"height": 8, "width": 8}}, "do_pad is not known"),
        ({"size": {"shortest_edge": 8}}, "names no height and width"),
        ({}, "names no height and width"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(config, reason):
    with pytest.raises(DataError, match=reason):
        Preprocessing.of(config)


def test_an_image_that_was_stored_sideways_is_read_upright():
    """As `datasets` and transformers read what a phone took."""
    whole, stored = Image.new("RGB", (16, 8)), io.BytesIO()
    exif = whole.getexif()
    exif[0x0112] = 6
    whole.save(stored, "JPEG", exif=exif)
    assert read_image(stored.getvalue()).shape == (16, 8, 3)


def test_a_palette_with_transparency_is_an_image():
    stored = io.BytesIO()
    Image.new("P", (8, 8)).save(stored, "PNG", transparency=bytes([0, 128]))
    assert read_image(stored.getvalue()).shape == (8, 8, 3)


@pytest.mark.parametrize("kind", ["feature_extractor_type", "image_processor_type"])
def test_a_lone_number_is_the_shorter_side_to_clip(kind, tmp_path):
    """So the first checkpoints of CLIP have it; to a ViT it is both sides."""
    said = {kind: "CLIPFeatureExtractor", "size": 20, "crop_size": 16, "do_center_crop": True, "resample": 3}
    (tmp_path / CONFIG).write_text(json.dumps(said))
    image = RNG.integers(0, 256, (30, 60, 3), np.uint8)
    ours = image_reader(said, (3, 16, 16), 5)
    processor = CLIPImageProcessorPil.from_pretrained(tmp_path)
    assert processor.size["shortest_edge"] == ours.config["size"]["shortest_edge"] == 20
    wanted = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0]
    same = replace(ours.images, mean=tuple(processor.image_mean), std=tuple(processor.image_std))
    np.testing.assert_allclose(same.normalise(same.pixels(image)), wanted, atol=2e-6)
    square = image_reader({**said, kind: "ViTImageProcessor"}, (3, 16, 16), 5)
    assert square.images.size == (20, 20)


def test_what_a_camera_wrote_beside_the_pixels_may_be_broken():
    exif = Image.Exif()
    exif[0x010F], exif[0x0132] = "a maker of cameras with a long name", "2011:05:05 10:00:00"
    file, image = io.BytesIO(), RNG.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(image).save(file, "JPEG", exif=exif.tobytes()[:-20])
    with pytest.warns(UserWarning, match="Truncated File Read"):
        assert Image.open(io.BytesIO(file.getvalue())).getexif() is not None
    assert read_image(file.getvalue()).shape == (16, 16, 3)


def test_sixteen_bits_are_not_cut_off_at_white():
    ramp = np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "PNG")
    np.testing.assert_array_equal(read_image(file.getvalue()), ramp >> 8)
    file = io.BytesIO()
    Image.fromarray((ramp / 7).astype(np.float32)).save(file, "TIFF")
    with pytest.raises(DataError, match=r"image: numbers from 0 to 9362.* are no pixels"):
        read_image(file.getvalue())
