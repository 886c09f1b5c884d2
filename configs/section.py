"""What the schema is made of: the kinds of values a setting may have, and the error of a wrong one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class UserError(ValueError):
    """A mistake the user can mend.

    The message says what was found, the rule and the remedy; no traceback is shown.
    """


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"{list(pair)} is not a range [low, high]: low must not exceed high; swap them")
    return pair


def _one_is_a_list(paths: object) -> object:
    """On a command line `data.train=shards/{000..099}.tar` needs no brackets."""
    return (paths,) if isinstance(paths, str) else paths


def _no_truth_value(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


def _steps_in_order(value: object) -> object:
    found = re.fullmatch(r"(\d+):(\d+)", str(value), re.ASCII)
    if found is None or int(found[1]) >= int(found[2]):
        raise ValueError(
            f"{value} is no window of steps: it is FIRST:END, counted from 0 and without END; "
            "write 10:13 for the steps 10, 11 and 12"
        )
    return value


def _check_directory(path: str) -> str:
    longest = max((len(part.encode("utf-8", "surrogateescape")) for part in path.split("/")), default=0)
    if longest > MOST_FILE_NAME_BYTES:
        raise ValueError(f"a name in it has {longest} bytes: file systems take {MOST_FILE_NAME_BYTES}; shorten it")
    if not path or "\0" in path:
        raise ValueError(f"{path!r} is not a directory path; give one, or leave the key out")
    return path


MOST_FILE_NAME_BYTES = 255
NotBool = BeforeValidator(_no_truth_value)
Number = Annotated[float, NotBool]
MOST_COUNT = 2**31 - 1  # products of two counts fit into 64 bits
Seed = Annotated[int, Field(ge=0, lt=2**64), NotBool]  # unsigned 64-bit (data/hashing.py)
Positive = Annotated[int, Field(ge=1, le=MOST_COUNT), NotBool]
Count = Annotated[int, Field(ge=0, le=MOST_COUNT), NotBool]
Width = Annotated[int, Field(ge=1, le=65_536), NotBool]  # channels, hidden units, pixels a side
SmallPositive = Annotated[int, Field(ge=1, le=1024), NotBool]  # layers, heads, patches a side, threads
Seconds = Annotated[int, Field(ge=1, le=365 * 24 * 3600), NotBool]
Share = Annotated[Number, Field(ge=0.0, le=1.0)]
# Share of a running average that is kept; at 1 it would never change.
Momentum = Annotated[Number, Field(ge=0.0, lt=1.0)]
Weight = Annotated[Number, Field(ge=0.0, le=1e6)]  # of a loss term
MlpRatio = Annotated[Number, Field(gt=0.0, le=64.0)]  # hidden width of an MLP / its width
Temperature = Annotated[Number, Field(ge=1e-3, le=1e3)]  # below, exp(cosine / temperature) overflows float32
# Share of samples that are trained without their class; at 1 no class would be learnt.
ClassDropout = Annotated[Number, Field(ge=0.0, lt=1.0)]
Range = tuple[float, float]
Amount = Annotated[Number, Field(ge=0.0, le=1e6)]
LearningRate = Annotated[Number, Field(gt=0.0, le=100.0)]
Betas = tuple[Momentum, Momentum]
WeightDecay = Annotated[Number, Field(ge=0.0, le=100.0)]
ClipNorm = Annotated[Number, Field(ge=1e-9, le=1e9)]
Area = Annotated[Number, Field(gt=0.0, le=1.0)]  # share of an image's area; a crop has some
AreaRange = Annotated[tuple[Area, Area], AfterValidator(_ordered)]
ShareRange = Annotated[tuple[Share, Share], AfterValidator(_ordered)]
# From which a share is drawn, what is below 0 counting as 0; 1 would leave nothing.
MaskRange = Annotated[
    tuple[Annotated[Number, Field(ge=-100.0, lt=1.0)], Annotated[Number, Field(gt=0.0, lt=1.0)]],
    AfterValidator(_ordered),
]
AmountRange = Annotated[tuple[Amount, Amount], AfterValidator(_ordered)]
# Of a blur's sigma, in pixels of the crop.
PixelRange = Annotated[
    tuple[Annotated[Number, Field(ge=0.0, le=1024.0)], Annotated[Number, Field(ge=0.0, le=1024.0)]],
    AfterValidator(_ordered),
]
StepSpan = Annotated[str, BeforeValidator(_steps_in_order)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]  # sha256 in hexadecimal digits
Directory = Annotated[str, AfterValidator(_check_directory)]
Paths = Annotated[tuple[str, ...], BeforeValidator(_one_is_a_list)]


def require_digest(key: str, path: str | None, digest_key: str, given: str | None, found: str | None) -> None:
    """Raise UserError where the file `path` of setting `key` does not have the digest that was given."""
    if given not in (None, found):
        raise UserError(
            f"{key}={path} has the digest {found}, but {digest_key}={given}: this is another file; give the one that "
            f"was meant, or remove {digest_key}"
        )


def require_hidden_units(width: int, ratio: float) -> None:
    """Raise ValueError where an MLP of int(width * ratio) hidden units has none."""
    if int(width * ratio) < 1:
        raise ValueError(
            f"width={width} with an MLP of {ratio:.3g} times as many hidden units: that is less than one; raise "
            "mlp_ratio or width"
        )


class Section(BaseModel):
    """Base of every section: frozen. An unknown key or a number that is not finite is pydantic's ValidationError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Later:
    """Marks a setting that came when runs had been made without it: `variance: Annotated[..., Later()] = "fixed"`.

    Its default is what those runs did, and never changes; so a config that leaves it there has their fingerprint still.
    """


def leave_out_later(section: Section, tree: dict[str, Any]) -> None:
    """Takes out of `tree`, a dump of the section, every later setting that is at its default."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if any(isinstance(mark, Later) for mark in field.metadata) and value == field.default:
            tree.pop(name, None)
        elif isinstance(value, Section) and name in tree:
            leave_out_later(value, tree[name])
