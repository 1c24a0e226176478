"""Pre-trains the small frozen base that ships in lavin_ds/assets/tiny: a tokenizer, a LLaMA and a CLIP-style ViT.

    python examples/pretrain_base.py tokenizer --out lavin_ds/assets/tiny
    python examples/pretrain_base.py vit       --out lavin_ds/assets/tiny
    python examples/pretrain_base.py llama     --out lavin_ds/assets/tiny

The two models play the part of a LLaMA and a CLIP found on the web: they are trained apart and never meet. The
LLaMA reads generated questions (lavin_ds.data_prep.sample) with captions where a picture would stand; it sees no
picture. The ViT sees pictures beside their captions, and no question. Both draw from a split of their own,
"pretrain", which shares no random stream with the train, val and test splits of any seed.

What they reached on a held-out split, one CPU thread each:
    ViT    2000 steps of 64, 20 minutes: the caption's words, read linearly from the [cls] token of block 4 and of
           block 8, are all ranked above all others for 99-100% of the pictures of every kind.
    LLaMA  1900 steps of drills, 1500 of texts, 17 minutes; right letters: caption after "Image: " 99%, blurred
           96%, in the context 98%; no caption 37% (chance 35%); text questions 97%.

B samples, T tokens, V caption words, P [cls] tokens read out, D width, Q letters asked for
"""

from __future__ import annotations

import argparse
import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from open_clip.transformer import LayerNorm, VisionTransformer
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lavin_ds.data.images import normalise, resize
from lavin_ds.data.layout import Frame
from lavin_ds.data.prompts import Question, build_prompt, build_response
from lavin_ds.data.tokenizer import Tokenizer
from lavin_ds.data_prep.sample import KINDS, MAX_CHOICES, Sample, make_sample

FORMAT = "QCM-ALE"
REASON_FIRST = "QCM-EA"  # a quarter of what the LLaMA reads: it teaches to look an option's letter up
SEED = 0
SPLIT, HELD_OUT = "pretrain", "pretrain-held-out"
VOCABULARY = 512  # at most: every word of the texts, the bytes and the special pieces
PICTURE_KINDS = [i for i, name in enumerate(KINDS) if make_sample(SEED, SPLIT, i).picture]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then half a cosine down to a hundredth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def adamw(modules: list[nn.Module]) -> torch.optim.AdamW:
    """AdamW that decays matrices alone."""
    parameters = [p for module in modules for p in module.parameters()]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))


