"""Images: prep decodes and resizes files to pixels, and the device turns pixels into normalised floats.

Dimensions: N images, S image side in pixels.
"""

from __future__ import annotations

import io
import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

if TYPE_CHECKING:
    import torch

    from lavin_ds.config import ImageResize

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN = (0.485, 0.456, 0.406)  # what the LaVIN authors normalise by (reference, section 8)
IMAGENET_STD = (0.229, 0.224, 0.225)

MAX_PIXELS = 50_000_000  # 150 MB as RGB; a file of a few kB can claim far more
MAX_SIDE = 7_000  # of a padded square: it then has about MAX_PIXELS
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow decodes these itself, without another program


class ImageError(Exception):
    """An image cannot be used. The message is a clause without the file's name: "has 3 x 9 pixels, over .."."""


def decode(content: bytes) -> Image.Image:
    """Decodes a file's bytes to RGB. Transparency is dropped, not blended, as in the authors' code.

    Raises:
        ImageError: not an image of a known format, truncated, or of more than MAX_PIXELS pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is below Pillow's
            image = Image.open(io.BytesIO(content), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"has {width} x {height} pixels, over the limit of {MAX_PIXELS}")
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    except ImageError:
        raise
    except UnidentifiedImageError:  # Pillow's message holds a memory address, which differs from run to run
        raise ImageError(f"is not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise ImageError(f"is a decompression bomb ({error})") from None
    # Pillow's decoders raise nearly anything on damaged files.
    except Exception as error:
        raise ImageError(f"cannot be decoded ({type(error).__name__}: {error})") from None


def resize(image: Image.Image, size: int, how: ImageResize) -> np.ndarray:
    """Bicubic to a square of `size`; uint8 [size, size, 3].

    squash   keeps the whole image and loses its aspect ratio, as LaVIN does
    crop     keeps the aspect ratio and the middle of the image, as CLIP does
    pad      keeps the whole image and its aspect ratio, and adds bars of CLIP's mean colour, as LLaVA-1.5 does
    """
    if how == "crop":
        return _crop(image, size)
    if how == "pad":
        image = _pad_to_square(image)
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def _crop(image: Image.Image, size: int) -> np.ndarray:
    width, height = image.size
    short = min(width, height)
    # As in torchvision, the long side is rounded down and the crop's corner to the nearest, halves to even.
    width, height = (size if side == short else int(size * side / short) for side in (width, height))
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def _pad_to_square(image: Image.Image) -> Image.Image:
    longest = max(image.size)
    if longest > MAX_SIDE:  # a long strip would make a square of gigabytes
        width, height = (max(1, round(side * MAX_SIDE / longest)) for side in image.size)
        image, longest = image.resize((width, height), Image.Resampling.BICUBIC), MAX_SIDE
    square = Image.new("RGB", (longest, longest), tuple(int(255 * mean) for mean in CLIP_MEAN))
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    return square


def normalise(
    images_NHWC: torch.Tensor, mean: tuple[float, ...] = CLIP_MEAN, std: tuple[float, ...] = CLIP_STD
) -> torch.Tensor:
    """uint8 [N, S, S, 3] to float32 [N, 3, S, S] on the same device, with torchvision's numerics."""
    import torch  # not at the top: prep and its workers need no torch

    x_NCHW = images_NHWC.permute(0, 3, 1, 2).to(torch.float32).div(255)
    # Filled on the device, because copying a list to a GPU would make the host wait.
    fill = partial(torch.full, (1, 1, 1), dtype=torch.float32, device=x_NCHW.device)
    channels = [torch.cat([fill(fill_value=value) for value in three]) for three in (mean, std)]
    return x_NCHW.sub(channels[0]).div(channels[1])
