"""Measures how far our LaVIN is from the LaVIN authors' implementation.

    python benchmarks/fidelity.py GOLDEN_DIR [--json]

GOLDEN_DIR holds tensors computed with their code (layout: shared/golden/README.md): config.json, params.json,
inputs.npz, train_cls.npz, train_reference.npz, train_reference_batch1.npz, grads_full.npz, gen.json, gen_*.npz.
The model is built from config.json. Its weights are filled under the authors' names by the rule that config.json names.
Then everything in the files is compared, in two modes:

    default   each image is routed by its own class token; decoding uses the positions of training
    compat    `compat: lavin-official`, the authors' behaviour

Everything is in fp32 on the CPU without dropout. The exit code is 1 if an error is over its limit, and 2 if the folder
cannot be used.
"""

from __future__ import annotations

import json
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from lavin_ds.config import AdapterConfig, LlamaConfig, ModelConfig, NeckConfig, Readout, VisionConfig
from lavin_ds.data.collate import Batch
from lavin_ds.data.layout import IGNORE, official_layout
from lavin_ds.errors import UserError
from lavin_ds.models.cache import KVCache, Reads
from lavin_ds.models.lavin import Lavin
from lavin_ds.parallel import initialize_single_process
from lavin_ds.weights.official import is_convolution, official_name

LIMITS = {
    "weights": 1e-9,  # relative to the sum of magnitudes; larger if the fill is not the authors'
    "loss": 1e-5,
    "logits": 5e-5,
    "log-sum-exp": 5e-5,
    "logit sums": 1e-6,  # relative to the sum of magnitudes
    "hidden states": 5e-5,  # relative to the largest
    "visual tokens": 5e-5,  # relative to the largest
    "routing": 1e-5,
    "gradients": 1e-3,  # relative to each one's norm
    "AdamW losses": 1e-4,
    "greedy tokens": 0,  # number that differ
}
SLICE_STEP = 4  # logits_slice is logits[:, ::4, :64]
CLIP_HEAD_WIDTH = 64
NORM_ENDINGS = ("norm.weight", "ln_1.weight", "ln_2.weight", "ln_pre.weight", "ln_post.weight", "ln_final.weight")


class Error(NamedTuple):
    """The largest error of one comparison, and where it is."""

    mode: str
    what: str
    kind: str  # a key of LIMITS
    error: float
    where: str = ""

    @property
    def limit(self) -> float:
        return LIMITS[self.kind]

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # a NaN fails


