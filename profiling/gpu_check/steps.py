"""The steps of a GPU check, in the order of their worth: what is left out for lack of time is the end of the list.

A step is a command of this house, run by this Python from the root of the checkout, with the modules that must import
for it and the seconds it may take. Seconds are for a Hopper GPU, and estimates until one has been measured [D]; on a
CPU, where a step only shows that it runs, `dry` takes their place.
"""

from __future__ import annotations

from dataclasses import dataclass

ENGINE = ("torch", "pydantic", "yaml", "deepspeed", "safetensors", "rich")
PYTEST = ("-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
OUT = "{out}"  # stands in a command where the folder of the results goes
ROUNDS = "{rounds}"  # ... and where the number of rounds goes: one on a CPU


@dataclass(frozen=True)
class Step:
    """`dry`: seconds on a CPU. `extra` modules are used where they are, and told about where they are not."""

    name: str
    question: str
    command: tuple[str, ...]
    seconds: float
    dry: float
    needs: tuple[str, ...] = ENGINE
    extra: tuple[str, ...] = ()
    rounds: int = 1

    def words(self, out: str, is_dry: bool) -> list[str]:
        """The command, filled in."""
        rounds = str(1 if is_dry else self.rounds)
        return [word.replace(OUT, out).replace(ROUNDS, rounds) for word in self.command]


def _bench(
    name: str, question: str, seconds: float, rounds: int, dry: float = 600, extra: tuple[str, ...] = ()
) -> Step:
    command = ("-m", "profiling.bench", name, "--rounds", ROUNDS, "--json", f"{OUT}/{name}.json")
    return Step(name, question, command, seconds, dry, extra=extra, rounds=rounds)


STEPS = (
    Step("doctor", "what is here, and what a run would use of it",
         ("-m", "profiling.doctor", "--quick", "--json"), 60, 120, needs=()),
    Step("tests", "is it right on the device?", (*PYTEST, "--junitxml", f"{OUT}/tests.xml"), 180, 300,
         needs=(*ENGINE, "pytest", "tokenizers", "hypothesis"),
         extra=("nvidia.dali", "webdataset", "pynvml", "triton")),
    _bench("train", "MFU of whole steps: VTP-L at least 40 %; where the time goes", 150, rounds=10),
    _bench("fp8_blocks", "FP8 against bf16: 1.15 x at VTP-L's width, 1.3 x from 1,536 on", 60, rounds=10,
           extra=("torchao", "transformer_engine")),
    _bench("step", "a shared pass against three: eager and compiled", 75, rounds=5, dry=1800),
    _bench("fp8_losses", "do FP8 and bf16 learn alike over 200 steps?", 90, rounds=1,
           extra=("torchao", "transformer_engine")),
    _bench("packed", "packed crops against a pass each: at least 1.3 x", 45, rounds=10),
    _bench("prototypes", "prototype loss of 65,536: memory and time", 30, rounds=5, extra=("triton",)),
    _bench("contrastive", "contrastive tiles up to 131,072 pairs", 45, rounds=5, extra=("triton",)),
    _bench("grad_cache", "131,072 pairs on one GPU by the gradient cache", 120, rounds=1),
    _bench("attention", "every attention backend that is here", 40, rounds=10, extra=("flash_attn", "xformers")),
    _bench("loader", "JPEGs decoded and augmented a second", 60, rounds=3, extra=("nvidia.dali",)),
)  # fmt: skip
