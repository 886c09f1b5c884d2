"""How fast a device really is, for the planner: products, attention, memory, links.

    rates_of("h100", parse_links("nvlink,ib400"))       # from data sheets and the assumptions below
    measured_rates(config, rows, "matmul")              # of this machine, at the shapes of a config

A GPU's data sheet gives peaks; what software reaches of them is assumed, the same for all, and said wherever a plan is
shown. Nothing of it has been measured on a GPU by this project; `measured_rates` on the GPU itself replaces it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from configs import UserError
from profiling.peaks import bandwidth, peak

# What software reaches of a data sheet [assumed]. Products and memory are those of kernels/fp8.py's rule: 700 and 1,200
# TFLOP/s and 2.5 TB/s of an H100, as torchao's published figures have them.
OF_BF16, OF_FP8, OF_MEMORY = 0.71, 0.61, 0.75
OF_ATTENTION = 0.30  # of the bf16 peak: segments of 257 fill two of three tiles of 128, heads are 64 wide
OF_LINK = 0.8
TF32_OF_BF16 = 0.5  # of its peak, and as much of that is reached; convolutions in float32 use it
FP32_OF_BF16 = 1 / 15  # 67 against 989 TFLOP/s on an H100
LAUNCH = 5e-6  # seconds the host needs for an operation of a compiled block or an eager one
BLOCK_HOOKS = 150e-6  # of ZeRO-3, to gather or to free one block
RESERVED = 0.06  # of a GPU's memory: CUDA's own, and what fragments
POWER_SHARE = 0.9  # of the board's limit, while training


@dataclass(frozen=True)
class Links:
    """Bytes a second that one GPU sends, one way, as data sheets have them; `inter` is the network's share of one."""

    intra: float
    inter: float
    per_node: int = 8
    # Seconds: of any message, and of each hop of a ring, as in the tuning table of NCCL (tuning.cc) for short messages.
    base: float = 6.6e-6
    hop: float = 0.6e-6
    node_hop: float = 2.7e-6

    def seconds(self, wire_bytes: float, num_messages: int, world_size: int) -> float:
        """Rings through all GPUs: each GPU's own network card carries one, so a node sends with all of its cards."""
        if world_size == 1:
            return 0.0
        nodes = -(-world_size // self.per_node)
        speed = self.intra if nodes == 1 else min(self.intra, self.per_node * self.inter)
        latency = self.base + (world_size - nodes) * self.hop + (nodes if nodes > 1 else 0) * self.node_hop
        return wire_bytes / (OF_LINK * speed) + num_messages * latency


@dataclass(frozen=True)
class Rates:
    """Of one device. `is_asynchronous`: the host goes ahead, so operations cost it time only where they are short."""

    name: str
    products: Mapping[str, float]  # FLOP/s reached, by "bf16", "fp8", "tf32", "fp32"
    attention: float  # FLOP/s reached by the two products between tokens
    memory: float  # bytes/s reached by norms, gates, casts
    operation: float  # seconds of host time
    block_hooks: float
    is_asynchronous: bool
    memory_bytes: float
    watts: float | None
    peaks: Mapping[str, float] = field(default_factory=dict)  # FLOP/s by "bf16" and "fp8": what MFU is against


@dataclass(frozen=True)
class Gpu:
    """`cuda_name` finds its peaks in profiling/peaks.py; data sheets of the same products."""

    cuda_name: str
    gigabytes: float
    nvlink: float  # bytes/s, one way
    watts: float


GPUS = {
    "h100": Gpu("NVIDIA H100 80GB HBM3", 80, 450e9, 700),
    "h800": Gpu("NVIDIA H800", 80, 200e9, 700),
    "h200": Gpu("NVIDIA H200", 141, 450e9, 700),
    "b200": Gpu("NVIDIA B200", 180, 900e9, 1000),
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 80, 300e9, 400),
    "a100-40gb": Gpu("NVIDIA A100-SXM4-40GB", 40, 300e9, 400),
    "l40s": Gpu("NVIDIA L40S", 48, 32e9, 350),
}
PCIE5 = 64e9  # bytes/s one way, 16 lanes
DEFAULT_LINKS = "nvlink,ib400"
THIS = "this"  # machine, in place of a GPU's name


def rates_of(gpu: str) -> Rates:
    """Of a GPU of the table. Raises UserError for another name."""
    sheet = _gpu(gpu)
    bf16, fp8, memory = peak(sheet.cuda_name, "bf16"), peak(sheet.cuda_name, "fp8"), bandwidth(sheet.cuda_name)
    assert bf16 is not None, "the table names devices with a peak"
    assert memory is not None
    peaks = {"bf16": bf16.flops_per_second} | ({"fp8": fp8.flops_per_second} if fp8 else {})
    reached = {"bf16": OF_BF16 * peaks["bf16"], "tf32": OF_BF16 * TF32_OF_BF16 * peaks["bf16"]}
    reached["fp32"] = OF_BF16 * FP32_OF_BF16 * peaks["bf16"]
    if fp8:
        reached["fp8"] = OF_FP8 * peaks["fp8"]
    return Rates(
        name=gpu,
        products=reached,
        attention=OF_ATTENTION * peaks["bf16"],
        memory=OF_MEMORY * memory.bytes_per_second,
        operation=LAUNCH,
        block_hooks=BLOCK_HOOKS,
        is_asynchronous=True,
        memory_bytes=(1 - RESERVED) * sheet.gigabytes * 1e9,
        watts=POWER_SHARE * sheet.watts,
        peaks=peaks,
    )


def parse_links(spec: str, gpu: str, per_node: int = 8) -> Links:
    """ "nvlink,ib400": inside a node, then between nodes in Gbit/s a GPU. Raises UserError for other words."""
    intra, _, inter = spec.partition(",")
    inside = {"nvlink": _gpu(gpu).nvlink, "pcie": PCIE5}
    network = re.fullmatch(r"(ib|roce|eth)([1-9]\d{0,5})", inter)
    if intra not in inside or network is None:
        raise UserError(
            f"--link {spec}: the first word says what joins the GPUs of a node, nvlink or pcie, the second the network "
            "in Gbit/s a GPU, from 1 on: ib200, ib400, roce200, eth100; for example --link nvlink,ib400"
        )
    return Links(inside[intra], float(network[2]) * 1e9 / 8, per_node)


def _gpu(name: str) -> Gpu:
    if name not in GPUS:
        raise UserError(f"--gpu {name}: no data sheet is known here; choose one of {', '.join(GPUS)}")
    return GPUS[name]