@dataclass(frozen=True)
class Golden:
    """A folder of golden tensors."""

    path: Path
    config: dict
    rule: str
    optimizer: dict
    shapes: dict[str, list[int]]  # of every parameter, by the authors' name
    parameters: list[dict]
    inputs: dict[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> Golden:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder. Give one in the layout of shared/golden/v1.")
        settings, parameters = _json(path / "config.json"), _json(path / "params.json")
        shapes = {parameter["name"]: parameter["shape"] for parameter in parameters}
        inputs = _arrays(path / "inputs.npz")
        return cls(path, settings["config"], settings["rule"], settings["optimizer"], shapes, parameters, inputs)

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        return _arrays(self.path / f"{name}.npz")

    @property
    def visual_tokens(self) -> int:
        return self.arrays("train_cls")["vit_cls"].shape[1]

    def model_config(self) -> ModelConfig:
        """The configuration of the folder's model. Shapes give what config.json does not say."""
        c, shapes = self.config, self.shapes
        if c.get("adapter_type", "attn") != "attn" or c.get("visual_adapter_type", "router") != "router":
            raise UserError(f"{self.path}: can compare only adapter_type attn and visual_adapter_type router.")
        up_width = shapes["layers.0.adapter_attn.conv_B.weight"][1]  # of one group
        adapter = AdapterConfig(
            kind="mm",
            dim=c["adapter_dim"],
            groups=c["adapter_dim"] // up_width,
            scale=c["adapter_scale"],
            dropout=0,
            temperature=c["temperature"],
        )
        block = "backbone.visual.transformer.resblocks.0."
        return ModelConfig(
            llm=LlamaConfig(
                dim=c["dim"],
                n_layers=c["n_layers"],
                n_heads=c["n_heads"],
                n_kv_heads=shapes["layers.0.attention.wk.weight"][0] // (c["dim"] // c["n_heads"]),
                ffn_dim=shapes["layers.0.feed_forward.w1.weight"][0],
                vocab_size=shapes["tok_embeddings.weight"][0],
                norm_eps=c["norm_eps"],
            ),
            vision=VisionConfig(
                width=c["vision_width"],
                layers=c["vision_layers"],
                heads=c["vision_width"] // CLIP_HEAD_WIDTH,
                patch_size=c["vision_patch"],
                image_size=c["image_size"],
                mlp_ratio=shapes[block + "mlp.c_fc.weight"][0] / c["vision_width"],
                readout=Readout(every=c["vision_layers"] // self.visual_tokens),
            ),
            llm_adapter=adapter,
            vision_adapter=adapter,
            neck=NeckConfig(dim=c["hidden_proj"]),
            frozen_dtype="fp32",
        )


def fill(name: str, shape: list[int], rule: str) -> torch.Tensor:
    """One parameter's values by the rule in shared/golden/README.md, which depends on the authors' name and shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    t = torch.randn(shape, generator=generator, dtype=torch.float32)
    if rule == "std002":
        return 1 + 0.02 * t if name.endswith(NORM_ENDINGS) else 0.02 * t
    if rule != "v1":
        raise UserError(f"Unknown weight rule '{rule}'. Known are v1 and std002.")
    if name.endswith(NORM_ENDINGS):
        return 1 + 0.1 * t
    if t.ndim <= 1:
        return 0.05 * t
    if name.endswith("expert_weights.weight"):
        return 0.5 * t
    return t / (t.numel() / t.shape[0]) ** 0.5


def theirs(name: str) -> str:
    """The authors' name of any parameter of Lavin, frozen or trainable."""
    if name.startswith("llm.") and ".adapters." not in name:
        return name.removeprefix("llm.")
    if name.startswith("vision.") and ".adapters." not in name:
        visual = name.removeprefix("vision.").replace("blocks.", "transformer.resblocks.").replace(".clip.", ".")
        return f"backbone.visual.{visual}".replace("in_proj.", "in_proj_")
    return official_name(name)


def build(golden: Golden, mode: str) -> tuple[Lavin, Error]:
    """The model with the folder's weights, and the error of their sums compared with params.json."""
    model = Lavin(golden.model_config(), compat=mode == "compat").eval()
    sums = {parameter["name"]: parameter["sum"] for parameter in golden.parameters}
    worst, where = 0.0, ""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            official = theirs(name)
            if official not in golden.shapes:
                raise UserError(f"{golden.path / 'params.json'} lacks {official}, which is {name} in our model.")
            values = fill(official, golden.shapes[official], golden.rule)
            error = abs(values.double().sum().item() - sums[official]) / values.double().abs().sum().item()
            worst, where = max((worst, where), (error, official))
            parameter.copy_(values.squeeze(-1) if is_convolution(official) else values)
    ours = {theirs(name) for name in model.trainable()}
    learning = {p["name"] for p in golden.parameters if p["trainable"]}
    if ours != learning:
        raise UserError(
            f"Trainable parameters differ from {golden.path / 'params.json'}: {sorted(ours ^ learning)[:3]}."
        )
    return model, Error(mode, f"weights filled ({len(sums)} sums)", "weights", worst, where)


def batch_of(golden: Golden, rows: list[int]) -> Batch:
    """Samples of inputs.npz, in the layout of the authors' model."""
    inputs, P = golden.inputs, golden.visual_tokens
    prefix = {True: inputs["prefix_img"], False: inputs["prefix_nonimg"]}
    indicators = [bool(inputs["indicators"][row]) for row in rows]
    layouts = [
        official_layout(
            inputs["ids"][row], inputs["labels"][row], image, prefix[image], P, golden.config["max_seq_len"]
        )
        for row, image in zip(rows, indicators, strict=True)
    ]
    length = max(len(layout.ids) for layout in layouts)
    return _batch(
        [np.pad(layout.ids, (0, length - len(layout.ids))) for layout in layouts],
        [np.pad(layout.labels, (0, length - len(layout.ids)), constant_values=IGNORE) for layout in layouts],
        [len(layout.ids) for layout in layouts],
        inputs["images"][rows],
        indicators,
        visual_start=1 + len(inputs["prefix_img"]),
    )


def prompts_of(golden: Golden, generation: dict) -> Batch:
    """The prompts of gen.json (BOS, prefix, visual tokens, prompt) with the images of inputs.npz."""
    inputs, indicators = golden.inputs, [bool(i) for i in generation["indicators"]]
    bos = int(inputs["ids"][0, 0])
    prompts = []
    for prompt, image in zip(generation["prompts"], indicators, strict=True):
        prefix = inputs["prefix_img"] if image else inputs["prefix_nonimg"]
        prompts.append([bos, *prefix, *[0] * (golden.visual_tokens if image else 0), *prompt])
    lengths = [len(prompt) for prompt in prompts]
    ids = [np.pad(np.array(prompt), (0, max(lengths) - len(prompt))) for prompt in prompts]
    return _batch(
        ids,
        [np.full_like(row, IGNORE) for row in ids],
        lengths,
        inputs["images"][: len(prompts)],
        indicators,
        visual_start=1 + len(inputs["prefix_img"]),
    )


def _batch(ids, labels, lengths, images, indicators: list[bool], visual_start: int) -> Batch:
    slots = np.cumsum(indicators) - 1
    return Batch(
        ids_BT=torch.tensor(np.stack(ids), dtype=torch.long),
        labels_BT=torch.tensor(np.stack(labels), dtype=torch.long),
        image_B=torch.tensor(np.where(indicators, slots, -1), dtype=torch.long),
        images_NHWC=torch.tensor(images[indicators]) if any(indicators) else None,
        visual_start=visual_start if any(indicators) else None,
        lengths_B=torch.tensor(lengths),
        row_ids=[str(i) for i in range(len(lengths))],
    )


@contextmanager
def watched(model: Lavin) -> Iterator[dict[str, torch.Tensor]]:
    """Collects values inside the model: x_ND before and within each layer, routing weights, visual tokens."""
    seen: dict[str, torch.Tensor] = {}

    def keep_input(key):
        return lambda module, args: seen.update({key: args[0].detach()})

    def keep_route(key):
        return lambda module, args: seen.update({key: module.route(args[1]).detach()})

    def keep_output(key):
        return lambda module, args, output: seen.update({key: output.detach()})

    handles = []
    for k, block in enumerate(model.llm.layers):
        handles.append(block.register_forward_pre_hook(keep_input(f"h_in.{k}")))
        handles.append(block.ffn_norm.register_forward_pre_hook(keep_input(f"h_mid.{k}")))
        handles.append(block.adapters["attention"].register_forward_pre_hook(keep_route(f"route_llm.{k}")))
    for k, block in enumerate(model.vision.blocks):
        handles.append(block.adapters["attention"].register_forward_pre_hook(keep_route(f"route_vit.{k}")))
    handles.append(model.llm.layers[-1].register_forward_hook(keep_output("h_out")))
    handles.append(model.vision.register_forward_hook(keep_output("vit_cls")))
    handles.append(model.neck.register_forward_hook(keep_output("image_embeds")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def compare_training(golden: Golden, model: Lavin, mode: str) -> Iterator[Error]:
    """Compares loss, activations, routing weights, logits, gradients and AdamW losses on the folder's batch."""
    expected = golden.arrays("train_cls" if mode == "default" else "train_reference")
    batch = batch_of(golden, list(range(len(golden.inputs["ids"]))))
    with watched(model) as seen:
        loss = mean_loss(model, batch)
    yield Error(mode, "loss", "loss", abs(loss.item() - expected["loss_f64"].item()))
    yield from compare_activations(model, batch, seen, expected, mode)
    loss.backward()
    yield compare_gradients(golden, model, expected, mode)
    yield compare_adamw(golden, model, batch, expected, mode)


def mean_loss(model: Lavin, batch: Batch) -> torch.Tensor:
    total, labels = model(batch)
    return total / labels


def compare_activations(model: Lavin, batch: Batch, seen: dict, expected: dict, mode: str) -> Iterator[Error]:
    modality_B = (batch.image_B >= 0).long()
    B, T = batch.ids_BT.shape
    M = 2

    def with_modality_token(x_ND):
        """Converts our rows (each modality token once) to the authors' [B, 1 + T, D]."""
        return torch.cat([x_ND[:M][modality_B][:, None], x_ND[M:].unflatten(0, (B, T))], dim=1)

    hidden = [Error(mode, "hidden states", "hidden states", 0.0)]
    routes = [Error(mode, "routing weights, LLM", "routing", 0.0)]
    routes_vision = [Error(mode, "routing weights, ViT", "routing", 0.0)]
    for key, want in expected.items():
        kind = key.partition(".")[0]
        if kind in ("h_in", "h_mid", "h_out"):
            got = with_modality_token(seen[key])[..., : want.shape[-1]]
            hidden.append(Error(mode, "hidden states", "hidden states", _relative(got, want), key))
        elif kind == "route_llm":
            got = seen[key][modality_B]
            routes.append(Error(mode, "routing weights, LLM", "routing", _largest(got, want), key))
        elif kind == "route_vit":
            routes_vision.append(Error(mode, "routing weights, ViT", "routing", _largest(seen[key], want), key))
    yield max(hidden, key=_badness)
    yield max(routes, key=_badness)
    if len(routes_vision) > 1:  # the folder has them only in compat mode
        yield max(routes_vision, key=_badness)

    has_image = batch.image_B >= 0
    if has_image.any():
        cls_BPW = seen["vit_cls"][has_image if mode == "compat" else slice(None)]
        for key, got in (("vit_cls", cls_BPW), ("image_embeds", seen["image_embeds"])):
            yield Error(
                mode, f"visual tokens, {key}", "visual tokens", _relative(got, expected[key][has_image.numpy()])
            )

    with torch.no_grad():
        logits = model.llm.logits(model.llm.norm(with_modality_token(seen["h_out"])))
    want = expected["logits_slice"]
    yield Error(mode, "logits", "logits", _largest(logits[:, ::SLICE_STEP, : want.shape[2]], want))
    yield Error(
        mode, "logits, log-sum-exp", "log-sum-exp", _largest(logits.double().logsumexp(-1), expected["logits_lse"])
    )
    scale = logits.double().abs().sum(-1).numpy()
    sums = np.abs(logits.double().sum(-1).numpy() - expected["logits_sum"]) / scale
    yield Error(mode, "logits, sums", "logit sums", _worst(sums))


def compare_gradients(golden: Golden, model: Lavin, expected: dict, mode: str) -> Error:
    """The error of the worst tensor, relative to its norm. Compares whole gradients if the folder has them (compat),
    otherwise their norms and first values."""
    gradients = {theirs(name): p.grad.double().flatten().numpy() for name, p in model.trainable().items()}
    norms = dict(zip(expected["grad_names"].tolist(), expected["grad_norms"].tolist(), strict=True))
    if set(norms) != set(gradients):
        raise UserError(f"{golden.path}: its gradients are not those of our model's trainable tensors.")
    whole = golden.arrays("grads_full") if mode == "compat" else {}
    errors = []
    for name, got in gradients.items():
        norm = max(norms[name], 1e-30)
        if whole:
            error = np.linalg.norm(got - whole[name].astype(np.float64).ravel()) / norm
        else:
            first = expected[f"grad8/{name}"]
            error = max(abs(np.linalg.norm(got) - norms[name]) / norm, np.linalg.norm(got[: len(first)] - first) / norm)
        errors.append((float(error), name))
    error, where = max(errors, key=lambda pair: (np.isnan(pair[0]), pair[0]))
    how = "whole" if whole else "norms and first values"
    return Error(mode, f"{len(errors)} gradients, {how}", "gradients", error, where)


def compare_adamw(golden: Golden, model: Lavin, batch: Batch, expected: dict, mode: str) -> Error:
    """Compares the losses of training on the one batch. Changes the model's weights."""
    settings, want = golden.optimizer, expected["adamw_losses_torch"]
    if settings["schedule"] != "constant":
        raise UserError(
            f"{golden.path / 'config.json'}: unknown schedule {settings['schedule']}; only constant is supported."
        )
    decays = {parameter["name"]: parameter["decay"] for parameter in golden.parameters}
    trainable = model.trainable()
    groups = [
        {
            "params": [p for name, p in trainable.items() if decays[theirs(name)] == decay],
            "weight_decay": settings["weight_decay"] if decay else 0.0,
        }
        for decay in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=tuple(settings["betas"]), eps=settings["eps"])
    losses = []
    for _ in range(len(want) - 1):
        optimizer.zero_grad()
        loss = mean_loss(model, batch)
        loss.backward()
        if settings["grad_clip"]:
            torch.nn.utils.clip_grad_norm_(trainable.values(), settings["grad_clip"])
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        losses.append(mean_loss(model, batch).item())
    return Error(mode, f"{len(want) - 1} AdamW steps, losses", "AdamW losses", _worst(np.abs(losses - want)))


def compare_alone(golden: Golden, model: Lavin) -> Iterator[Error]:
    """Compares losses of samples alone and of batches in another order. In compat mode, losses depend on both."""
    expected = golden.arrays("train_reference_batch1")
    with torch.no_grad():
        alone = [mean_loss(model, batch_of(golden, [row])).item() for row in range(len(expected["losses"]))]
        yield Error("compat", "losses, samples alone", "loss", _worst(np.abs(alone - expected["losses"])))
        for key, want in expected.items():
            name, _, order = key.rpartition("_")
            if name == "loss_permuted":
                loss = mean_loss(model, batch_of(golden, [int(row) for row in order])).item()
                yield Error("compat", f"loss, batch in order {order}", "loss", abs(loss - want.item()))


@torch.no_grad()
def compare_generation(golden: Golden, model: Lavin, mode: str) -> Iterator[Error]:
    """Compares greedy decoding from the cache, and the logits inside longer prompts.

    The authors first process as many tokens of each prompt as the shortest prompt has. Then they process one token per
    call; for longer prompts, that is the next prompt token. We process whole prompts. So their call k is a position in
    the prompt (a row of the uncached forward) or our decoding step k - (prompt length - shortest).

    model: in compat mode. In default mode its shift is switched off, because gen_rope_fixed differs from gen_reference
    only in the positions: its ViT still routes by the first image of the batch.
    """
    model.shifted_decoding = mode == "compat"
    expected = golden.arrays("gen_rope_fixed" if mode == "default" else "gen_reference")
    batch = prompts_of(golden, _json(golden.path / "gen.json"))
    lengths = batch.lengths_B.tolist()
    shortest, calls = min(lengths), len(expected["argmax"])

    logits_of: dict[tuple[int, int], torch.Tensor] = {}  # (call, row)
    index_T = torch.arange(batch.ids_BT.shape[1])
    positions = index_T + 1 if mode == "default" else index_T + (index_T < shortest).long()
    prompt_logits = model.llm.logits(model.hidden(batch, positions=positions))
    _, decoded_logits = greedy(model, batch, calls)
    for row, length in enumerate(lengths):
        for call in range(length - shortest):
            logits_of[call, row] = prompt_logits[row, shortest - 1 + call]
        for call in range(length - shortest, calls):
            logits_of[call, row] = decoded_logits[call - (length - shortest)][row]

    wrong, worst, worst_lse = 0, [], []
    for (call, row), logits in logits_of.items():
        logits = logits.double()
        want = expected["logits"][call, row]
        wrong += int(logits.argmax() != expected["argmax"][call, row])
        worst.append(_largest(logits[: len(want)], want))
        worst_lse.append(abs(logits.logsumexp(-1).item() - expected["lse"][call, row]))
    yield Error(mode, f"generation, {len(logits_of)} greedy tokens", "greedy tokens", wrong)
    yield Error(mode, "generation, logits", "logits", _worst(np.array(worst)))
    yield Error(mode, "generation, log-sum-exp", "log-sum-exp", _worst(np.array(worst_lse)))


@torch.no_grad()
def compare_cached(golden: Golden, model: Lavin) -> Iterator[Error]:
    """Compares the logits of each decoding step with those of one uncached forward pass. Default mode only."""
    batch = prompts_of(golden, _json(golden.path / "gen.json"))
    steps = 8
    chosen, decoded = greedy(model, batch, steps)
    for row, length in enumerate(batch.lengths_B.tolist()):
        alone = replace(
            batch,
            ids_BT=torch.cat([batch.ids_BT[row, :length], torch.stack(chosen)[:, row]])[None],
            labels_BT=torch.full((1, length + steps), IGNORE),
            image_B=batch.image_B[row : row + 1],
            lengths_B=torch.tensor([length + steps]),
        )
        whole = model.llm.logits(model.hidden(alone))[0, length - 1 : -1]
        errors = (torch.stack(decoded)[:, row] - whole).abs()
        yield Error("default", "generation, cached against uncached", "logits", errors.max().item(), f"prompt {row}")


def greedy(model: Lavin, batch: Batch, steps: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids [B] and logits [B, V] of `steps` decoding steps."""
    lengths = batch.lengths_B.tolist()
    cache = KVCache(model.config.llm, len(lengths), max(lengths) + steps, torch.float32, "cpu")
    x_BTD, modality_B = model.embed(batch)
    x_ND = torch.cat([x_TD[:length] for x_TD, length in zip(x_BTD, lengths, strict=True)])
    ids, logits = [], []
    while len(ids) < steps:
        reads = Reads(cache, range(len(lengths)), [1] * len(lengths) if ids else lengths)
        # The authors' positions are one too low after the shortest prompt's length.
        early_N = (reads.index_N >= min(lengths)).long() if model.shifted_decoding else 0
        modality_MD = model.modality() if model.modality is not None else None
        h_ND = model.llm(x_ND[None], modality_MD, modality_B, reads.index_N + 1 - early_N, reads=reads)[0]
        last_B = torch.tensor(reads.lengths).cumsum(0) - 1
        logits.append(model.llm.logits(h_ND[last_B]))
        ids.append(logits[-1].argmax(-1))
        x_ND = model.llm.embed(ids[-1])
    return ids, logits


def run(path: Path) -> list[Error]:
    """Runs every comparison of a folder.

    Raises:
        UserError: the folder lacks a file or describes a model that cannot be compared.
    """
    golden = Golden.read(path)
    initialize_single_process()
    errors = []
    for mode in ("default", "compat"):
        model, filled = build(golden, mode)
        errors.append(filled)
        if mode == "default":
            errors.append(max(compare_cached(golden, model), key=_badness))
        elif (path / "train_reference_batch1.npz").is_file():
            errors += compare_alone(golden, model)
        errors += compare_generation(golden, build(golden, "compat")[0], mode)
        errors += compare_training(golden, model, mode)  # last, because it trains the model
    return errors


def main(
    golden_dir: Annotated[Path, typer.Argument(help="Folder of golden tensors.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the errors as JSON.")] = False,
) -> None:
    """Compare our LaVIN with the LaVIN authors' implementation."""
    try:
        try:
            errors = run(golden_dir)
        except KeyError as error:
            raise UserError(
                f"{golden_dir} lacks {error} in one of its files. The layout must be that of shared/golden/README.md."
            ) from None
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    passed = all(error.passed for error in errors)
    if as_json:
        rows = [error._asdict() | {"limit": error.limit, "passed": error.passed} for error in errors]
        print(json.dumps({"golden": str(golden_dir), "passed": passed, "errors": rows}, indent=2))
    else:
        Console().print(table(golden_dir, errors))
    raise typer.Exit(0 if passed else 1)


def table(path: Path, errors: list[Error]) -> Table:
    table = Table(title=f"Largest errors against {path}")
    for column, justify in (("mode", "left"), ("what", "left"), ("error", "right"), ("limit", "right"), ("", "left")):
        table.add_column(column, justify=justify)
    for error in errors:
        verdict = "pass" if error.passed else f"FAIL {error.where}"
        table.add_row(error.mode, error.what, f"{error.error:.1e}", f"{error.limit:.0e}", verdict)
    return table


def _arrays(file: Path) -> dict[str, np.ndarray]:
    if not file.is_file():
        raise UserError(f"{file.parent} lacks {file.name}.")
    try:
        return dict(np.load(file))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{file} cannot be read as numpy arrays: {error}.") from None


def _json(path: Path) -> dict | list:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _largest(got: torch.Tensor, want: np.ndarray) -> float:
    """The largest absolute difference; NaN if any value is NaN."""
    if tuple(got.shape) != want.shape:
        raise UserError(f"A golden tensor has shape {list(want.shape)}, but our model's has {list(got.shape)}.")
    return _worst(np.abs(got.double().numpy() - want))


def _relative(got: torch.Tensor, want: np.ndarray) -> float:
    return _largest(got, want) / max(_worst(np.abs(want)), 1e-30)


def _worst(errors: np.ndarray) -> float:
    return float(np.max(errors)) if np.size(errors) else 0.0


def _badness(error: Error) -> tuple[bool, float]:
    return np.isnan(error.error), error.error


if __name__ == "__main__":
    typer.run(main)
