"""From encoded images to tensors: decoded, set upright, resized and cut to their shape at every read."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import xxhash
from PIL import Image, ImageOps, UnidentifiedImageError

from trainers.data.config import DataConfig
from trainers.data.index_cache import cached
from trainers.data.samples import Buckets, Samples, Source
from trainers.errors import BrokenSampleError, ConfigError

_EXIF_ORIENTATION = 0x0112
_LYING = (5, 6, 7, 8)  # values of it that exchange height and width
_READERS = 16  # threads that find out sizes, which mostly wait for storage
_MOST_CLASSES = 1 << 31


@dataclass(frozen=True, kw_only=True)
class Record:
    """One sample, as it is stored."""

    image: bytes
    """An encoded image: PNG, JPEG, ..."""
    caption: str | None = None
    """None: captions are not read."""


class Records(Protocol):
    """Encoded images that are read by index. Reading is thread-safe."""

    labels: np.ndarray | None
    """(N,) int64"""
    num_classes: int | None
    has_captions: bool
    identity: str

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What a person finds the sample by."""
        ...

    def version(self) -> str:
        """As `identity`, but another one also where only the bytes of images are others, as far as that is cheap."""
        return self.identity

    def read(self, index: int) -> Record:
        """One sample.

        Raises:
            BrokenSampleError: the sample itself is at fault; reading it again will not help.
        """
        ...


class ImageSource(Source):
    """Images as RGB, each cut and resized to the shape of its bucket, or to a square."""

    channels = 3

    def __init__(self, records: Records, config: DataConfig) -> None:
        self._records = records
        self.num_classes = records.num_classes
        self.has_captions = records.has_captions
        self.identity = records.identity
        self._shapes: tuple[tuple[int, int], ...] = ((config.image_size, config.image_size),)
        self._bucket_of = np.zeros(len(records), dtype=np.int64)
        if config.buckets is not None:
            self._shapes = tuple(config.buckets.shapes(config.image_size))
            sizes = cached(config.cache, f"sizes-{records.version()}", lambda: _sizes(records))
            self._bucket_of = nearest_bucket(sizes, self._shapes)
            # They decide who comes when, so workers that see other sizes, or an attempt that does, must be noticed.
            self.identity = digest(records.identity, xxhash.xxh3_128_hexdigest(self._bucket_of.tobytes()))
            self.buckets = Buckets(shapes=self._shapes, of=self._bucket_of)

    def __len__(self) -> int:
        return len(self._records)

    def read(self, indices: np.ndarray, crops: np.ndarray | None = None) -> Samples:
        """As `Source.read`.

        Raises:
            BrokenSampleError: one of the images can not be decoded.
        """
        crops = np.full((len(indices), 2), 0.5) if crops is None else crops
        images, sizes, captions = [], [], []
        for index, place in zip(indices.tolist(), crops.tolist(), strict=True):
            record = self._records.read(index)
            with broken_if_undecodable(self._records.name(index)):
                image, size = _decode(record.image, self._shapes[self._bucket_of[index]], place)
            if record.caption is not None:
                _check_text(record.caption, self._records.name(index))
            images.append(image)
            sizes.append(size)
            captions.append(record.caption)
        labels = self._records.labels
        return Samples(
            images=torch.stack(images),
            labels=None if labels is None else torch.from_numpy(labels[indices]),
            captions=tuple(captions) if self.has_captions else None,
            sizes=torch.tensor(sizes, dtype=torch.float32),
        )


@contextmanager
def broken_if_undecodable(name: str) -> Iterator[None]:
    """Whatever is raised inside is the fault of the bytes that are decoded there."""
    try:
        yield
    except (MemoryError, ConfigError):
        raise
    except Exception as error:  # decoders of damaged files raise OSError, SyntaxError, struct.error, zlib.error, ...
        # Its own message has an address in memory, and a sample has to be called the same whenever it is met.
        reason = "no known format" if isinstance(error, UnidentifiedImageError) else error
        raise BrokenSampleError(
            f"data.path: {name} can not be read as an image ({reason}); repair or remove it, or set data.on_broken=skip"
        ) from error


def _check_text(caption: str, name: str) -> None:
    try:
        caption.encode()
    except UnicodeEncodeError as error:  # half of an emoji, which no tokenizer takes
        raise BrokenSampleError(
            f"data.path: the text of {name} has half a character ({error.object[error.start]!r}); correct it, or set"
            " data.on_broken=skip"
        ) from error


