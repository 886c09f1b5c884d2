"""How fast a device really is, for the planner: matrix products, attention, memory, links.

    rates_of("h100"), parse_links("nvlink,ib400", "h100")                # from data sheets and the assumptions below
    measured_rates(config, rows, "matmul", torch.device("cpu"))          # of this machine, at the shapes of a config

A data sheet gives peaks; what software reaches of them is assumed, the same for all GPUs, and printed with every plan.
None of it has been measured on a GPU by this project; `measured_rates` on the GPU itself replaces it. It times products
of a trunk block, attention over the packed crops, and a block's norms, RoPE and gate, each forward and backward, and
divides them into what they compute or move.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from configs import Config, UserError
from kernels.attention import attend
from model.block import build_norm, swiglu_hidden
from model.describe import step_layout
from model.packing import RankBatchSizes
from model.rope import apply_rope
from profiling.cost.block_traffic import DTYPES, elementwise_traffic
from profiling.cost.flops import attention, linear, tokens_and_squares
from profiling.cost.operator_trace import OperatorTrace
from profiling.instruments.machine import bandwidth, peak, time_variants

# What software reaches of a data sheet [assumed]. Products and memory are those of kernels/fp8.py's rule: 700 and 1,200
# TFLOP/s and 2.5 TB/s of an H100, as torchao's published figures have them.
OF_BF16, OF_FP8, OF_MEMORY = 0.71, 0.61, 0.75
OF_ATTENTION = 0.30  # of the bf16 peak: segments of 257 fill two of three tiles of 128, heads are 64 wide
OF_LINK = 0.8
TF32_OF_BF16 = 0.5  # of its peak, and as much of that is reached; convolutions in float32 use it
FP32_OF_BF16 = 1 / 15  # 67 against 989 TFLOP/s on an H100
LAUNCH = 5e-6  # seconds the host needs for an operation of a compiled block or an eager one
BLOCK_HOOKS = 150e-6  # seconds of ZeRO-3, to gather or to free one block
RESERVED = 0.06  # of a GPU's memory: CUDA's own, and fragmentation
POWER_SHARE = 0.9  # of the board's limit, while training
PCIE5 = 64e9  # bytes/s one way, 16 lanes
DEFAULT_LINKS = "nvlink,ib400"
THIS = "this"  # machine, in place of a GPU's name
ROUNDS = 5
MAX_TOKENS = 16_384  # of a timed run
FEW_TOKENS = 16  # whose operations take no time but the host's


@dataclass(frozen=True)
class NetworkLinks:
    """Bytes a second that one GPU sends, one way, by data sheet; `inter` is the network's share of one GPU."""

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
class DeviceRates:
    """Speeds of one device. `is_asynchronous`: the host runs ahead, so operations cost time only where they are
    short."""

    name: str
    products: Mapping[str, float]  # FLOP/s reached, by "bf16", "fp8", "tf32", "fp32"
    attention: float  # FLOP/s reached by attention's two products
    memory: float  # bytes/s reached by norms, gates, casts
    operation: float  # seconds of host time
    block_hooks: float
    is_asynchronous: bool
    memory_bytes: float
    watts: float | None
    peaks: Mapping[str, float] = field(default_factory=dict)  # FLOP/s by "bf16" and "fp8": what MFU is against


@dataclass(frozen=True)
class ClusterGpu:
    """Data sheet of a GPU that clusters have; `cuda_name` finds its peaks in profiling/instruments/machine.py."""

    cuda_name: str
    gigabytes: float
    nvlink: float  # bytes/s, one way
    watts: float


GPUS = {
    "h100": ClusterGpu("NVIDIA H100 80GB HBM3", 80, 450e9, 700),
    "h800": ClusterGpu("NVIDIA H800", 80, 200e9, 700),
    "h200": ClusterGpu("NVIDIA H200", 141, 450e9, 700),
    "b200": ClusterGpu("NVIDIA B200", 180, 900e9, 1000),
    "a100": ClusterGpu("NVIDIA A100-SXM4-80GB", 80, 300e9, 400),
    "a100-40gb": ClusterGpu("NVIDIA A100-SXM4-40GB", 40, 300e9, 400),
    "l40s": ClusterGpu("NVIDIA L40S", 48, 32e9, 350),
}


