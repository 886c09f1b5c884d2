"""Counts the products that really run in float8, at the one function of torch that runs them.

    with float8_products() as products:
        model(batch)
    products         # [(torch.float8_e4m3fn, torch.float8_e4m3fn), ...] the dtypes of each product's operands

torchao calls it from inside a tensor subclass, where no dispatch mode looks; compiled graphs do not come by here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor


@contextmanager
def float8_products() -> Iterator[list[tuple[torch.dtype, torch.dtype]]]:
    products: list[tuple[torch.dtype, torch.dtype]] = []
    real = torch._scaled_mm

    def counted(left: Tensor, right: Tensor, **options: Any) -> Tensor:
        products.append((left.dtype, right.dtype))
        return real(left, right, **options)

    with mock.patch.object(torch, "_scaled_mm", counted):
        yield products
