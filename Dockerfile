# The engine on NVIDIA's PyTorch image, where apex, Transformer Engine, FlashAttention and DALI come built.
#
#   docker build -t registry.example/vtp-engine .
#   docker run --rm --gpus all --ipc host registry.example/vtp-engine python -m profiling.doctor
#
# UNTESTED: it has been neither built nor run; no Docker daemon was at hand. tests/clusters/test_dockerfile.py holds
# its packages against setup.py and constraints.txt. Another release of the image: --build-arg IMAGE=...
ARG IMAGE=nvcr.io/nvidia/pytorch:26.06-py3
FROM ${IMAGE}

# `deepspeed --hostfile` reaches other hosts through pdsh and ssh.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

# What the image lacks, pinned, and what it has in versions of its own: PIP_CONSTRAINT, which the image sets, keeps those.
RUN pip install --no-cache-dir \
    deepspeed==0.19.8 webdataset==1.0.2 torchmetrics==1.9.0 torchao==0.18.0 jaxtyping==0.3.11 \
    fsspec huggingface_hub jinja2 matplotlib numpy nvidia-ml-py "pillow>=11.3" "pydantic>=2.10" pyyaml rich safetensors \
    setuptools tensorboard tokenizers

WORKDIR /opt/vtp-engine
COPY . .
RUN pip install --no-cache-dir --no-deps --no-build-isolation --editable .

# A release whose torch is too old, or that has lost a library, ends the build here and not a run later.
RUN python -c "import importlib.util as u, torch; \
    assert tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 11), torch.__version__; \
    lost = [n for n in ('apex', 'transformer_engine', 'flash_attn', 'nvidia.dali') if u.find_spec(n) is None]; \
    assert not lost, lost"
