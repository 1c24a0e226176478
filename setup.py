from pathlib import Path

from setuptools import find_packages, setup

# The design card fixes data_prep, launch and ds_configs at the top level; installed, they live
# inside lavin_ds so that names as common as `launch` are not claimed in site-packages.
outer = {
    "lavin_ds.data_prep": "data_prep",
    "lavin_ds.launch": "launch",
    "lavin_ds.ds_configs": "ds_configs",
}

setup(
    name="lavin_ds",
    version="0.1.0",
    description="Train LaVIN, a frozen LLaMA that learns to see through Mixture-of-Modality Adapters, with DeepSpeed",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    python_requires=">=3.10",
    packages=[*find_packages(include=["lavin_ds", "lavin_ds.*"]), *outer],
    package_dir=outer,
    package_data={
        "lavin_ds": ["recipes/*.yaml", "assets/**/*"],
        "lavin_ds.ds_configs": ["*.json"],
        "lavin_ds.launch": ["hostfile.example", "*.sbatch"],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "deepspeed>=0.16",
        "fairscale>=0.4.13",
        "open_clip_torch>=2.30",
        "transformers>=4.45",
        "sentencepiece>=0.2",
        "tokenizers>=0.20",
        "safetensors>=0.4.5",
        "pyarrow>=16",
        "numpy>=1.26",
        "pillow>=10",
        "pydantic>=2.7",
        "PyYAML>=6",
        "typer>=0.12",
        "rich>=13.7",
        "psutil>=5.9",
        "matplotlib>=3.8",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.5", "hypothesis>=6.100", "ruff>=0.8"],
        "metrics": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.16"],
    },
    entry_points={"console_scripts": ["lavin-ds = lavin_ds.cli.main:run"]},
)
