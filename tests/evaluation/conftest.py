"""A pipeline small enough for every test: sample questions as shards, and a base whose every answer is known."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import torch
import yaml
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file

from lavin_ds.config import RunConfig, load_recipe
from lavin_ds.data.schema import manifest_sha256
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep import sample
from lavin_ds.data_prep.pipeline import prepare
from lavin_ds.data_prep.scienceqa import ScienceQA
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.run import Inputs, RunRecord
from lavin_ds.weights.adapter import save_adapter

QUESTIONS = 42
VOCABULARY = 256
VISION = {"width": 16, "layers": 1, "heads": 2, "patch_size": 8, "image_size": 16, "readout": {"every": 1}}
LLM = {"dim": VOCABULARY, "n_layers": 1, "n_heads": 2, "ffn_dim": 8, "vocab_size": VOCABULARY}


@dataclass(frozen=True)
class Pipeline:
    """Files of one small pipeline. `base` answers every question alike, see `write_base`."""

    folder: Path
    recipe: Path  # a base without adapters
    seeing_recipe: Path  # a LaVIN
    tokenizer: Tokenizer
    clip: Path
    data: Path  # shards with one split, "test", of QUESTIONS rows

    @property
    def config(self) -> RunConfig:
        return load_recipe(str(self.recipe))

    @property
    def seeing_config(self) -> RunConfig:
        return load_recipe(str(self.seeing_recipe))

    def base(self, response: str, ends: bool = True) -> Path:
        """A LLaMA folder whose model gives `response`; then EOS, or if it does not end, the same again."""
        folder = self.folder / f"base-{len(list(self.folder.glob('base-*')))}"
        write_base(folder, self.tokenizer, response, ends)
        return folder

    def run(self, llama: Path) -> Path:
        """A finished run of the seeing recipe with new adapters."""
        folder = self.folder / f"run-{llama.name}"
        folder.mkdir()
        initialize_single_process()
        model = Lavin(self.seeing_config.model)
        model.reset_trainable(0)
        save_adapter(folder / "adapter.safetensors", model.trainable(), self.seeing_config, llama, self.clip)
        RunRecord(
            config=self.seeing_config,
            inputs=Inputs(data=self.data, llama=llama, clip=self.clip),
            data_sha256=manifest_sha256(self.data, "pixels"),
            starts=(),
        ).save(folder)
        return folder


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory) -> Pipeline:
    folder = tmp_path_factory.mktemp("pipeline")
    sample.generate(folder / "source", seed=0, train=0, val=0, test=QUESTIONS)
    tokenizer = write_tokenizer(folder / "tokenizer.model", folder / "source")
    pipeline = Pipeline(
        folder=folder,
        recipe=write_recipe(folder / "base.yaml", vision=None),
        seeing_recipe=write_recipe(
            folder / "seeing.yaml",
            vision=VISION,
            llm_adapter={"kind": "mm", "dim": 4},
            vision_adapter={"kind": "mm", "dim": 4},
            neck={"dim": 8},
        ),
        tokenizer=tokenizer,
        clip=write_clip(folder / "clip.safetensors"),
        data=folder / "shards",
    )
    prepare(ScienceQA(folder / "source", splits="test"), tokenizer.path, pipeline.data, pipeline.seeing_config)
    return pipeline


def write_tokenizer(path: Path, source: Path) -> Tokenizer:
    """Learnt from the questions, with the words of the answer often enough to be one piece each."""
    problems = json.loads((source / "problems.json").read_text()).values()
    texts = [p["question"] + " " + p["hint"] + " Options: " + " ".join(p["choices"]) for p in problems]
    texts += ["Question: Context: N/A Image: N/A Options: (A) (B) (C) (D) (E)", "Response: The answer is B."] * 50
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        vocab_size=VOCABULARY,
        model_type="bpe",
        user_defined_symbols=["\n"],
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


def write_recipe(path: Path, **model) -> Path:
    # A context of 400 positions: the pieces of a vocabulary this small are short.
    model = {"llm": LLM, "frozen_dtype": "fp32", **model}
    path.write_text(yaml.safe_dump({"name": path.stem, "model": model, "data": {"max_length": 400}}))
    return path


def write_base(folder: Path, tokenizer: Tokenizer, response: str, ends: bool) -> None:
    """A LLaMA in Meta's layout whose next token follows from the last one alone.

    Its attention and feed-forward add nothing, embeddings are one-hot, and the output projection is the table of
    what follows what, from the ":" of "Response:" on.
    """
    chain = [tokenizer.encode("Response:")[-1], *tokenizer.encode_continuation_batch([f" {response}"])[0]]
    chain.append(tokenizer.eos_id if ends else chain[0])
    assert len(set(chain[:-1])) == len(chain) - 1, "no token may stand twice in the response"
    initialize_single_process()
    model = Lavin(load_recipe(str(folder.parent / "base.yaml")).model).llm
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    state["norm.weight"] += 1
    state["tok_embeddings.weight"] += torch.eye(VOCABULARY)
    for token, following in zip(chain, chain[1:], strict=False):
        state["output.weight"][following, token] = 1.0
    folder.mkdir()
    shutil.copy(tokenizer.path, folder)
    torch.save(state, folder / "consolidated.00.pth")
    shape = {"dim": VOCABULARY, "n_layers": 1, "n_heads": 2, "vocab_size": VOCABULARY, "norm_eps": 1e-6}
    (folder / "params.json").write_text(json.dumps(shape))


def write_clip(path: Path) -> Path:
    torch.manual_seed(0)
    vision = VisionTransformer(
        image_size=VISION["image_size"],
        patch_size=VISION["patch_size"],
        width=VISION["width"],
        layers=VISION["layers"],
        heads=VISION["heads"],
        mlp_ratio=4.0,
        output_dim=4,
    )
    save_file({f"visual.{name}": value.contiguous() for name, value in vision.state_dict().items()}, path)
    return path