def _decode(data: bytes, shape: tuple[int, int], place: list[float]) -> tuple[torch.Tensor, tuple[float, ...]]:
    """(3, H, W) float32 in [-1, 1], and the six sizes of `Samples`.

    Args:
        place: in [0, 1), where the cut lies from top to bottom and from left to right.
    """
    with Image.open(io.BytesIO(data)) as image:
        upright = _as_seen(image)
    height, width = shape
    fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BICUBIC, centering=(place[1], place[0]))
    pixels = torch.from_numpy(np.array(fitted, dtype=np.float32))  # (H, W, 3)
    scale = max(height / upright.height, width / upright.width)
    top = max(0.0, upright.height * scale - height) * place[0] // 1
    left = max(0.0, upright.width * scale - width) * place[1] // 1
    sizes = (upright.height, upright.width, top, left, height, width)
    return (pixels / 127.5 - 1).permute(2, 0, 1), sizes


def _as_seen(image: Image.Image) -> Image.Image:
    """`image` as it is shown: upright, in RGB, on white where it is transparent.

    Raises:
        ValueError: its pixels are 32-bit numbers, and nobody knows which of them is white.
    """
    # Cameras store the turn of a photo in EXIF; without this it would be trained on lying on its side.
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # `convert` would make 255 of whatever is more
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bits, mode {image.mode}; make them 8 or 16")
    if image.has_transparency_data:  # `convert` would bring up the colour that lies below, often black or garbage
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def nearest_bucket(sizes: np.ndarray, shapes: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The bucket of nearest aspect ratio for each image; the first of equally near ones.

    Args:
        sizes: (N, 2) int64, height and width; an unreadable image has zeros, and goes with the squares.

    Returns:
        (N,) int64 indices into `shapes`.
    """
    ratios = np.log(np.maximum(sizes[:, 0], 1) / np.maximum(sizes[:, 1], 1))
    of_shapes = np.log([height / width for height, width in shapes])
    return np.abs(ratios[:, None] - of_shapes).argmin(axis=1)


def _sizes(records: Records) -> np.ndarray:
    """(N, 2) int64: height and width of every image as it is seen upright."""

    def size(index: int) -> tuple[int, int]:
        try:
            with (
                broken_if_undecodable(records.name(index)),
                Image.open(io.BytesIO(records.read(index).image)) as image,
            ):
                lying = image.getexif().get(_EXIF_ORIENTATION) in _LYING
                return (image.width, image.height) if lying else (image.height, image.width)
        except BrokenSampleError:
            return 0, 0  # whether that ends the run is decided when it is trained on

    with ThreadPoolExecutor(_READERS) as pool:
        return np.array(list(pool.map(size, range(len(records)))), dtype=np.int64).reshape(-1, 2)


def digest(*parts: object) -> str:
    """XXH3-128 of the texts of `parts`, one after the other."""
    found = xxhash.xxh3_128()
    for part in parts:
        found.update(f"{part}\n".encode(errors="surrogatepass"))  # file names may be any bytes
    return found.hexdigest()


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """The endings of files that can be read as images, with the dot."""
    return tuple(sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN))


def number_classes(labels: list[object], where: str) -> tuple[np.ndarray, int]:
    """(N,) int64 class numbers and their count, of numbers as they are, or of names in sorted order.

    Raises:
        ConfigError: they are neither.
    """
    if all(isinstance(label, int) and not isinstance(label, bool) and 0 <= label < _MOST_CLASSES for label in labels):
        numbers = np.array(labels, dtype=np.int64)
        return numbers, int(numbers.max()) + 1
    if all(isinstance(label, str) for label in labels):
        names = {name: number for number, name in enumerate(sorted({str(label) for label in labels}))}
        return np.array([names[str(label)] for label in labels], dtype=np.int64), len(names)
    first = labels[0]
    odd = next(
        (
            label
            for label in labels
            if type(label) is not type(first) or (isinstance(label, int) and not 0 <= label < _MOST_CLASSES)
        ),
        first,
    )
    raise ConfigError(
        f"{where}: labels such as {first!r} and {odd!r} are no classes; give every sample a number from 0,"
        " or every one a name"
    )
