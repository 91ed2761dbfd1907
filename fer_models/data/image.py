"""Bytes to pixels, whatever the file; every fault is one line."""

import io
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from .source import DataError, one_line

MAX_SIDE = 10_000
"""Larger images are refused before they are decoded: a face picture is never that large, a bomb may be."""

# A list of its own: PIL would also hand PostScript to Ghostscript.
_FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF", "PPM")


class ImageError(DataError):
    """An image that cannot be used."""


def decode_image(data: bytes) -> Tensor:
    """An image file as RGB, uint8, (3, H, W).

    Gray is repeated, 16 bits lose the lower 8, CMYK is converted, transparent pixels are laid on black, EXIF
    rotation is applied, and of several frames the first is taken.
    """
    if not data:
        raise ImageError("0 bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on metadata; the size limit below is our own
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            width, height = image.size
            if max(width, height) > MAX_SIDE:
                raise ImageError(f"{width} x {height} pixels, more than {MAX_SIDE} on a side")
            return pil_pixels(image)
    except ImageError:
        raise
    except Image.UnidentifiedImageError:
        raise ImageError(f"not an image (starts with {data[:8]!r})") from None
    except (
        Exception
    ) as error:  # decoders of damaged data raise anything: SyntaxError, IndexError, struct.error
        raise ImageError(f"damaged image of {len(data)} bytes ({one_line(error)})") from None


def pil_pixels(image: Image.Image) -> Tensor:
    """A PIL image as `decode_image` gives one."""
    if 0 in image.size:
        raise ImageError(f"an image without pixels: {image.size}")
    image.load()
    return torch.from_numpy(_to_rgb(image)).permute(2, 0, 1).contiguous()


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        pass
    elif image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError("32-bit pixels, expected 8 or 16")
        # convert("RGB") would clip at 255
        gray = (values >> 8).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)
    elif image.mode == "F":
        raise ImageError("floating-point pixels, expected 8 or 16 bits")
    elif "A" in image.mode.upper()[-1:] or "transparency" in image.info:
        rgba = image.convert("RGBA")
        black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
        image = Image.alpha_composite(black, rgba).convert("RGB")
    else:
        image = image.convert("RGB")
    return np.array(image)  # a copy: torch wants writable memory
