"""The steps of a GPU check, the most telling first, in three runs.

    steps_of(1)         # is it correct, and how fast is VTP-L: at most RUN_SECONDS
    steps_of(2)         # FP8, prototypes, the engine's tests, overlap_comm, three passes: at most RUN_SECONDS
    steps_of(3)         # with more time: other sizes, curves, larger batches, the loader

A step is a command of this repository, run by this Python from the root of the checkout, with the modules that it must
import and the seconds it may take. Seconds are for a Hopper GPU, and estimates until one has been measured [D]; on a
CPU, where a step only shows that it runs, `dry` is used instead.
"""

from __future__ import annotations

from dataclasses import dataclass

RUN_SECONDS = 330  # of each of the first two runs
ENGINE = ("torch", "pydantic", "yaml", "deepspeed", "safetensors", "rich")
# Of pytest's plugins only these, whatever else is installed (runner.py turns off that they load by themselves).
PLUGINS = ("-p", "pytest_timeout", "-p", "profiling.gpu_check.runner", "-p", "no:cacheprovider")
PYTEST = ("-m", "pytest", "-m", "gpu", "-v", *PLUGINS)
OUT = "{out}"  # stands in a command where the folder of the results goes
LENGTH = "{length}"  # ... and where a bench's number of rounds goes: --dry on a CPU


@dataclass(frozen=True)
class CheckStep:
    """One command of the check. `dry`: seconds on a CPU. `optional` modules are used if installed, and named if not."""

    name: str
    question: str
    command: tuple[str, ...]
    seconds: float
    dry: float
    needs: tuple[str, ...] = ENGINE
    optional: tuple[str, ...] = ()
    rounds: int = 1
    run: int = 1
    good_exit_codes: tuple[int, ...] = (0,)

    def command_line(self, out: str, is_dry: bool) -> list[str]:
        """The command with its placeholders filled in."""
        length = "--dry" if is_dry else f"--rounds={self.rounds}"
        return [word.replace(OUT, out).replace(LENGTH, length) for word in self.command]


def _bench(
    name: str,
    question: str,
    seconds: float,
    rounds: int,
    run: int,
    needs: tuple[str, ...] = ENGINE,
    optional: tuple[str, ...] = (),
) -> CheckStep:
    command = ("-m", "profiling.bench", name, LENGTH, "--json", f"{OUT}/{name}.json")
    return CheckStep(name, question, command, seconds, 600, needs, optional, rounds, run)


def _tests(
    name: str,
    question: str,
    seconds: float,
    where: tuple[str, ...],
    run: int,
    needs: tuple[str, ...] = ENGINE,
    optional: tuple[str, ...] = (),
) -> CheckStep:
    """`where`: files, and options of pytest that choose among their tests."""
    command = (*PYTEST, "--outcomes", f"{OUT}/{name}.tests", *where)
    return CheckStep(name, question, command, seconds, 120, (*needs, "pytest", "pytest_timeout"), optional, run=run)


KERNEL_FILES = (
    "tests/kernels/test_varlen.py", "tests/kernels/test_contrastive_kernel.py", "tests/kernels/test_fp8_gpu.py",
    "tests/model/test_block_backward.py", "tests/profiling/test_phases.py", "tests/profiling/test_energy.py",
    "tests/kernels/test_prototypes_triton.py",
)  # fmt: skip
ENGINE_FILES = ("tests/engine/test_host_sync.py", "tests/engine/test_gpu.py")
FIRST_OF_THE_ENGINE = "sync or golden or zero1"
OTHER_ENGINE_FILES = (
    "tests/engine/test_gpu.py", "tests/engine/test_deterministic.py", "tests/engine/test_scale_out.py",
    "tests/model/test_initialise.py", "tests/model/generator/test_autoregressive.py",
)  # fmt: skip
LOADER_FILES = (
    "tests/data/test_decode.py", "tests/data/test_loader.py", "tests/data/test_transparency.py",
    "tests/profiling/test_doctor.py",
)  # fmt: skip
STEPS = (
    CheckStep("doctor", "what is here, and what a run would use of it",
              ("-m", "profiling.doctor", "--quick"), 30, 120, needs=(),
              good_exit_codes=(0, 1)),  # 1: a run from shards lacks something
    _tests("kernels", "attention, contrastive tiles, FP8, events, energy, prototypes: right on the device?", 90,
           KERNEL_FILES, run=1,
           optional=("triton", "torchao", "transformer_engine", "pynvml")),
    _bench("train", "MFU of VTP-L's whole step: at least 40 %; where the time goes", 160, rounds=10, run=1),
    _bench("attention", "every attention backend that is here", 30, rounds=10, run=1,
           optional=("flash_attn_interface",)),
    _bench("fp8_blocks", "FP8 against bf16 at VTP-L's width: 1.15 x", 90, rounds=10, run=2,
           optional=("torchao", "transformer_engine")),
    _bench("prototypes", "prototype loss of 65,536: memory and time", 40, rounds=5, run=2, optional=("triton",)),
    _tests("engine", "no host sync, the golden run, ZeRO-1 against AdamW: right on the device?", 90,
           (*ENGINE_FILES, "-k", FIRST_OF_THE_ENGINE), run=2),
    _bench("overlap", "VTP-L's step with and without overlap_comm", 50, rounds=5, run=2),
    _bench("step", "a shared pass against three, VTP-L: eager, then compiled", 50, rounds=3, run=2),
    _tests("engine_rest", "ZeRO-3, bf16, graphs, resume, DeepCompile, generators: right on the device?", 240,
           (*OTHER_ENGINE_FILES, "-k", f"not ({FIRST_OF_THE_ENGINE})"), run=3),
    _bench("train_smaller", "MFU of VTP-B and VTP-S", 180, rounds=10, run=3),
    _bench("fp8_losses", "do FP8 and bf16 learn alike over 200 steps?", 180, rounds=1, run=3,
           optional=("torchao", "transformer_engine")),
    _bench("packed", "packed crops against a pass each: at least 1.3 x", 60, rounds=10, run=3),
    _bench("fp8_blocks_wide", "FP8 against bf16 from a width of 1,536 on: 1.3 x", 120, rounds=10, run=3,
           optional=("torchao", "transformer_engine")),
    _bench("contrastive", "contrastive tiles up to 131,072 pairs", 60, rounds=5, run=3, optional=("triton",)),
    _bench("grad_cache", "131,072 pairs on one GPU by the gradient cache", 150, rounds=1, run=3),
    _tests("loading", "DALI's decoder and the loader: right on the device?", 60, LOADER_FILES, run=3,
           needs=(*ENGINE, "nvidia.dali", "tokenizers"), optional=("webdataset",)),
    _bench("loader", "JPEGs decoded and augmented a second", 90, rounds=3, run=3,
           needs=(*ENGINE, "nvidia.dali", "tokenizers", "webdataset", "skimage")),
)  # fmt: skip
RUNS = tuple(sorted({step.run for step in STEPS}))


def steps_of(run: int | None) -> list[CheckStep]:
    """Steps of a run, or all."""
    return [step for step in STEPS if run is None or step.run == run]
