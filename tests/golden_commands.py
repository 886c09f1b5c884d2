"""What commands write on a tiny corpus, as trees of names and digests (tests/test_golden_files.py).

    made(Path("work"), ["latents"])["latents"]      # {"files": [...], "latents_rank00_shard000.safetensors": {...}}

Commands run as a user types them (`python -m ...`); nothing here knows what is behind them but the launcher, whose
ranks are forked from a warm process. Files are described by what they hold, without paths, times, versions and facts
about the machine. Names (of tensors, scalars, keys) are spelled out, so that a difference says what was renamed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import runpy
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open

from data.corpora.emoji_scenes import emoji_plan
from data.corpus import build
from tests.data.corpora.test_emoji import BLOBS
from tests.harness import run_ranks

ROOT = Path(__file__).resolve().parents[1]
Tree = dict[str, Any]
HAS_ONNX = bool(find_spec("onnx") and find_spec("onnxscript"))  # an optional extra
# Of log lines and reports: what a clock, a counter of the kernel or the machine gives.
MEASURED = ("speed/", "phase/", "memory/", "energy/", "straggler/", "comm/", "checkpoint/", "time")


def command(module: str, *arguments: object) -> None:
    """`python -m module arguments`, in this process; its exit code must be 0."""
    before, sys.argv = sys.argv, [module, *map(str, arguments)]
    try:
        runpy.run_module(module, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise RuntimeError(f"{module} {arguments} ended with {end.code}") from None
    finally:
        sys.argv = before


def launched(arguments: list[str]) -> int:
    """`engine/launch.py arguments` on this rank."""
    os.environ["LOCAL_SIZE"] = os.environ["WORLD_SIZE"]
    sys.argv = ["engine/launch.py", *arguments]
    try:
        runpy.run_path(str(ROOT / "engine/launch.py"), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def launch(ranks: int, config: Path | str, run_dir: Path, *overrides: str, stage: str = "zero3") -> None:
    """A training run on so many ranks."""
    ds_config = ROOT / f"configs/deepspeed/{stage}.json"
    arguments = ["--config", str(config), "--ds_config", str(ds_config), f"system.run_dir={run_dir}", *overrides]
    codes = run_ranks(launched, ranks, arguments, join=False, timeout=300.0)
    assert codes == [0] * ranks


def digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()[:16]


def tensors(path: Path) -> Tree:
    """Names, types and shapes of a safetensors file, and a digest of all its bytes."""
    lines, bytes_ = [], hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            lines.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}")
            bytes_.update(bytes_of(tensor))
    return {"digest": f"sha256:{bytes_.hexdigest()[:16]}", "tensors": lines}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def files(folder: Path) -> list[str]:
    """Every file below a directory, sorted; of TensorBoard's, which has host and time in its name, the beginning."""
    found = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return sorted(re.sub(r"tfevents\..*", "tfevents", name) for name in found)


def members(shard: Path) -> Tree:
    """Keys and digests of a tar's members, in its order, as lists of lines."""
    with tarfile.open(shard) as tar:
        held = [(each.name, tar.extractfile(each).read()) for each in tar.getmembers()]  # type: ignore[union-attr]
    names = [name for name, _ in held]
    return {
        "file": digest(shard.read_bytes()),
        "members": f"{len(names)}: {', '.join(names[:4])} ... {names[-1]}",
        "texts": digest(b"\n".join(content for name, content in held if name.endswith((".txt", ".json")))),
        "pictures": digest(b"".join(content for name, content in held if not name.endswith((".txt", ".json")))),
    }


