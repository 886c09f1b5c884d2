"""Start a run from existing weights: init.weights=FILE, for continued training.

    config = with_digests(config, resume=False)          # init.sha256 becomes that of FILE's tensors: science
    with initial_weights(config, shapes) as initial:     # shapes: name -> shape of every parameter of the run
        initial.fill("trunk.norm.weight", tensor)        # True: filled; False: FILE has none, it is to be drawn
        initial.summary             # "FILE: trunk, bottleneck; teacher from the student; drawn: prototypes"

A part of the model (trunk, bottleneck, decoder, text, clip, prototypes) is in the file as a whole or not at all: a part
that it lacks is drawn as without a file, and named in the summary; half a part is an error, as is another shape. The
teacher starts as the student unless the file has one. In a bf16 run the numbers are rounded, as drawn ones are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs import Config, UserError
from configs.model import Model
from configs.schema import AlignmentConfig
from configs.section import require_digest
from model.factory import TRAINING_ONLY
from model.frozen import check_frozen_file
from model.weights import digest, open_weights, read_model_section

Shape = tuple[int, ...]
TEACHER = "teacher."


@dataclass(frozen=True)
class InitialWeights:
    """The open weights file, and which of its tensors each parameter takes."""

    stored: Any
    sources: Mapping[str, str]
    summary: str

    @torch.no_grad()
    def fill(self, name: str, tensor: Tensor) -> bool:
        """Fill the whole parameter `name` from the file; return whether the file has it."""
        if name in self.sources:
            tensor.copy_(self.stored.get_tensor(self.sources[name]))
        return name in self.sources


def with_digests(config: Config, resume: bool) -> Config:
    """Return the config with init.sha256, objectives.rec.align.sha256 and objectives.rec.lpips_sha256 filled in.

    Raises UserError where a file is missing or damaged, or is not the one whose digest the config has.
    """
    given, found = config.init, _digest(config, resume)
    require_digest("init.weights", given.weights, "init.sha256", given.sha256, found)
    config = config.model_copy(update={"init": given.model_copy(update={"sha256": found})})
    rec = config.objectives.rec
    if rec.weight and rec.perceptual:
        rec = rec.model_copy(update={"lpips_sha256": perceptual_digest(rec.lpips_weights, rec.lpips_sha256)})
        config = config.model_copy(update={"objectives": config.objectives.model_copy(update={"rec": rec})})
    return config if rec.align is None else _with_align_digest(config, rec.align)


def perceptual_digest(path: str | None, given: str | None) -> str:
    """Return the digest of objectives.rec.lpips_weights=`path`.

    Raises UserError where the file is missing or damaged, or its digest is not `given`.
    """
    if path is None or not Path(path).is_file():
        raise UserError(
            f"objectives.rec.lpips_weights={path} is not a file: the perceptual term needs its "
            "network; make the file with `python -m model.losses.perceptual --help`, or set "
            "objectives.rec.perceptual=0"
        )
    found = digest(Path(path))
    require_digest("objectives.rec.lpips_weights", path, "objectives.rec.lpips_sha256", given, found)
    return found


def _with_align_digest(config: Config, align: AlignmentConfig) -> Config:
    """Fill in align.sha256. A resumed run needs the file too: no checkpoint holds a frozen encoder."""
    check_frozen_file(align)
    found = digest(Path(align.weights))
    section = "objectives.rec.align"
    require_digest(f"{section}.weights", align.weights, f"{section}.sha256", align.sha256, found)
    rec = config.objectives.rec.model_copy(update={"align": align.model_copy(update={"sha256": found})})
    return config.model_copy(update={"objectives": config.objectives.model_copy(update={"rec": rec})})


@contextmanager
def initial_weights(config: Config, shapes: Mapping[str, Shape], resume: bool = False) -> Iterator[InitialWeights]:
    """Open the weights that the run's parameters start from. With `resume` there are none: the checkpoint has them all.

    Raises UserError, on every rank, for a file that does not fit `shapes`: the first tensor and both shapes.
    """
    if config.init.weights is None or resume:
        yield InitialWeights(None, {}, f"drawn (seed={config.seed})" if not resume else "the checkpoint's (--resume)")
        return
    path = Path(config.init.weights)
    with open_weights(path) as stored:
        held = {key: tuple(stored.get_slice(key).get_shape()) for key in stored.keys()}  # noqa: SIM118 (not a mapping)
        try:
            sources = match_tensors(shapes, held)
            _check_meaning(
                read_model_section(stored, path), config.model, {model_part(key) for key in sources.values()}
            )
        except UserError as error:
            raise UserError(f"init.weights={path}: {error}") from None
        yield InitialWeights(stored, sources, f"{path}: {_summary(shapes, held, sources)}")


def match_tensors(shapes: Mapping[str, Shape], held: Mapping[str, Shape]) -> dict[str, str]:
    """Map each parameter to the file's tensor that it takes, from the names and shapes of the run and of the file.

    Raises UserError for half a part, for another shape, or where nothing matches.
    """
    parts = {model_part(key) for key in held}
    sources = {}
    for name, shape in shapes.items():
        key = name if name in held else name.removeprefix(TEACHER)
        if key in held:
            if held[key] != shape:
                raise UserError(
                    f"{key} is {held[key]} there and {shape} in this run: model.* must describe the weights"
                )
            sources[name] = key
        elif model_part(key) in parts:
            raise UserError(
                f"{key} {shape} is not there, though other tensors of {model_part(key)} are: another architecture"
            )
    wanted = {model_part(name) for name in shapes}
    surplus = sorted(key for key in held.keys() - set(sources.values()) if model_part(key) in wanted)
    if surplus:
        raise UserError(f"{surplus[0]} {held[surplus[0]]} has no place in this run: model.* must describe the weights")
    if not sources:
        raise UserError(f"it holds {', '.join(sorted(parts))}, nothing that this run trains; name another file")
    return sources


def model_part(name: str) -> str:
    """Return the part of the model that a parameter belongs to.

    The sigmoid loss's bias, and the token for patches that objectives.rec.mask hides, are parts of their own: other
    settings do without them.
    """
    return name if name in ("clip.logit_bias", TRAINING_ONLY) else name.split(".")[0]


def _digest(config: Config, resume: bool) -> str | None:
    given = config.init
    if given.weights is None or (resume and given.sha256 and not Path(given.weights).is_file()):
        return given.sha256
    if not Path(given.weights).is_file():
        raise UserError(
            f"init.weights={given.weights} is not a file: it is what `python -m model.interchange import` or a run "
            "wrote; a resumed run does without it if init.sha256 is given, as in its config.yaml"
        )
    return digest(Path(given.weights))


def _check_meaning(theirs: Model, ours: Model, parts: set[str]) -> None:
    """Raise UserError where a setting differs that changes the function but no shape."""
    found = {key: (getattr(theirs, key), getattr(ours, key)) for key in ("rope_base", "rope_dtype")}
    found["conv"] = (theirs.conv, ours.conv)
    if "bottleneck" in parts:  # 2L channels may be those of another L
        found["latent"] = (theirs.latent, ours.latent)
    transformers = {"trunk", "decoder", "text"} if theirs.conv is None and ours.conv is None else {"text"}
    for name in ("trunk", "decoder", "text"):
        if name in parts & transformers:
            found[f"{name}.heads"] = (getattr(theirs, name).heads, getattr(ours, name).heads)
    for key, (there, here) in found.items():
        if there != here:
            raise UserError(f"its weights were trained with model.{key}={there}, this run has {here}: give the same")


def _summary(shapes: Mapping[str, Shape], held: Mapping[str, Shape], sources: Mapping[str, str]) -> str:
    """Summarise: "trunk, bottleneck, text, clip; teacher from the student; drawn: prototypes; not used: decoder"."""
    taken, student = set(sources.values()), [name for name in shapes if not name.startswith(TEACHER)]
    loaded = dict.fromkeys(model_part(name) for name in student if name in sources)
    drawn = dict.fromkeys(model_part(name) for name in student if name not in sources)
    unused = sorted({model_part(key) for key in held.keys() - taken})
    clauses = [", ".join(loaded)]
    if len(student) < len(shapes):
        clauses.append("teacher too" if any(key.startswith(TEACHER) for key in taken) else "teacher from the student")
    clauses += [f"drawn: {', '.join(drawn)}"] if drawn else []
    clauses += [f"not used: {', '.join(unused)}"] if unused else []
    return "; ".join(clauses)
