"""From an encoded image to a model's input, within limits that damaged files cannot exceed."""

import contextlib
import dataclasses
import math
import threading
import warnings
from collections.abc import Callable
from typing import BinaryIO, Literal

import numpy as np
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError

from tapvit_jax.errors import InputError
from tapvit_jax.structs import check_fields

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_MODES = {1: "L", 3: "RGB"}
_MAX_PIXELS = 2**27
# A few kilobytes may unfold to the pixels above, on each of many threads: larger images than these
# (16.8 million pixels; most telephones take 12 million) are decoded one at a time.
_MANY_PIXELS = 2**24
_one_large = threading.Lock()
# Pillow goes by the contents, not by the suffix. Naming the decoders keeps a renamed file away from
# the many others, some of which start other programs.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")

# Images are bounded by _MAX_PIXELS below. Pillow's own warning about large ones comes from decoding
# threads, where a filter set around one call would leak into all others, so it is set once.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(InputError):
    """An image is missing, damaged or absurdly large; the others may be used without it."""


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How an image becomes a model's input; it travels with the model.

    The shorter side is resized to floor(image_size / crop_pct), the centre cropped, pixels scaled
    to [0, 1], then (x - mean) / std: timm's evaluation transform.

    Raises:
      InputError: a value out of range, images of an absurd size, or as many means or deviations as
        there are no channels.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels: int = 3
    crop_pct: float = 1.0
    interpolation: Literal["nearest", "bilinear", "bicubic", "lanczos"] = "bicubic"

    def __post_init__(self):
        check_fields(self)
        if self.image_size < 1:
            raise InputError(f"image_size is {self.image_size}, expected 1 or more")
        if self.channels not in _MODES:
            raise InputError(f"channels is {self.channels}, expected 1 or 3")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct is {self.crop_pct}, expected more than 0 and at most 1")
        # Not as a product, which may be too large for a float.
        if self.image_size > math.isqrt(_MAX_PIXELS) * self.crop_pct:
            raise InputError(
                f"image_size is {self.image_size} and crop_pct {self.crop_pct}: images would be "
                f"resized to more than {_MAX_PIXELS} pixels"
            )
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise InputError(
                f"mean and std have {len(self.mean)} and {len(self.std)} entries, "
                f"expected {self.channels}"
            )
        if not all(math.isfinite(m) for m in self.mean):
            raise InputError(f"mean is {self.mean}, expected finite values")
        if not all(s > 0 and math.isfinite(s) for s in self.std):
            raise InputError(f"std is {self.std}, expected finite positive values")

    def array(self, image: Image.Image) -> Float[np.ndarray, "s s c"]:
        """Prepare one image. A grey image of mode "F" holds values in [0, 1] already.

        Raises:
          InputError: so elongated that the resized image would be absurdly large.
        """
        exact = image.mode == "F"
        if not exact:
            image = _convert(image, _MODES[self.channels])
        shorter = math.floor(self.image_size / self.crop_pct)
        # Rounded down here and to even below, as torchvision does under timm: a pixel more or less
        # resamples the whole image differently.
        longer = int(shorter * max(image.size) / min(image.size))
        if shorter * longer > _MAX_PIXELS:
            raise InputError(
                f"{image.width} x {image.height} pixels: too elongated to be resized to {shorter} "
                f"x {longer}, expected at most {_MAX_PIXELS} pixels"
            )
        size = (shorter, longer) if image.width <= image.height else (longer, shorter)
        if min(image.size) != shorter:
            image = image.resize(size, _FILTERS[self.interpolation])
        left, top = (round((length - self.image_size) / 2) for length in image.size)
        image = image.crop((left, top, left + self.image_size, top + self.image_size))
        pixels = np.asarray(image).astype(np.float32)
        pixels = pixels.reshape(self.image_size, self.image_size, -1)
        if not exact:
            pixels /= 255
        if pixels.shape[-1] != self.channels:
            pixels = np.repeat(pixels, self.channels, axis=-1)
        # In place and in whole rows: five times as fast as over a last axis of three.
        rows = pixels.reshape(self.image_size, -1)
        rows -= np.tile(np.float32(self.mean), self.image_size)
        rows /= np.tile(np.float32(self.std), self.image_size)
        return pixels


def _convert(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit greys at 255 instead of scaling them.
        deep = np.asarray(image)
        if deep.dtype.itemsize > 2:
            deep = np.clip(deep, 0, 2**16 - 1)
        image = Image.fromarray((deep >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        # Straight to RGB gives the same colours and a warning.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def decode(
    read: Callable[[], BinaryIO], name: str, preprocess: Preprocess
) -> Float[np.ndarray, "s s c"]:
    """Decode and prepare one encoded image.

    Raises:
      ImageError: whatever goes wrong; names the image.
    """
    try:
        with read() as stream, Image.open(stream, formats=_FORMATS) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise InputError(
                    f"{image.width} x {image.height} pixels, expected at most {_MAX_PIXELS}"
                )
            if image.mode == "F" or (image.format == "TIFF" and image.mode == "I"):
                # Of any scale, unlike bytes and unsigned 16-bit greys.
                raise InputError("pixels are floats or 32-bit, expected 8 or 16 bits")
            large = image.width * image.height > _MANY_PIXELS
            with _one_large if large else contextlib.nullcontext():
                return preprocess.array(image)
    except FileNotFoundError as error:
        raise ImageError(f"{name}: image is missing") from error
    except InputError as error:
        raise ImageError(f"{name}: {error}") from error
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        # Pillow's own text ends in the stream's address.
        raise ImageError(
            f"{name}: image is corrupt or in another format than {', '.join(_FORMATS)}"
        ) from error
    except Exception as error:
        # Damaged files make Pillow's decoders raise nearly anything.
        raise ImageError(f"{name}: image is corrupt ({error})") from error
