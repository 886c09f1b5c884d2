"""Input sections: where samples come from, batch sizes, crops and augmentation, masks.

    Views(local_size=64).num_locals        # 8, the default

*Science*: every setting changes results. Rules and tags as in configs/schema.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from configs.section import (
    AddedLater,
    AreaRange,
    Count,
    Digest,
    Fraction,
    FractionRange,
    NotBool,
    Number,
    Paths,
    PixelRange,
    Positive,
    Section,
    UserError,
    Width,
)

Jitter = Annotated[Number, Field(ge=0.0, le=10.0)]  # factors are drawn from [max(0, 1 - this), 1 + this]

# Extensions of images (all that data/image_headers.py names, supported or not) and arrays, which hold no caption.
_BINARY_EXTS = (
    "jpg", "jpeg", "jpe", "jfif", "png", "apng", "webp", "bmp", "dib", "tif", "tiff", "gif", "avif",
    "heic", "heif", "hif", "jp2", "j2k", "jpx", "jpf", "jxl", "svg", "svgz", "psd", "psb",
    "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf", "exr", "hdr", "ico", "icns", "pbm", "pgm", "ppm", "pnm",
    "tga", "npy", "npz", "pt", "pth", "safetensors",
)  # fmt: skip


def check_caption(caption: str, key: str = "") -> str:
    """Return the value of data.caption if it names a member that can hold text; raise UserError otherwise.

    `key` is the name of the option, for the message.
    """
    extension, colon, field = caption.partition(":")
    found = f"{key}{caption!r}"
    if extension == "json" and not field:
        raise UserError(f"{found} names no field: a .json member holds a record; write json:KEY, such as json:caption")
    if colon and extension != "json":
        raise UserError(f"{found}: only .json members have fields; write {extension!r} or json:{field}")
    if extension in _BINARY_EXTS:
        raise UserError(
            f"{found}: a .{extension} member holds an image or an array, and a caption is text; write the extension "
            "of the member with the captions (txt), or json:KEY"
        )
    if not extension or extension != extension.lower() or extension.startswith(".") or extension.split() != [extension]:
        wanted = "".join(extension.split()).lstrip(".").lower() or "txt"
        raise UserError(f"{found} is not a member extension: those are in lower case, without a dot; write {wanted}")
    return caption


_Channel = Annotated[int, Field(ge=0, le=255), NotBool]
Colour = tuple[_Channel, _Channel, _Channel]  # red, green, blue
WHITE: Colour = (255, 255, 255)
_COLOURS = {"white": WHITE, "black": (0, 0, 0)}


def _parse_background(value: object) -> object:
    """Convert the name of a colour to its RGB values; keep "random" and RGB values. Raises ValueError otherwise."""
    named = _COLOURS.get(value, value) if isinstance(value, str) else value
    is_colour = (
        isinstance(named, list | tuple)
        and len(named) == 3
        and all(type(number) is int and 0 <= number <= 255 for number in named)
    )
    if named == "random" or is_colour:
        return named
    raise ValueError(
        f"{value!r} is not a background: it must be [red, green, blue] with integers from 0 to 255, white, black "
        "or random; write [128, 128, 128] for mid-grey"
    )


Background = Annotated[Literal["random"] | Colour, BeforeValidator(_parse_background)]


class ImageData(Section):
    """Where images come from and in which order they arrive (data/order.py)."""

    train: Paths  # shard paths or URLs; globs and brace ranges allowed
    held_out: Paths = ()  # read by evaluation only
    streams: Positive  # C canonical streams; every world size must divide it
    block_shards: Positive = 4  # samples are shuffled inside blocks of this many shards of one stream
    max_bad_share: Fraction = 0.02  # above this fraction of bad samples the run stops
    max_pixels: Positive = 50_000_000  # larger images are bad samples: they would stall a whole step
    # Background of transparent images. random: a colour for each view and epoch, in evaluation white
    background: Annotated[Background, AddedLater()] = WHITE

    @property
    def fixed_background(self) -> Colour:
        """The background of evaluation, where nothing is random: white in place of random."""
        return WHITE if self.background == "random" else self.background

    def check_world(self, world_size: int) -> None:
        """Raise UserError if `world_size` does not divide the streams.

        Every rank serves whole streams, so that global batches are the same at every world size.
        """
        if self.streams % world_size:
            sizes = ", ".join(str(size) for size in range(1, self.streams + 1) if self.streams % size == 0)
            raise UserError(
                f"{world_size} ranks do not divide data.streams={self.streams}: each rank serves whole streams; run "
                f"on {sizes} ranks, or change data.streams (it is science: the sample order changes with it)"
            )


class ImageTextData(ImageData):
    """Images and their captions."""

    tokenizer: str  # a tokenizer.json file, or a Hugging Face hub name (CLIP's for the real presets)
    # sha256 of that file: filled in at the start; if given, the file must match
    tokenizer_sha256: Annotated[Digest | None, AddedLater()] = None
    # Extension of the caption's member, or "json:KEY" for a field of the .json member; of a list, one is drawn by hash
    caption: Annotated[str, AfterValidator(check_caption)] = "txt"


class BatchSizes(Section):
    """Images of each objective in a step, over all ranks. Ratio in the paper 1 : 1/4 : 1/8 [P]."""

    clip: Positive
    ssl: Count
    rec: Count
    layout: Literal["nested", "disjoint"] = "nested"  # ssl and rec both lead, or rec follows ssl

    @model_validator(mode="after")
    def _fits(self) -> BatchSizes:
        used = max(self.ssl, self.rec) if self.layout == "nested" else self.ssl + self.rec
        if used > self.clip:
            raise ValueError(
                f"ssl={self.ssl} and rec={self.rec} ({self.layout}) need {used} rows but clip={self.clip}: "
                "ssl and rec images are rows of the clip batch; lower batch.ssl or batch.rec, or raise "
                "batch.clip"
            )
        return self


class ImageView(Section):
    """The crop that clip and rec see. Sizes in pixels, scales as fractions of the image area."""

    image_size: Width = 256  # [P]
    image_scale: AreaRange = (0.9, 1.0)


class Views(ImageView):
    """Crops and colour augmentation of every view; defaults are DINOv2's [D]."""

    global_size: Width = 256
    global_scale: AreaRange = (0.32, 1.0)
    local_size: Width = 96
    local_scale: AreaRange = (0.05, 0.32)
    num_locals: Annotated[int, Field(ge=0, le=1024), NotBool] = 8
    flip: Fraction = 0.5  # ssl crops only: captions mention left and right
    jitter: Fraction = 0.8  # probability of the colour jitter
    brightness: Jitter = 0.4
    contrast: Jitter = 0.4
    saturation: Jitter = 0.2
    hue: Number = Field(0.1, ge=0, le=0.5)  # in turns of the colour circle
    grey: Fraction = 0.2
    blur: tuple[Fraction, Fraction, Fraction] = (1.0, 0.1, 0.5)  # probability on global view 0, on 1, on local ones
    blur_sigma: PixelRange = (0.1, 2.0)  # in pixels at the crop's own size
    solarise: Fraction = 0.2  # global view 1 only


class Masks(Section):
    """iBOT block-wise masking of patches of the student's global crops [D]."""

    share_of_crops: Fraction = 0.5  # that are masked
    ratio: FractionRange = (0.1, 0.5)