def tidy(value: Any, work: Path, leave_out: Callable[[str], bool] = lambda key: False) -> Any:
    """JSON without paths of the work directory, and without keys that are left out."""
    if isinstance(value, dict):
        return {key: tidy(each, work, leave_out) for key, each in value.items() if not leave_out(key)}
    if isinstance(value, list):
        return [tidy(each, work, leave_out) for each in value]
    if isinstance(value, str):
        return re.sub(rf"{re.escape(str(work))}", "WORK", value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def log(run_dir: Path) -> Tree:
    """Tags of a run's log, and the losses of its last line."""
    lines = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    last = {k: v for k, v in lines[-1].items() if not k.startswith(MEASURED)}
    return {"tags": sorted({key for line in lines for key in line}), "steps": [x["step"] for x in lines], "last": last}


def corpora(work: Path) -> Tree:
    """`data.corpus synthetic`, `data.corpus emoji`, `data.corpus folder` of a few pictures."""
    size = ("--samples", 120, "--held-out", 12, "--size", 32, "--shard-size", 20, "--workers", 1)
    command("data.corpus", "synthetic", "--out", work / "synthetic", *size)
    found = {"synthetic": corpus(work / "synthetic", work)}
    pictures = work / "pictures"
    with tarfile.open(work / "synthetic" / "held_out-000000.tar") as tar:
        for member in (each for each in tar.getmembers() if not each.name.endswith((".txt", ".json", ".cls"))):
            path = pictures / f"kind_{int(member.name.split('.')[0][-1]) % 3}" / member.name.replace("/", "_")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    options = ("--caption-from-folder", "--shard-size", 5, "--train-tokenizer", 300, "--workers", 1)
    command("data.corpus", "folder", pictures, "--out", work / "folder", *options)
    return found | {"folder": corpus(work / "folder", work)}


def corpus(folder: Path, work: Path) -> Tree:
    found: Tree = {"files": files(folder)}
    found |= {path.name: members(path) for path in sorted(folder.glob("*.tar"))}
    for path in sorted(folder.glob("*.json")):
        tree = tidy(json.loads(path.read_text()), work, lambda key: key == "content")  # of files with their times
        found[path.name] = digest(json.dumps(tree).encode())
    return found


def emoji(work: Path) -> Tree:
    """As `data.corpus emoji` writes it, with drawn blobs in the place of a system's font."""
    build(work / "emoji", emoji_plan(BLOBS, 20, 60, 20, 32, 50, 0, workers=1))
    return corpus(work / "emoji", work)


def of_corpus(work: Path) -> tuple[str, ...]:
    return (
        f"data.train=[{work}/synthetic/train-*.tar]", f"data.held_out=[{work}/synthetic/held_out-*.tar]",
        f"data.tokenizer={work}/synthetic/tokenizer.json", "model.text.vocab=2048", "model.text.context=32",
    )  # fmt: skip


def pretraining(work: Path) -> Tree:
    """Six steps on two ranks: log, checkpoint, weights (an average), `engine.consolidate`."""
    run = work / "run"
    short = ("ema=0.9", "system.report_every=2", "system.images_every=4", "system.checkpoint.every=3")
    launch(2, ROOT / "tests/tiny.yaml", run, *of_corpus(work), *short, "system.compile=off")
    command("engine.consolidate", run, "--out", work / "archived.safetensors")
    first = tensors(run / "checkpoints" / latest_of(run) / "rank-00000.safetensors")["tensors"]
    archived = brief(work / "archived.safetensors")
    return run_of(run, work) | {"archived.safetensors": archived, "first rank's file": first}


def other_views(work: Path) -> Tree:
    """The log of two steps on other crops, colours, masks and another order than the defaults."""
    other = (
        "optim.steps=2", "data.streams=2", "data.block_shards=1", "data.background=random", "seed=5", "views.flip=1",
        "views.image_scale=[0.3, 0.5]", "views.global_scale=[0.5, 0.6]", "views.local_scale=[0.1, 0.2]",
        "views.jitter=1", "views.brightness=0.8", "views.contrast=0.1", "views.saturation=0.9", "views.hue=0.3",
        "views.grey=0.5", "views.blur=[0, 1, 0]", "views.blur_sigma=[1, 1.5]", "views.solarise=1", "views.num_locals=3",
        "masks={share_of_crops: 1, ratio: [0.3, 0.6]}", "batch.layout=disjoint", "system.report_every=1",
    )  # fmt: skip
    launch(1, ROOT / "tests/tiny.yaml", work / "other", *of_corpus(work), *other, "system.compile=off", stage="zero1")
    return log(work / "other")


def run_of(run: Path, work: Path) -> Tree:
    """What a run directory holds."""
    [latest] = [path for path in (run / "checkpoints").iterdir() if path.name == latest_of(run)]
    state = json.loads((latest / "state.json").read_text())
    choices = json.loads((run / "choices.json").read_text())
    return {
        "files": files(run),
        "log": log(run),
        "choices": {key: said.split(" (")[0] for key, said in tidy(choices, work).items()},
        "corpus.json": sorted(json.loads((run / "corpus.json").read_text())) if (run / "corpus.json").is_file() else [],
        "config": digest(re.sub(re.escape(str(work)), "WORK", (run / "config.yaml").read_text()).encode()),
        "state": tidy(state, work, lambda key: key in ("shapes", "fingerprint")),
        "checkpoint": {path.name: brief(path) for path in sorted(latest.glob("*.safetensors"))},
        "weights": tensors(run / "weights.safetensors"),
    }


def latest_of(run: Path) -> str:
    return (run / "checkpoints" / "latest").read_text().strip()


def brief(path: Path) -> str:
    """Number of tensors and digest of a safetensors file."""
    found = tensors(path)
    return f"{len(found['tensors'])} tensors {found['digest']}"


def stage_2(work: Path) -> Tree:
    """A decoder against a discriminator, two ranks."""
    small = (
        f"tokenizer.weights={work}/run/weights.safetensors", f"data.train=[{work}/synthetic/train-*.tar]",
        "data.streams=2", "batch.images=4", "views.image_size=32", "objectives.rec={perceptual: 0}",
        "objectives.gan.discriminator_start=0.2", "objectives.gan.start=0.4", "discriminator.width=8",
        "discriminator.layers=2", "optim.steps=5", "optim.lr_batch=4", "ema=0.5", "system.report_every=1",
        "system.images_every=0", "optim.precision=fp32", "system.checkpoint.every=0", "data.held_out=[]",
    )  # fmt: skip
    launch(2, ROOT / "configs/decoder_gan.yaml", work / "stage2", *small, "system.compile=off", stage="zero2")
    return run_of(work / "stage2", work)


def latents(work: Path) -> Tree:
    """`evaluation.latents` of the run, labelled by its shards."""
    command("evaluation.latents", work / "run", "--out", work / "latents", "--batch-size", 16)
    manifest = json.loads((work / "latents" / "manifest.json").read_text())
    statistics = torch.load(work / "latents" / "latents_stats.pt", weights_only=True)
    return {
        "files": files(work / "latents"),
        "manifest": tidy(manifest, work, lambda key: key in ("tokenizer", "version", "commit", "code")),
        "statistics": {name: digest(bytes_of(x)) for name, x in statistics.items()},
    } | {path.name: tensors(path) for path in sorted((work / "latents").glob("*.safetensors"))}


SECTIONS = {
    "lightningdit": ("lightningdit_b", ()),
    "dit": ("dit_b", ()),
    "mar": ("mar_b", ("generator.buffer=4", "generator.head={width: 32, depth: 2}")),
    "raster_ar": ("mar_b", ("generator.buffer=4", "generator.head={width: 32, depth: 2}", "generator.order=raster")),
}


def generators(work: Path) -> Tree:
    """Each trained for four steps on the latents, and what `evaluation.generate` says of it."""
    found = {}
    for name, (preset, more) in SECTIONS.items():
        small = (
            f"latents.train={work}/latents", "batch.samples=12", "generator.width=32", "generator.depth=2",
            "generator.heads=2", "ema=0.5", "optim.steps=4", "optim.lr_batch=12", "optim.precision=fp32",
            "system.report_every=1", "system.checkpoint.every=0", "system.compile=off",
        )  # fmt: skip
        launch(1, ROOT / f"configs/{preset}.yaml", work / name, *small, *more, stage="zero1")
        found[name] = run_of(work / name, work)
    for name in SECTIONS:
        options = ("--num-samples", 12, "--batch-size", 8, "--guidance", "1,2", "--steps", 4)
        network = ("--fid", work / "network.safetensors")
        command(
            "evaluation.generate",
            work / name,
            "--tokenizer",
            work / "run",
            *options,
            *network,
            "--out",
            work / f"{name}_out",
        )
        found[name]["generated"] = results(work / f"{name}_out", work)
    return found


TIMES = ("seconds", "samples_per_second", "images_per_second", "time", "minutes", "hours")


def results(folder: Path, work: Path) -> Tree:
    """The files that an evaluation leaves, its JSON, and its pictures' pixels."""
    found: Tree = {"files": files(folder)}
    for path in sorted(folder.glob("*.json")):
        found[path.name] = tidy(json.loads(path.read_text()), work, lambda key: any(word in key for word in TIMES))
    for path in sorted(folder.rglob("*.png")):
        with Image.open(path) as picture:
            if "confusion" not in path.name and "_lr" not in path.name:  # plotted, with fonts
                found[path.name] = f"{picture.size} {digest(picture.convert('RGB').tobytes())}"
    return found


def evaluation(work: Path) -> Tree:
    """`evaluation.features` (a network for FID), `evaluation.run` of every task, `evaluation.summary`."""
    network = ("--out", work / "network.safetensors", "--size", 32, "--epochs", 1)
    command("evaluation.features", "--data", work / "synthetic", *network)
    tasks = ("--tasks", "zero_shot,linear_probe,knn,reconstruction", "--fid", work / "network.safetensors")
    command("evaluation.run", work / "run", *tasks, "--out", work / "evaluated", "--batch-size", 16)
    return results(work / "evaluated", work) | {"network": tensors(work / "network.safetensors")}


def exports(work: Path) -> Tree:
    """`model.interchange`: the public layout, its way back, torch.export programs."""
    command("model.interchange", "export", work / "run", "--out", work / "public")
    command("model.interchange", "import", work / "public", "--out", work / "imported.safetensors")
    command("model.interchange", "programs", work / "run", "--out", work / "programs")
    public = work / "public"
    found: Tree = {"public": {"files": files(public)}}
    for path in sorted(public.glob("*.safetensors")):
        found["public"][path.name] = tensors(path)
    found["public"]["config.json"] = json.loads((public / "config.json").read_text())
    found["public"]["tokenizer.json"] = digest((public / "tokenizer.json").read_bytes())
    found["imported"] = brief(work / "imported.safetensors")
    found["programs"] = {"files": files(work / "programs")}
    conventions = json.loads((work / "programs/conventions.json").read_text())
    found["programs"]["conventions"] = tidy(conventions, work, lambda key: key == "fingerprint")  # paths are in it
    for path in sorted((work / "programs").glob("*.pt2")):
        found["programs"][path.name] = program(path)
    if HAS_ONNX:
        command("model.interchange", "programs", work / "run", "--out", work / "onnx", "--onnx")
        found["onnx"] = {path.name: onnx_file(path) for path in sorted((work / "onnx").glob("*.onnx"))}
    return found


def onnx_file(path: Path) -> Tree:
    """Inputs, outputs, operators and the weights of an ONNX file."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    weights = sorted((each.name, numpy_helper.to_array(each).tobytes()) for each in graph.initializer)
    return {
        "inputs": [each.name for each in graph.input],
        "outputs": [each.name for each in graph.output],
        "operators": dict(sorted(Counter(node.op_type for node in graph.node).items())),
        "weights": f"{len(weights)} {digest(b''.join(content for _, content in weights))}",
    }


def program(path: Path) -> Tree:
    """Weights of a torch.export program by name, its archive's files, and what it gives for one input."""
    loaded = torch.export.load(path)
    shape = (2, 3, 32, 24) if "encode" in path.name else (2, 8, 4, 3)
    given = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = loaded.module()(given)
    with zipfile.ZipFile(path) as archive:
        names = sorted(name.split("/", 1)[-1] for name in archive.namelist())
    state = digest(b"".join(bytes_of(x) for _, x in sorted(loaded.state_dict.items())))
    return {
        "files": names,
        "state": f"{len(loaded.state_dict)} tensors {state}",
        "output": f"{list(output.shape)} {digest(bytes_of(output))}",
    }


def plans(work: Path) -> Tree:
    """`profiling.plan` of two presets, as JSON: the best three plans, and a digest of all."""
    found = {}
    for preset, gpus in (("vtp_l", 16), ("demo", 2)):
        out = work / f"plan_{preset}.json"
        more = ("objectives.rec.lpips_weights=none",) if preset == "vtp_l" else ("optim.precision=bf16",)
        arguments = ("--config", ROOT / f"configs/{preset}.yaml", "--gpu", "h100", "--gpus", gpus, "--json", out)
        command("profiling.plan", *arguments, "--ds_config-out", work / f"ds_{preset}.json", *more)
        every = json.loads(out.read_text())
        found[preset] = {
            "plans": len(every),
            "best": every[:3],
            "all": digest(json.dumps(every).encode()),
            "ds_config": json.loads((work / f"ds_{preset}.json").read_text()),
        }
    return found


def report(work: Path) -> Tree:
    """`profiling.report` of the run: its sections and what is in them; of figures those that nothing measured."""
    command("profiling.report", work / "run")
    tree = json.loads((work / "run" / "report.json").read_text())
    found: Tree = {"files": [name for name in files(work / "run") if name.startswith("report")]}
    for section in tree["sections"]:
        found[section["name"]] = [block(each) for each in section["blocks"] if each["kind"] != "sentence"]
    return tidy(found, work)


def block(tree: Tree) -> Any:
    """The shape of a report's block, and the values of losses."""
    if tree["kind"] == "table":
        return {"table": tree["caption"], "header": tree["header"], "rows": [row[0] for row in tree["rows"]]}
    if tree["kind"] == "plots":
        plots = {}
        for plot in tree["plots"]:
            [line] = plot["lines"]
            is_exact = plot["title"].startswith(("loss/", "health/", "optim/"))
            plots[plot["title"]] = line["values"] if is_exact else line["steps"]
        return {"plots": plots}
    if tree["kind"] == "stack":
        return {"stack": tree["title"], "parts": list(tree["parts"])}
    if tree["kind"] == "pictures":
        return {"pictures": tree["captions"]}
    return {tree["kind"]: tree.get("title", "")}


# In the order in which they need one another.
PRODUCTS: dict[str, Callable[[Path], Tree]] = {
    "corpora": corpora,
    "pretraining": pretraining,
    "other_views": other_views,
    "evaluation": evaluation,
    "latents": latents,
    "generators": generators,
    "stage_2": stage_2,
    "exports": exports,
    "report": report,
    "plans": plans,
    "emoji": emoji,
}
ON_THE_RUN = {"evaluation", "latents", "generators", "stage_2", "exports", "report"}
NEEDED_BY = {
    "corpora": {"pretraining", "other_views", *ON_THE_RUN},
    "pretraining": ON_THE_RUN,
    "evaluation": {"generators"},  # its network
    "latents": {"generators"},
}
SLOW = {"plans", "exports"}  # minutes: tier L2


def made(work: Path, names: Iterable[str]) -> dict[str, Tree]:
    """Products by name, in JSON's types, and what they need."""
    names = set(names)
    wanted = {name for name in PRODUCTS if name in names or names & NEEDED_BY.get(name, set())}
    work.mkdir(parents=True, exist_ok=True)
    with chdir(work):
        return {name: json.loads(json.dumps(PRODUCTS[name](work))) for name in PRODUCTS if name in wanted}
