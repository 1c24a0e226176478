"""Every command of the README runs: on small stand-ins for the weights and the data, under the names it uses.

`pip install` and `pytest` are what runs this; the quickstart has a test of its own.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import lavin_ds
from lavin_ds.data_prep.sample import generate

pytestmark = pytest.mark.timeout(1400)

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
ASSETS = Path(lavin_ds.__file__).parent / "assets" / "tiny"
RECIPES = {  # and the small one that stands in
    "lavin-7b-24gb": "tiny.yaml",
    "lavin-7b": "tiny.yaml",
    "lavin-13b": "tiny.yaml",
    "own-7b": "tiny-own.yaml",
    "chatbot-13b": "tiny-chat.yaml",
    "captions-13b": "tiny-captions.yaml",
}
ELSEWHERE = ("pip install", "pytest", "lavin-ds quickstart")


def commands() -> list[str]:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    lines = re.sub(r"\\\n\s*", "", blocks).splitlines()
    found = [line for line in lines if line and not line.startswith("#")]
    return [line for line in found if not any(word in line for word in ELSEWHERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder as the README's reader has it, with small files under the same names."""
    folder = tmp_path_factory.mktemp("readme")
    generate(folder / "ScienceQA", seed=0, train=64, val=14, test=28)
    for name in ("llama-7b", "llama-13b"):
        shutil.copytree(ASSETS / "llama", folder / name)
    torch.save(load_file(ASSETS / "vit.safetensors"), folder / "ViT-L-14.pt")
    (folder / "hostfile").write_text("localhost slots=2\n")
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    tiny = yaml.safe_load((ROOT / "lavin_ds" / "recipes" / "tiny.yaml").read_text())
    tiny["training"] |= {"epochs": 0.5, "warmup_epochs": 0.1, "global_batch": 16, "micro_batch": 4}
    formats = {
        "tiny": "QCM-ALE",
        "tiny-own": "conversation",
        "tiny-chat": "single-turn",
        "tiny-captions": "caption",
    }
    for name, words in formats.items():
        tiny["data"]["prompt_format"] = words
        tiny["training"]["validate_every"] = int(name == "tiny")  # the others have no split for it
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(tiny))
    _write_instructions_and_captions(folder)
    _fake_cluster(folder / "cluster")
    return folder


def _write_instructions_and_captions(folder: Path) -> None:
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "It is red."}]
    contents = {
        "alpaca_data.json": [{"instruction": "Which is north?", "input": "", "output": "It is up."}],
        "llava_instruct_158k.json": [{"id": "1", "image": "1.jpg", "conversations": said}],
        "dataset_coco.json": {"images": []},
    }
    (folder / "coco" / "train2017").mkdir(parents=True)
    for number, split in enumerate(("train", "val", "test"), 1):
        Image.new("RGB", (60, 50), (number, 100, 200)).save(folder / "coco" / "train2017" / f"{number}.jpg")
        image = {"filepath": "train2017", "filename": f"{number}.jpg", "split": split, "cocoid": number}
        contents["dataset_coco.json"]["images"].append(image | {"sentences": [{"raw": "It is red."}]})
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    own = {"images": ["coco/train2017/1.jpg"], "conversations": said}
    lines = [own, {"messages": [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]}]
    Image.new("RGB", (60, 50), (200, 10, 10)).save(folder / "photo.jpg")
    (folder / "prompts.jsonl").write_text('{"prompt": "Is it?"}\n{"prompt": "What is it?", "image": "photo.jpg"}\n')
    (folder / "pets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _fake_cluster(folder: Path) -> None:
    """`sbatch` runs the script here, `srun` two tasks of it; `ssh` finds the one node of the hostfile: this one."""
    folder.mkdir()
    scripts = {
        "sbatch": "shift 2\nexport SLURM_NTASKS=2 SLURM_NNODES=1 SLURM_JOB_ID=$$ SLURM_JOB_NODELIST=here\n"
        'export SLURM_CPUS_PER_TASK=1\nbash "$@"\n',
        "scontrol": "echo 127.0.0.1\n",
        "ssh": "echo 127.0.0.1\n",  # DeepSpeed asks a node for its address, and starts a single one without ssh
        "srun": ": ${SRUN_CPUS_PER_TASK:?}\nshift\n"  # which srun does not take from sbatch
        'for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@" & pids="$pids $!"; done\n'
        "for pid in $pids; do wait $pid || exit $?; done\n",
    }
    for name, body in scripts.items():
        path = folder / name
        path.write_text("#!/usr/bin/env bash\n" + body)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def _pin_to_a_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def test_the_readme_has_every_kind_of_command():
    text = "\n".join(commands())
    for start in ("lavin-ds prep", "lavin-ds train", "deepspeed launch", "sbatch", "lavin-ds eval", "lavin-ds export"):
        assert start in text


@pytest.mark.slow
def test_every_command_runs_in_the_order_of_the_readme(folder):
    path = os.pathsep.join([str(folder / "cluster"), str(BIN), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": "1"}
    for command in commands():
        words = shlex.split(command, comments=True)
        simulates = "profile" in words and "--recipe" in words and not {"--fit", "--as-published"} & set(words)
        if not simulates:  # simulating the real sizes is what those are for; one simulation is quick, many are not
            words = [RECIPES.get(word, word) for word in words]
        if words[0] == "deepspeed":
            words[1:1] = ["--num_gpus", "2"]  # it counts GPUs, and there may be none
        # A rank takes ten seconds to import what it needs: where the command is not about ranks, one core, so one rank.
        several = {"deepspeed", "sbatch"} & set(words) or "--hostfile" in words or "tensor_parallel=2" in words
        pin = None if several else _pin_to_a_core
        done = subprocess.run(
            words, cwd=folder, env=environment, preexec_fn=pin, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