def update(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()


def half(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in state.items()}


def question_of(sample: Sample) -> Question:
    fields = {k: sample.problem[k] for k in ("question", "answer", "hint", "lecture", "solution")}
    return Question(choices=tuple(sample.problem["choices"]), **fields)


def prompt_and_response(sample: Sample, context: str, format: str = FORMAT) -> tuple[str, str]:
    question = question_of(sample)
    return build_prompt(question, format, context), build_response(question, format)


def train_tokenizer(out: Path, texts: int = 20_000) -> None:
    """A unigram model with byte fallback and the special ids of LLaMA's tokenizer; every word is a piece of its own."""
    samples = [make_sample(SEED, SPLIT, i) for i in range(texts)]
    sentences = ["Image: N/A"] * 50
    for sample in samples:
        prompt, response = prompt_and_response(sample, sample.problem["hint"])
        sentences += [prompt, response, f"Image: {sample.caption}"]
    letters = [f"▁({letter})" for letter in "ABCDE"]
    words = sorted({word.replace(" ", "▁") for s in sentences for word in re.findall(r"(?:^| )?[A-Za-z0-9]+", f" {s}")})
    (out / "llama").mkdir(parents=True, exist_ok=True)
    with (out / "llama" / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=file,
            model_type="unigram",
            vocab_size=VOCABULARY,
            byte_fallback=True,
            character_coverage=1.0,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=["\n", ".", ":", "?", *letters, *words],
            hard_vocab_limit=False,
            num_threads=1,
            minloglevel=2,
        )
    tokenizer = Tokenizer(out / "llama" / "tokenizer.model")
    lengths = [sum(map(len, map(tokenizer.encode, prompt_and_response(s, s.problem["hint"])))) for s in samples]
    print(f"tokens of prompt and response: mean {np.mean(lengths):.1f}, most {max(lengths)}")


VIT = {"image_size": 48, "patch_size": 8, "width": 96, "layers": 8, "heads": 4, "mlp_ratio": 4.0, "output_dim": 96}
VIT_STEPS = 2000
CLS_EVERY = 4
CAPTION_DIM = 96


class CaptionEncoder(nn.Module):
    """The text side of CLIP, no larger than captions of three words need: a bag of words."""

    def __init__(self, words: int):
        super().__init__()
        self.embed = nn.Linear(words, 2 * CAPTION_DIM)
        self.project = nn.Linear(2 * CAPTION_DIM, CAPTION_DIM)

    def forward(self, words_BV: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.project(F.gelu(self.embed(words_BV))), dim=-1)


class CaptionHeads(nn.Module):
    """What the [cls] token of each block that is read out must tell: the caption's words, and which caption it is."""

    def __init__(self, depths: int, words: int):
        super().__init__()
        self.words = nn.ModuleList(nn.Linear(VIT["width"], words) for _ in range(depths))
        self.project = nn.ModuleList(nn.Linear(VIT["width"], CAPTION_DIM) for _ in range(depths))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


def cls_tokens(vit: VisionTransformer, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw [cls] tokens of every CLS_EVERY-th block [B, P, D], and CLIP's own embedding of the image [B, E]."""
    patches = vit.conv1(pixels).flatten(2).transpose(1, 2)
    cls = vit.class_embedding.expand(len(pixels), 1, -1)
    x = vit.ln_pre(torch.cat([cls, patches], dim=1) + vit.positional_embedding)
    taken = []
    for number, block in enumerate(vit.transformer.resblocks, start=1):
        x = block(x)
        if number % CLS_EVERY == 0:
            taken.append(x[:, 0])
    return torch.stack(taken, dim=1), vit.ln_post(x[:, 0]) @ vit.proj


def caption_words() -> list[str]:
    words = {w for i in range(4000) for w in make_sample(SEED, SPLIT, i).caption.split()}
    return sorted(words)


def picture_batch(split: str, first: int, size: int, words: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised pixels [B, 3, 48, 48] and caption words [B, V] of consecutive picture questions."""
    kinds = len(PICTURE_KINDS)
    indices = [len(KINDS) * (i // kinds) + PICTURE_KINDS[i % kinds] for i in range(first, first + size)]
    samples = [make_sample(SEED, split, index) for index in indices]
    pixels = torch.from_numpy(np.stack([resize(s.picture, VIT["image_size"], "squash") for s in samples]))
    present = torch.tensor([[float(word in s.caption.split()) for word in words] for s in samples])
    return normalise(pixels), present


def contrast(image_BE: torch.Tensor, text_BE: torch.Tensor, present: torch.Tensor, scale: torch.Tensor):
    """CLIP's loss, where every picture of the same caption counts as a match."""
    same = (present @ present.t() == present.sum(1)[:, None]) & (present.sum(1)[:, None] == present.sum(1))
    target = same / same.sum(1, keepdim=True)
    logits = scale * F.normalize(image_BE, dim=-1) @ text_BE.t()
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


def vit_loss(vit, heads: CaptionHeads, captions: CaptionEncoder, pixels, present) -> torch.Tensor:
    cls, embedding = cls_tokens(vit, pixels)
    text, scale = captions(present), heads.log_temperature.exp().clamp(max=100)
    loss = contrast(embedding, text, present, scale)
    for depth, (words, project) in enumerate(zip(heads.words, heads.project, strict=True)):
        loss = loss + contrast(project(cls[:, depth]), text, present, scale) / 2
        loss = loss + 10 * F.binary_cross_entropy_with_logits(words(cls[:, depth]), present)
    return loss


@torch.no_grad()
def vit_accuracy(vit, heads: CaptionHeads, words: list[str]) -> dict[str, list[float]]:
    """For each kind and depth, how often the linear word heads rank exactly the caption's words highest."""
    pixels, present = picture_batch(HELD_OUT, 0, 700, words)
    cls, _ = cls_tokens(vit, pixels)
    names = [list(KINDS)[i] for i in PICTURE_KINDS]
    right = []
    for depth, head in enumerate(heads.words):
        scores = head(cls[:, depth])
        least_present = scores.masked_fill(present == 0, math.inf).min(1).values
        right.append(least_present > scores.masked_fill(present == 1, -math.inf).max(1).values)
    right = torch.stack(right).float()
    return {name: [round(v, 3) for v in right[:, k :: len(names)].mean(1).tolist()] for k, name in enumerate(names)}


def train_vit(out: Path, steps: int, batch: int = 64, peak: float = 2e-3) -> None:
    words = caption_words()
    vit = VisionTransformer(**VIT, norm_layer=LayerNorm)
    heads, captions = CaptionHeads(VIT["layers"] // CLS_EVERY, len(words)), CaptionEncoder(len(words))
    optimizer = adamw([vit, heads, captions])
    started = time.time()
    for step in range(steps):
        pixels, present = picture_batch(SPLIT, step * batch, batch, words)
        loss = vit_loss(vit, heads, captions, pixels, present)
        update(optimizer, loss, learning_rate(step, steps, peak))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            accuracy = vit_accuracy(vit, heads, words)
            print(f"step {step + 1} loss {loss.item():.3f} {time.time() - started:.0f} s {accuracy}", flush=True)
            save_file(half({f"visual.{k}": v for k, v in vit.state_dict().items()}), out / "vit.safetensors")


LLAMA = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "initializer_range": 0.06,  # 0.02 is for wide models: at this width attention would start out all but flat
}
DRILL_STEPS, LLAMA_STEPS = 1900, 1500  # batches of drills, then of texts
DRILL_RATE = 1e-3
ARRANGEMENTS = {"blurred": 5, "caption": 3, "context": 1, "none": 2}  # of picture questions, and how often
PROMPT_WEIGHT, LETTER_WEIGHT = 0.05, 5.0  # in the loss; other tokens of the response count 1
SLOTS = 2  # as many as the visual tokens of VIT
WORDS = 4  # most tokens a caption has


@dataclass
class Document:
    """One text: ids [T], a weight for the loss of each [T], and the caption ids blurred into slots, if any."""

    ids: list[int]
    weights: list[float]
    answer_at: int  # where the answer's letter stands
    slots_at: int = -1
    blurred: tuple[int, ...] = ()


class Writer:
    """Turns samples into documents, in the arrangements a LLaMA may have read them in.

    A picture question comes with its caption after "Image: ", or with its caption in the context, or with none:
    there is nothing to read then, and the LLaMA learns that it must guess. After "Image: " the caption is whole, or
    its words are in any order and blurred: each of SLOTS places holds a sum of some words' embeddings and noise.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.frame = Frame.of(tokenizer)
        self.letters = tokenizer.encode("A B C D E")

    def write(self, sample: Sample, arrangement: str, rng: Random, format: str = FORMAT) -> Document:
        hint, caption = sample.problem["hint"], sample.caption
        context = f"{hint} {caption}".strip() if arrangement == "context" else hint
        prompt, response = prompt_and_response(sample, context, format)
        head, slots_at, blurred = self.frame.head(False, 0), -1, ()
        if arrangement == "caption":
            head = [self.frame.bos, *self.frame.prefix_image, *self.tokenizer.encode(caption)]
        elif arrangement == "blurred":
            head = self.frame.head(True, SLOTS)
            slots_at = len(head) - SLOTS
            words = self.tokenizer.encode(caption)
            blurred = tuple(rng.sample(words, len(words)))
        prompt_ids = self.tokenizer.encode(prompt)
        response_ids = self.tokenizer.encode_continuation_batch([response])[0]
        ids = [*head, *prompt_ids, *response_ids, self.tokenizer.eos_id]
        before = len(head) + len(prompt_ids)
        weights = [PROMPT_WEIGHT] * before + [1.0] * (len(ids) - before)
        answer_at = next(i for i in range(before, len(ids)) if ids[i] in self.letters)
        weights[answer_at] = LETTER_WEIGHT
        return Document(ids, weights, answer_at, slots_at, blurred)


def pick_arrangement(sample: Sample, rng: Random) -> str:
    if sample.picture is None:
        return "none"
    return rng.choices(list(ARRANGEMENTS), list(ARRANGEMENTS.values()))[0]


def pick_format(rng: Random) -> str:
    return rng.choices((FORMAT, REASON_FIRST), (3, 1))[0]


def collate(documents: list[Document]) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and loss weights [B, T], padded on the right with id 0 and weight 0."""
    length = max(len(d.ids) for d in documents)
    ids = torch.zeros(len(documents), length, dtype=torch.long)
    weights = torch.zeros(len(documents), length)
    for row, document in enumerate(documents):
        ids[row, : len(document.ids)] = torch.tensor(document.ids)
        weights[row, : len(document.ids)] = torch.tensor(document.weights)
    return ids, weights


def embed(model: LlamaForCausalLM, documents: list[Document], ids: torch.Tensor, generator) -> torch.Tensor:
    """Embeddings [B, T, D]; where a caption is blurred, its slots hold sums of its words and noise.

    Every word is in one slot at least, at a random strength; the noise is a third of a word's typical length.
    """
    table = model.get_input_embeddings()
    x = table(ids)
    rows = [row for row, document in enumerate(documents) if document.slots_at >= 0]
    if not rows:
        return x
    words = torch.zeros(len(rows), WORDS, dtype=torch.long)
    there = torch.zeros(len(rows), WORDS)
    for i, row in enumerate(rows):
        words[i, : len(documents[row].blurred)] = torch.tensor(documents[row].blurred)
        there[i, : len(documents[row].blurred)] = 1
    in_slot = torch.rand(len(rows), SLOTS, WORDS, generator=generator) < 0.5
    home = torch.randint(SLOTS, (len(rows), 1, WORDS), generator=generator)
    in_slot |= torch.arange(SLOTS)[None, :, None] == home
    strength = 0.5 + torch.rand(in_slot.shape, generator=generator)
    mixed = (in_slot * strength * there[:, None]) @ table(words)
    scale = table.weight.detach().std() / 3
    mixed = mixed + scale * torch.randn(mixed.shape, generator=generator)
    x = x.clone()
    start = documents[rows[0]].slots_at
    x[rows, start : start + SLOTS] = mixed
    return x


def llama_loss(model, documents: list[Document], generator) -> torch.Tensor:
    """Weighted mean over all tokens: the prompt counts little, the answer's letter most."""
    ids, weights = collate(documents)
    logits = model(inputs_embeds=embed(model, documents, ids, generator)).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()


@torch.no_grad()
def llama_accuracy(model, writer: Writer, generator) -> dict[str, float]:
    """How often the likeliest letter is right, for each arrangement of held-out picture questions and for text."""
    rng = Random(SEED)
    samples = [make_sample(SEED, HELD_OUT, i) for i in range(560)]
    pictured = [s for s in samples if s.picture]
    written = {how: [writer.write(s, how, rng) for s in pictured] for how in ARRANGEMENTS}
    written["text"] = [writer.write(s, "none", rng) for s in samples if not s.picture]
    result = {"chance": np.mean([1 / len(s.problem["choices"]) for s in pictured])}
    for name, documents in written.items():
        ids, _ = collate(documents)
        logits = model(inputs_embeds=embed(model, documents, ids, generator)).logits
        at = torch.tensor([d.answer_at for d in documents])
        rows = torch.arange(len(at))
        result[name] = (logits[rows, at - 1].argmax(-1) == ids[rows, at]).float().mean()
    return {name: round(float(value), 3) for name, value in result.items()}


def save_llama(model: LlamaForCausalLM, out: Path) -> None:
    (out / "llama").mkdir(parents=True, exist_ok=True)
    model.config.dtype = "bfloat16"
    model.config.architectures = ["LlamaForCausalLM"]
    model.config.to_json_file(out / "llama" / "config.json")
    save_file(half(model.state_dict()), out / "llama" / "model.safetensors", metadata={"format": "pt"})


class Drills:
    """Options and the letters they stand behind, densely: how to look an option up, from easy to hard.

    Each form asks for letters in its own way. A form has two options until it is known, then three, and so on; the
    next form joins in when the one before has three. All documents of a batch are alike but for their words.
    Without them, a model of this size stays at chance on everything that has options for thousands of steps.
    """

    FORMS = {"list": 4, "sentence": 2, "caption": 1}  # and how many letters a document asks for
    STRIDES = {"list": 2, "sentence": 6, "caption": 1}  # tokens from one letter to the next
    KNOWN = 0.95  # running accuracy

    def __init__(self, tokenizer: Tokenizer, generator: torch.Generator):
        self.encode, self.frame, self.generator = tokenizer.encode, Frame.of(tokenizer), generator
        choices = {c for i in range(2000) for c in make_sample(SEED, SPLIT, i).problem["choices"]}
        self.words = torch.tensor([self.encode(choice)[0] for choice in sorted(choices)])
        self.letters = torch.tensor(self.encode("A B C D E"))
        self.brackets = torch.tensor(self.encode("(A) (B) (C) (D) (E)"))
        self.options = dict.fromkeys(self.FORMS, 2)
        self.right = dict.fromkeys(self.FORMS, 0.0)  # running mean of the accuracy

    def pick(self, step: int) -> str:
        forms = list(self.FORMS)
        known = [form for form in forms if self.options[form] > 2]
        joined = forms[: len(known) + 1]
        return joined[step % len(joined)]

    def note(self, form: str, accuracy: float) -> None:
        self.right[form] += 0.05 * (accuracy - self.right[form])
        if self.right[form] > self.KNOWN and self.options[form] < MAX_CHOICES:
            self.options[form] += 1
            self.right[form] = 0.5

    def batch(self, form: str, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """ids [B, T], where the asked letters stand [Q], and which they are [B, Q]."""
        n = self.options[form]
        order = torch.rand(size, len(self.words), generator=self.generator).argsort(1)[:, :n]
        words = self.words[order]
        asked = torch.randint(n, (size, self.FORMS[form]), generator=self.generator)
        word, letter = words.gather(1, asked), self.letters[asked]

        def same(*ids: int) -> torch.Tensor:
            return torch.tensor(ids).expand(size, -1)

        options = torch.stack([self.brackets[:n].expand(size, n), words], 2).flatten(1)
        body = [same(*self.encode("Options:")), options, same(*self.encode("\nResponse:"))]
        answer = same(*self.encode("The answer is"))
        if form == "caption":
            parts = [same(self.frame.bos, *self.frame.prefix_image), word, *body, answer, letter]
        else:
            parts = [same(*self.frame.head(False, 0)), *body]
            for k in range(asked.shape[1]):
                parts.append(word[:, k : k + 1])
                if form == "sentence":
                    parts += [same(*self.encode("A.")[1:]), answer]
                parts.append(letter[:, k : k + 1])
        ids = torch.cat(parts, 1)
        at = torch.arange(ids.shape[1] - 1, 0, -self.STRIDES[form])[: asked.shape[1]].flip(0)
        return ids, at, letter


def drill(model, drills: Drills, step: int, size: int) -> torch.Tensor:
    """Loss of one batch of drills."""
    form = drills.pick(step)
    ids, at, letters = drills.batch(form, size)
    logits = model(input_ids=ids).logits[:, at - 1]
    drills.note(form, (logits.argmax(-1) == letters).float().mean().item())
    return F.cross_entropy(logits.flatten(0, 1), letters.flatten())


def train_llama(out: Path, steps: int, batch: int = 32, peak: float = 1.5e-3) -> None:
    """Drills, then `steps` batches of texts with a batch of the hardest drills beside every fourth."""
    tokenizer = Tokenizer(out / "llama" / "tokenizer.model")
    writer = Writer(tokenizer)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.vocab_size, **LLAMA))
    rng, generator = Random(SEED), torch.Generator().manual_seed(SEED)
    drills = Drills(tokenizer, generator)
    started = time.time()
    optimizer = adamw([model])
    for step in range(DRILL_STEPS):
        loss = drill(model, drills, step, 2 * batch)
        update(optimizer, loss, DRILL_RATE * min(1, (step + 1) / 100))
        if (step + 1) % 100 == 0:
            known = {form: (drills.options[form], round(drills.right[form], 3)) for form in drills.FORMS}
            print(f"drill {step + 1} loss {loss.item():.3f} {time.time() - started:.0f} s {known}", flush=True)
    drills.options = dict.fromkeys(drills.FORMS, MAX_CHOICES)
    optimizer = adamw([model])
    for step in range(steps):
        rate = learning_rate(step, steps, peak, warmup=50)
        samples = [make_sample(SEED, SPLIT, step * batch + i) for i in range(batch)]
        documents = [writer.write(s, pick_arrangement(s, rng), rng, pick_format(rng)) for s in samples]
        loss = llama_loss(model, documents, generator)
        update(optimizer, loss, rate)
        if step % 4 == 0:
            update(optimizer, drill(model, drills, step // 4, batch), rate)
        if (step + 1) % 100 == 0 or step + 1 == steps:
            accuracy = llama_accuracy(model, writer, generator)
            print(f"step {step + 1} loss {loss.item():.3f} {time.time() - started:.0f} s {accuracy}", flush=True)
            save_llama(model, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("tokenizer", "vit", "llama"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="other than the number above, for a trial")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "tokenizer":
        train_tokenizer(args.out)
    elif args.part == "vit":
        train_vit(args.out, args.steps or VIT_STEPS)
    else:
        train_llama(args.out, args.steps or LLAMA_STEPS)


if __name__ == "__main__":
    main()
