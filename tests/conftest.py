"""One thread for the test process: its tensors are tiny, and the ranks it starts need the cores. The accelerator is
named, so that DeepSpeed does not look for one in every rank. Triton, which reads this once, interprets its kernels
where there is no GPU."""

import os

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)
