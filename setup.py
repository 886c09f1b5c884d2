"""vtp-engine: pre-training visual tokenizers (VTP). `pip install -e . -c constraints.txt`."""

from setuptools import setup

setup(
    name="vtp-engine",
    version="0.1.0",
    description="Pre-train visual tokenizers on contrast, self-supervision and reconstruction in one shared forward",
    license="Apache-2.0",
    python_requires=">=3.10,<3.15",  # 3.15 brings a standard module called `profiling`
    packages=[
        "configs", "kernels", "data", "data.corpora", "data.latents",
        "model", "model.generator", "model.losses",
        "engine", "engine.checkpoint", "engine.health", "engine.reporting", "engine.tasks",
        "engine.watchdog", "engine.zero",
        "evaluation", "evaluation.study",
        "profiling", "profiling.benches", "profiling.cost", "profiling.doctor", "profiling.gpu_check",
        "profiling.instruments", "profiling.plan", "profiling.report",
    ],
    package_data={"configs": ["*.yaml", "deepspeed/*.json"], "profiling.report": ["*.j2"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed==0.19.8",  # engine/zero/ replaces parts of this release and refuses another
        "nvidia-dali-cuda130>=2.4",  # decodes on the CPU where there is no GPU
        "webdataset>=1.0.2",
        "fsspec",
        "tokenizers",
        "huggingface_hub",
        "safetensors",
        "jaxtyping",
        "pydantic>=2.10",
        "pyyaml",
        "numpy",
        "pillow>=11.3",  # the first with AVIF
        "rich",
        "tensorboard",
        "torchmetrics>=1.9",  # evaluation: FID and SSIM; without its extras it needs no torchvision
        "nvidia-ml-py",  # pure Python; finds out at run time whether there is a driver
        "jinja2",  # the report page, and matplotlib its plots
        "matplotlib",
        "setuptools",  # torch.utils.tensorboard and DeepSpeed's extension builder import it at run time
    ],
    extras_require={
        # Wheels only. FlashAttention 2 is not requested: torch's own varlen attention is the same kernel; nor is
        # xFormers, whose wheel is built for another torch and loads no kernel beside the one pinned here.
        "gpu": ["torchao"],
        # Built against the torch that is installed: pip install --no-build-isolation -e ".[transformer-engine]"
        "transformer-engine": ["transformer-engine[pytorch]"],
        "onnx": ["onnx", "onnxscript", "onnxruntime"],  # model.interchange programs --onnx
        "dev": [
            "pytest", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-PyYAML", "beartype",
            "scikit-image", "scikit-learn",
            "uv",  # resolves the pins against PyPI (tests/resolution.py)
            "onnx", "onnxscript", "onnxruntime",
            "torchao", "triton",  # both run on the CPU too: real float8, interpreted kernels
        ],
    },
)  # fmt: skip