def rates_of(gpu: str) -> DeviceRates:
    """Rates of a GPU of the table. Raises UserError for another name."""
    sheet = _gpu(gpu)
    bf16, fp8, memory = peak(sheet.cuda_name, "bf16"), peak(sheet.cuda_name, "fp8"), bandwidth(sheet.cuda_name)
    assert bf16 is not None, "the table names devices with a peak"
    assert memory is not None
    peaks = {"bf16": bf16.flops_per_second} | ({"fp8": fp8.flops_per_second} if fp8 else {})
    reached = {"bf16": OF_BF16 * peaks["bf16"], "tf32": OF_BF16 * TF32_OF_BF16 * peaks["bf16"]}
    reached["fp32"] = OF_BF16 * FP32_OF_BF16 * peaks["bf16"]
    if fp8:
        reached["fp8"] = OF_FP8 * peaks["fp8"]
    return DeviceRates(
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


def parse_links(spec: str, gpu: str, per_node: int = 8) -> NetworkLinks:
    """Parse "nvlink,ib400": inside a node, then between nodes in Gbit/s a GPU. Raises UserError for other words."""
    intra, _, inter = spec.partition(",")
    inside = {"nvlink": _gpu(gpu).nvlink, "pcie": PCIE5}
    network = re.fullmatch(r"(ib|roce|eth)([1-9]\d{0,5})", inter)
    if intra not in inside or network is None:
        raise UserError(
            f"--link {spec}: the first word is the link between GPUs of a node, nvlink or pcie, the second the network "
            "in Gbit/s a GPU, from 1 on: ib200, ib400, roce200, eth100; for example --link nvlink,ib400"
        )
    return NetworkLinks(inside[intra], float(network[2]) * 1e9 / 8, per_node)


def _gpu(name: str) -> ClusterGpu:
    if name not in GPUS:
        raise UserError(f"--gpu {name}: no data sheet is known here; choose one of {', '.join(GPUS)}")
    return GPUS[name]


def measured_rates(config: Config, rows: RankBatchSizes, backend: str, device: torch.device) -> DeviceRates:
    """Measure one device on blocks of the trunk's width in the run's precision."""
    probe = _SpeedProbe(config, rows, backend, device)
    products, scores, moved, host = probe.products(), probe.attention(), probe.elementwise(), probe.operation()
    precision = config.optim.precision
    rates = {"bf16": products, "fp32": products, "tf32": products, "fp8": products} | {precision: products}
    if precision == "bf16":
        rates["fp32"] = rates["tf32"] = probe.products(torch.float32)
    is_cuda = device.type == "cuda"
    memory = torch.cuda.mem_get_info(device)[1] if is_cuda else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return DeviceRates(device.type, rates, scores, moved, host, 0.0, is_cuda, float(memory), None)


class _SpeedProbe:
    def __init__(self, config: Config, rows: RankBatchSizes, backend: str, device: torch.device) -> None:
        self.vit, self.backend, self.device = config.model.trunk, backend, device
        self.layout, self.dtype = step_layout(config, rows), DTYPES[config.optim.precision]
        self.tokens = min(self.layout.tokens, MAX_TOKENS)

    def products(self, dtype: torch.dtype | None = None) -> float:
        """FLOP/s of a block's linear layers."""
        width, hidden = self.vit.width, swiglu_hidden(self.vit.width, self.vit.mlp_ratio)
        shapes = [(width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width)]
        weights = [self._random(n, k, dtype=dtype) for k, n in shapes]
        inputs = [self._random(self.tokens, k, dtype=dtype) for k, _ in shapes]
        flops = 3 * sum(linear(self.tokens, k, n) for k, n in shapes)
        runs = [_both_ways(lambda x, w=w: F.linear(x, w), x, w) for x, w in zip(inputs, weights, strict=True)]
        return flops / _seconds(lambda: [run() for run in runs])

    def attention(self) -> float:
        """FLOP/s of attention's two products, over the crops of a step."""
        heads, each = self.vit.heads, self.vit.width // self.vit.heads
        q, k, v = (self._random(self.layout.tokens, heads, each) for _ in range(3))
        squares = sum(tokens_and_squares(count, length)[1] for count, length in self.layout.segments)
        run = _both_ways(lambda q, k, v: attend(q, k, v, self.layout.segments, backend=self.backend), q, k, v)
        return 3 * attention(squares, self.vit.width) / _seconds(run)

    def elementwise(self) -> float:
        """Bytes/s of norm, RoPE and gate."""
        moved, _, seconds = self._elementwise(self.tokens)
        return moved / seconds

    def operation(self) -> float:
        """Seconds of an operation on next to nothing."""
        _, operations, seconds = self._elementwise(FEW_TOKENS)
        return seconds / operations

    def _elementwise(self, tokens: int) -> tuple[int, int, float]:
        """Bytes, operations and seconds of a norm, RoPE and gate, forward and backward."""
        width, heads = self.vit.width, self.vit.heads
        normed = build_norm(self.vit).to(self.device, self.dtype)
        for parameter in normed.parameters():
            torch.nn.init.ones_(parameter)
        rope = self._random(2, tokens, width // heads)

        def forward(x_TD: Tensor, gate_TF: Tensor) -> Tensor:
            y_TD = x_TD + apply_rope(normed(x_TD).unflatten(1, (heads, -1)), rope).flatten(1)
            left_TF, right_TF = gate_TF.chunk(2, dim=-1)
            return y_TD + (F.silu(left_TF) * right_TF)[:, :width]

        hidden = swiglu_hidden(width, self.vit.mlp_ratio)
        run = _both_ways(forward, self._random(tokens, width), self._random(tokens, 2 * hidden))
        trace = OperatorTrace(with_traffic=True)
        with trace.phase("all"):
            run()
        return *elementwise_traffic(trace, "all"), _seconds(run)

    def _random(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype or self.dtype).requires_grad_()


def _both_ways(forward: Callable[..., Tensor], *inputs: Tensor) -> Callable[[], object]:
    """Forward and backward, which leaves no gradients behind."""
    seed = torch.ones_like(forward(*inputs))
    return lambda: torch.autograd.grad(forward(*inputs), inputs, seed)


def _seconds(run: Callable[[], object]) -> float:
    return time_variants({"run": run}, ROUNDS)["run"].median
