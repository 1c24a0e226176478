import io

import numpy as np
import pytest
import torch
from data_helpers import png_claiming
from PIL import Image
from torchvision import transforms

from lavin_ds.data import images
from lavin_ds.data.images import (
    CLIP_MEAN,
    CLIP_STD,
    IMAGENET_MEAN,
    IMAGENET_STD,
    ImageError,
    decode,
    normalise,
    resize,
)


def noise(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def encoded(image: Image.Image, format="PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


def normalised(pixels: np.ndarray, *statistics) -> torch.Tensor:
    return normalise(torch.from_numpy(pixels.copy())[None], *statistics)[0]


def test_crop_is_clips_preprocessing_to_the_last_bit(shared):
    folder = shared / "data/clip_preprocess"
    picture = decode((folder / "franz-kafka.jpg").read_bytes())
    expected = np.load(folder / "expected_preprocessed_image.npy")[0]
    assert np.abs(normalised(resize(picture, 224, "crop")).numpy() - expected).max() == 0


def test_squash_with_imagenet_statistics_is_the_authors_preprocessing_to_the_last_bit(shared):
    golden = np.load(shared / "golden/text/preproc.npz")
    pixels = resize(Image.fromarray(golden["raw"]), 224, "squash")
    result = normalised(pixels, IMAGENET_MEAN, IMAGENET_STD).numpy()
    assert np.abs(result[:, ::16, ::16] - golden["out_slice"]).max() == 0
    assert np.allclose(result.sum(axis=(1, 2), dtype=np.float64), golden["out_sum"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(120, 200), (333, 97), (65, 64), (64, 64), (50, 50), (101, 100)])
def test_crop_equals_torchvision(size):
    reference = transforms.Compose(
        [
            transforms.Resize(64, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    assert torch.equal(normalised(resize(noise(*size), 64, "crop")), reference(noise(*size)))


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode):
    format = "TIFF" if mode == "CMYK" else "PNG"
    picture = decode(encoded(Image.new(mode, (6, 5)), format))
    assert (picture.mode, picture.size) == ("RGB", (6, 5))


def test_transparency_is_dropped_as_the_authors_do():
    picture = decode(encoded(Image.new("RGBA", (2, 2), (10, 20, 30, 0))))
    assert picture.getpixel((0, 0)) == (10, 20, 30)


@pytest.mark.parametrize("content", [b"", b"not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_what_is_no_image_is_refused(content):
    with pytest.raises(ImageError, match="is not an image in a known format"):
        decode(content)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_a_truncated_image_is_refused(format):
    content = encoded(noise(80, 80), format)
    with pytest.raises(ImageError, match="cannot be decoded"):
        decode(content[: len(content) // 2])


def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(ImageError, match="10 x 10 pixels, over the limit of 99"):
        decode(encoded(noise(10, 10)))


def test_a_decompression_bomb_is_refused():
    with pytest.raises(ImageError, match="over the limit"):
        decode(png_claiming(10_000, 10_000))
    with pytest.raises(ImageError, match="decompression bomb"):
        decode(png_claiming(100_000, 100_000))


@pytest.mark.parametrize("size", [(120, 200), (333, 97), (64, 64)])
def test_pad_is_llavas(size):
    """Reference: expand2square of LLaVA-1.5, then CLIP's preprocessing, which finds a square and crops nothing."""
    picture, side = noise(*size), max(size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    reference = transforms.Compose(
        [
            transforms.Resize(64, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(64),
            transforms.ToTensor(),
            transforms.Normalize(CLIP_MEAN, CLIP_STD),
        ]
    )
    assert torch.equal(normalised(resize(picture, 64, "pad")), reference(square))


def test_a_long_strip_is_padded_without_a_square_of_its_length(monkeypatch):
    monkeypatch.setattr(images, "MAX_SIDE", 100)
    pixels = resize(Image.new("RGB", (1000, 100), (255, 0, 0)), 50, "pad")
    assert pixels.shape == (50, 50, 3)
    assert (pixels[25] == (255, 0, 0)).all() and (pixels[[0, 15, 35, -1]] == (122, 116, 104)).all()
