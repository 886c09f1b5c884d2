"""Building blocks of the schema: types of values with their ranges, the base class of sections, UserError."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class UserError(ValueError):
    """A mistake that the user can correct; commands print its message without a traceback.

    The message gives the value found, the rule and the remedy.
    """


def _check_range(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"{list(pair)} is not a range [low, high]: low must not exceed high; swap them")
    return pair


def _wrap_single_path(paths: object) -> object:
    """Convert a single path to a tuple, so that `data.train=shards/{000..099}.tar` needs no brackets."""
    return (paths,) if isinstance(paths, str) else paths


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


def _check_step_range(value: object) -> object:
    match = re.fullmatch(r"(\d+):(\d+)", str(value), re.ASCII)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"{value} is no window of steps: it is FIRST:END, counted from 0 and without END; "
            "write 10:13 for the steps 10, 11 and 12"
        )
    return value


def _check_directory(path: str) -> str:
    longest = max((len(part.encode("utf-8", "surrogateescape")) for part in path.split("/")), default=0)
    if longest > MAX_FILE_NAME_BYTES:
        raise ValueError(f"a name in it has {longest} bytes: file systems take {MAX_FILE_NAME_BYTES}; shorten it")
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is not a directory path; give one, or leave the key out")
    return path


MAX_FILE_NAME_BYTES = 255
NotBool = BeforeValidator(_refuse_bool)
Number = Annotated[float, NotBool]
MAX_COUNT = 2**31 - 1  # products of two counts fit into 64 bits
Seed = Annotated[int, Field(ge=0, lt=2**64), NotBool]  # unsigned 64-bit (data/hashing.py)
Positive = Annotated[int, Field(ge=1, le=MAX_COUNT), NotBool]
Count = Annotated[int, Field(ge=0, le=MAX_COUNT), NotBool]
Width = Annotated[int, Field(ge=1, le=65_536), NotBool]  # channels, hidden units, pixels a side
SmallPositive = Annotated[int, Field(ge=1, le=1024), NotBool]  # layers, heads, patches a side, threads
Seconds = Annotated[int, Field(ge=1, le=365 * 24 * 3600), NotBool]
Fraction = Annotated[Number, Field(ge=0.0, le=1.0)]
# Fraction of a running average that is kept at each update; at 1 it would never change.
Momentum = Annotated[Number, Field(ge=0.0, lt=1.0)]
Weight = Annotated[Number, Field(ge=0.0, le=1e6)]  # of a loss term
MlpRatio = Annotated[Number, Field(gt=0.0, le=64.0)]  # hidden width of an MLP / its width
Temperature = Annotated[Number, Field(ge=1e-3, le=1e3)]  # below, exp(cosine / temperature) overflows float32
# Fraction of samples trained without their class label; at 1 no class would be learnt.
ClassDropout = Annotated[Number, Field(ge=0.0, lt=1.0)]
Range = tuple[float, float]
Amount = Annotated[Number, Field(ge=0.0, le=1e6)]
LearningRate = Annotated[Number, Field(gt=0.0, le=100.0)]
Betas = tuple[Momentum, Momentum]
WeightDecay = Annotated[Number, Field(ge=0.0, le=100.0)]
ClipNorm = Annotated[Number, Field(ge=1e-9, le=1e9)]
Area = Annotated[Number, Field(gt=0.0, le=1.0)]  # fraction of an image's area, above 0
AreaRange = Annotated[tuple[Area, Area], AfterValidator(_check_range)]
FractionRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_check_range)]
# Range from which a masked fraction is drawn; negative draws count as 0, and 1 would leave no patch.
MaskRange = Annotated[
    tuple[Annotated[Number, Field(ge=-100.0, lt=1.0)], Annotated[Number, Field(gt=0.0, lt=1.0)]],
    AfterValidator(_check_range),
]
AmountRange = Annotated[tuple[Amount, Amount], AfterValidator(_check_range)]
# Range of a blur's sigma, in pixels of the crop.
PixelRange = Annotated[
    tuple[Annotated[Number, Field(ge=0.0, le=1024.0)], Annotated[Number, Field(ge=0.0, le=1024.0)]],
    AfterValidator(_check_range),
]
StepRange = Annotated[str, BeforeValidator(_check_step_range)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # sha256 in hexadecimal digits
Directory = Annotated[str, AfterValidator(_check_directory)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_wrap_single_path)]


def require_digest(key: str, path: str | None, digest_key: str, given: str | None, found: str | None) -> None:
    """Raise UserError if the digest `found` of the file `path` (setting `key`) is not the one `given` in the config."""
    if given not in (None, found):
        raise UserError(
            f"{key}={path} has the digest {found}, but {digest_key}={given}: this is another file; give the one that "
            f"was meant, or remove {digest_key}"
        )


def require_hidden_units(width: int, ratio: float) -> None:
    """Raise ValueError if an MLP of int(width * ratio) hidden units would have none."""
    if int(width * ratio) < 1:
        raise ValueError(
            f"width={width} with an MLP of {ratio:.3g} times as many hidden units: that is less than one; raise "
            "mlp_ratio or width"
        )


class Section(BaseModel):
    """Base class of every section: immutable; unknown keys and non-finite numbers raise ValidationError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class AddedLater:
    """Marks a setting added after runs had been made without it: `variance: Annotated[..., AddedLater()] = "fixed"`.

    Its default is what those runs did and never changes. The fingerprint leaves the setting out while it is at its
    default, so earlier configs keep their fingerprints.
    """


def drop_added_later_defaults(section: Section, tree: dict[str, Any]) -> None:
    """Remove from `tree`, a dump of the section, every AddedLater setting that is at its default."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if any(isinstance(mark, AddedLater) for mark in field.metadata) and value == field.default:
            tree.pop(name, None)
        elif isinstance(value, Section) and name in tree:
            drop_added_later_defaults(value, tree[name])
