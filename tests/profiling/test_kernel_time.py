"""The time of a call is laid out by kinds of kernels: nothing twice, and nothing that is no kernel."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from profiling.instruments.profiler import kernel_spans, kind_of, own_nanoseconds

pytestmark = pytest.mark.L0


def test_what_runs_side_by_side_counts_once() -> None:
    spans = [("a", 0, 10), ("b", 4, 12), ("c", 5, 6), ("a", 20, 25)]
    assert own_nanoseconds(spans) == {"a": 15, "b": 2, "c": 0}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_bias_TNN", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("void flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("triton_poi_fused_add_mul_silu_3", "fused"),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4>", "elementwise"),
        ("something new", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(name: str, kind: str) -> None:
    assert kind_of(name) == kind


class Recorded(NamedTuple):
    """An event as torch's profiler has it: begin and end in nanoseconds, on the GPU or on the host."""

    label: str
    begin: int
    end: int
    is_range: bool = False
    device: DeviceType = DeviceType.CUDA

    def name(self) -> str:
        return self.label

    def start_ns(self) -> int:
        return self.begin

    def duration_ns(self) -> int:
        return self.end - self.begin

    def device_type(self) -> DeviceType:
        return self.device

    def is_user_annotation(self) -> bool:
        return self.is_range


def test_named_ranges_are_no_kernels_and_leave_the_time_to_those_inside() -> None:
    events = [
        Recorded("backward", 0, 100, is_range=True),  # over its kernels on the GPU, as record_function's are laid
        Recorded("backward", 0, 40, is_range=True, device=DeviceType.CPU),
        Recorded("cudaLaunchKernel", 1, 2, device=DeviceType.CPU),
        Recorded("## Call CompiledFxGraph fabc ##", 10, 60, is_range=True),
        Recorded("triton_poi_fused_add_0", 10, 30),
        Recorded("nvjet_tst_192x192", 30, 60),
        Recorded("Memcpy DtoD (Device -> Device)", 70, 75),
    ]
    own = own_nanoseconds(kernel_spans(events))
    assert own == {"triton_poi_fused_add_0": 20, "nvjet_tst_192x192": 30, "Memcpy DtoD (Device -> Device)": 5}
    assert {kind_of(name) for name in own} == {"fused", "products", "copies"}


def test_a_range_of_record_function_is_told_from_an_operator_by_the_profiler() -> None:
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as record, record_function("backward"):
        torch.ones(8) + 1
    found = {event.name(): event.is_user_annotation() for event in record.profiler.kineto_results.events()}
    assert found["backward"]
    assert not found["aten::add"]
