import json
import math
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import save_file
from weights_helpers import CONFIG, filled, frozen_llama, write_huggingface, write_meta

from lavin_ds.config import RopeScaling, load_recipe
from lavin_ds.errors import UserError
from lavin_ds.models.lavin import Lavin
from lavin_ds.models.llama import Llama
from lavin_ds.models.trainable import trainable_parameters
from lavin_ds.weights import llama as reading
from lavin_ds.weights.llama import check_llama, llama_shapes, load_llama

LLM = CONFIG.model.llm


@pytest.mark.parametrize("shards, embedding_dim", [(1, 1), (2, 1), (2, 0), (4, 1)])
def test_metas_shards_are_put_together(tmp_path, shards, embedding_dim):
    source, model = filled(), filled(seed=1)
    if shards == 4:  # two key/value heads in four shards: a shard holds half a head
        assert LLM.kv_heads == 2
    write_meta(tmp_path, source, shards, embedding_dim)
    adapters = {name: p.clone() for name, p in trainable_parameters(model.llm).items()}
    load_llama(model.llm, tmp_path)
    for name, tensor in frozen_llama(source).items():
        assert torch.equal(model.llm.get_parameter(name), tensor), name
    for name, tensor in adapters.items():
        assert torch.equal(trainable_parameters(model.llm)[name], tensor)


@pytest.mark.parametrize("layout", ["meta", "huggingface"])
@pytest.mark.parametrize("ranks", [2])
def test_every_rank_loads_its_slice_and_the_slices_make_up_the_model(tmp_path, monkeypatch, layout, ranks):
    source = filled()
    folder = write_meta(tmp_path, source, shards=2) if layout == "meta" else write_huggingface(tmp_path, source)
    from fairscale.nn.model_parallel import layers

    from lavin_ds import parallel

    split = {"FrozenColumnLinear": 0, "Output": 0, "Embedding": 0, "FrozenRowLinear": 1}
    parts = []
    for rank in range(ranks):
        for module in (layers, parallel):
            for name in ("get_model_parallel_rank", "tensor_parallel_rank"):
                monkeypatch.setattr(module, name, lambda rank=rank: rank, raising=False)
            for name in ("get_model_parallel_world_size", "tensor_parallel_size"):
                monkeypatch.setattr(module, name, lambda: ranks, raising=False)
        model = Llama(LLM)
        load_llama(model, folder)
        parts.append(model)
    for owner, module in parts[0].named_modules():
        dim = split.get(type(module).__name__)
        if dim is None:
            continue
        whole = torch.cat([part.get_parameter(f"{owner}.weight") for part in parts], dim)
        assert torch.equal(whole, frozen_llama(source)[f"{owner}.weight"]), owner


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
def test_hugging_faces_rotary_pairs_are_put_back(tmp_path, kind):
    source, model = filled(), Lavin(CONFIG.model)
    write_huggingface(tmp_path, source, kind)
    load_llama(model.llm, tmp_path)
    for name, tensor in frozen_llama(source).items():
        assert torch.equal(model.llm.get_parameter(name), tensor), name


def test_weights_are_cast_to_the_dtype_of_the_parameters(tmp_path):
    source = filled()
    model = Lavin(CONFIG.model.model_copy(update={"frozen_dtype": "bf16"}))
    load_llama(model.llm, write_meta(tmp_path, source, shards=2))
    assert torch.equal(model.llm.output.weight, source.llm.output.weight.bfloat16())


def test_progress_counts_every_tensor(tmp_path):
    seen = []
    load_llama(filled().llm, write_meta(tmp_path, filled(), 1), lambda done, total: seen.append((done, total)))
    assert seen == [(i, 21) for i in range(1, 22)]


@pytest.mark.parametrize(
    "key, value, named",
    [
        ("dim", 64, "64.*has 32.*model.llm.dim=32"),
        ("ffn_dim", 64, "64.*has 48.*model.llm.ffn_dim=48"),
        ("vocab_size", 128, "128.*has 64.*model.llm.vocab_size=64"),
        ("n_layers", 3, "3.*has 2.*model.llm.n_layers=2"),
        ("n_heads", 2, "2.*has 4.*model.llm.n_heads=4"),
        ("n_kv_heads", 4, "4.*has 2.*model.llm.n_kv_heads=2"),
        ("norm_eps", 1e-5, "1e-05.*has 1e-06.*model.llm.norm_eps=1e-06"),
        ("rope_scaling", RopeScaling(), "rope_scaling.*has none"),
    ],
)
@pytest.mark.parametrize("write", [lambda f, m: write_meta(f, m, 2), write_huggingface], ids=["meta", "huggingface"])
def test_a_number_that_contradicts_the_recipe_is_named_with_both_values(tmp_path, write, key, value, named):
    write(tmp_path, filled())
    with pytest.raises(UserError, match=named):
        check_llama(tmp_path, LLM.model_copy(update={key: value}))


def test_an_embedding_of_another_vocabulary_than_the_output_is_refused(tmp_path):
    write_meta(tmp_path, filled(), 1)
    state = torch.load(tmp_path / "consolidated.00.pth")
    torch.save(state | {"tok_embeddings.weight": torch.zeros(60, 32)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match=r"tok_embeddings.weight is \[60, 32\].*\[64, 32\]"):
        check_llama(tmp_path, LLM)


def test_missing_tensors_are_refused(tmp_path):
    write_meta(tmp_path, filled(), 1)
    file = tmp_path / "consolidated.00.pth"
    state = torch.load(file)
    del state["layers.1.attention.wo.weight"]
    torch.save(state, file)
    with pytest.raises(UserError, match="lacks 1 tensors of a LLaMA: layers.1.attention.wo.weight"):
        check_llama(tmp_path, LLM)


@pytest.mark.parametrize(
    "extra", ["layers.0.gate", "layers.0.attention.wq.bias", "layers.1.attention.q_norm.weight"], ids=str
)
def test_metas_tensors_that_the_model_would_not_use_are_refused_by_name(tmp_path, extra):
    write_meta(tmp_path, filled(), 1)
    file = tmp_path / "consolidated.00.pth"
    torch.save(torch.load(file) | {extra: torch.zeros(1)}, file)
    with pytest.raises(UserError, match=f"1 tensors that a LLaMA .* does not use: {extra}"):
        check_llama(tmp_path, LLM)


@pytest.mark.parametrize("extra", ["self_attn.q_proj.bias", "self_attn.q_norm.weight", "mlp.gate.weight"])
def test_hugging_faces_tensors_that_the_model_would_not_use_are_refused_by_name(tmp_path, extra):
    write_huggingface(tmp_path, filled())
    name = f"model.layers.1.{extra}"
    save_file({name: torch.zeros(4)}, tmp_path / "more.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({"weight_map": content["weight_map"] | {name: "more.safetensors"}}))
    with pytest.raises(UserError, match=f"does not use: {name}"):
        check_llama(tmp_path, LLM)


def test_rotary_constants_of_old_files_are_ignored(tmp_path):
    """write_meta writes rope.freqs, write_huggingface's .bin a rotary_emb.inv_freq."""
    check_llama(write_meta(tmp_path / "meta", filled(), 1), LLM)
    check_llama(write_huggingface(tmp_path / "hf", filled(), ".bin"), LLM)


def test_folders_that_hold_no_llama_say_what_was_expected(tmp_path):
    with pytest.raises(UserError, match="No LLaMA at .*absent"):
        check_llama(tmp_path / "absent", LLM)
    with pytest.raises(UserError, match=r"params.json with consolidated.NN.pth \(Meta\)"):
        check_llama(tmp_path, LLM)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="neither .*safetensors nor pytorch_model"):
        check_llama(tmp_path, LLM)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read as JSON"):
        check_llama(tmp_path, LLM)


def test_damaged_and_incomplete_downloads_are_refused(tmp_path):
    folder = write_meta(tmp_path / "meta", filled(), 2)
    shard = folder / "consolidated.01.pth"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(UserError, match="consolidated.01.pth is cut short"):
        check_llama(folder, LLM)
    shard.unlink()
    with pytest.raises(UserError, match="in each of 1 shard|has 24"):
        check_llama(folder, LLM)

    folder = write_huggingface(tmp_path / "hf", filled())
    part = sorted(folder.glob("*.safetensors"))[0]
    content = part.read_bytes()
    part.write_bytes(content[:-100])
    with pytest.raises(UserError, match=f"{part.name} cannot be read as safetensors"):
        check_llama(folder, LLM)
    part.unlink()
    with pytest.raises(UserError, match=f"index.json names {part.name}"):
        check_llama(folder, LLM)


def test_an_unknown_scaling_is_refused(tmp_path):
    write_huggingface(tmp_path, filled())
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"rope_scaling": {"type": "linear", "factor": 2.0}}))
    with pytest.raises(UserError, match="'linear'"):
        check_llama(tmp_path, LLM)


OTHER_ARCHITECTURES = [
    ({"model_type": "qwen2"}, "model_type 'qwen2'"),
    ({"model_type": "gemma"}, "model_type 'gemma'"),
    ({"model_type": "mixtral"}, "model_type 'mixtral'"),
    ({"model_type": "mistral"}, "sliding_window 4096"),  # what transformers takes if it is not stated
    ({"model_type": "mistral", "sliding_window": 8}, "sliding_window 8"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"mlp_bias": True}, "mlp_bias True"),
    ({"use_qk_norm": True}, "use_qk_norm True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*sliding_attention"),
    ({"no_rope_layers": [1, 0]}, r"no_rope_layers \[1, 0\]"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor 0.5"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ({"head_dim": 16}, "head_dim 16: heads whose width is not 32 / 4"),
    ({"num_local_experts": 8}, "num_local_experts 8: a mixture of experts"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config .*awq"),
    ({"rope_theta": 500000.0}, "rope_theta is 10000, but .* has 500000"),
]


@pytest.mark.parametrize("stated, named", OTHER_ARCHITECTURES, ids=lambda value: value if type(value) is str else "")
def test_a_config_that_describes_another_computation_is_refused_by_its_key(tmp_path, stated, named):
    write_huggingface(tmp_path, filled())
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    if "rope_theta" in stated:
        del config["rope_parameters"]
    file.write_text(json.dumps({key: config[key] for key in config if key != "head_dim"} | stated))
    with pytest.raises(UserError, match=f"{file if 'has' not in named else ''}.*{named}"):
        check_llama(tmp_path, LLM)


def test_a_recipe_with_another_rope_theta_is_refused_where_the_file_states_none(tmp_path):
    write_meta(tmp_path, filled(), 1)
    with pytest.raises(UserError, match="rope_theta is 500000, but .* has 10000"):
        check_llama(tmp_path, LLM.model_copy(update={"rope_theta": 500000.0}))


@pytest.mark.parametrize("stated", [{"sliding_window": 4096}, {"moe": {"num_experts": 8}}, {"head_dim": 16}])
def test_metas_params_that_describe_another_computation_are_refused_by_their_key(tmp_path, stated):
    write_meta(tmp_path, filled(), 1)
    file = tmp_path / "params.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | stated))
    with pytest.raises(UserError, match=f"params.json has {next(iter(stated))}"):
        check_llama(tmp_path, LLM)


def test_what_is_refused_is_refused_without_torch(tmp_path):
    """So `validate` and `train` say it in a second."""
    write_huggingface(tmp_path, filled())
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "qwen3"}))
    code = f"""
import sys
from pathlib import Path
from lavin_ds.errors import UserError
from lavin_ds.weights.llama import open_llama
try:
    open_llama(Path({str(tmp_path)!r}))
except UserError as error:
    print(error)
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "model_type 'qwen3'" in done.stdout


def test_a_tied_output_is_the_embedding_even_if_the_file_holds_another(tmp_path):
    """As transformers reads it."""
    source, model = filled(), Lavin(CONFIG.model)
    write_huggingface(tmp_path, source, ".bin")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    load_llama(model.llm, tmp_path)
    assert torch.equal(model.llm.output.weight, source.llm.tok_embeddings.weight)
    assert not torch.equal(source.llm.output.weight, source.llm.tok_embeddings.weight)


def test_nothing_in_a_file_is_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("executed",)

    write_meta(tmp_path, filled(), 1)
    torch.save({"a": torch.zeros(1), "b": Evil()}, tmp_path / "consolidated.00.pth")
    with pytest.raises(UserError, match="asks to build .*print"):
        check_llama(tmp_path, LLM)


def test_checking_reads_headers_alone(tmp_path):
    """4 GB of holes behind a true header are checked in well under a second."""
    config = load_recipe("lavin-7b", ["model.llm.n_layers=4"]).model.llm
    names = {ours: theirs for theirs, ours in reading.HuggingFaceLlama.NAMES.items()}
    layer_names = {ours: theirs for theirs, ours in reading.HuggingFaceLlama.LAYER_NAMES.items()}
    header, end = {}, 0
    for name, shape in llama_shapes(config).items():
        if name.startswith("layers."):
            _, layer, part = name.split(".", 2)
            names[name] = f"model.layers.{layer}.{layer_names[part]}"
        begin, end = end, end + 4 * math.prod(shape)
        header[names[name]] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 4096, "num_attention_heads": 32}))
    start = time.monotonic()
    check_llama(tmp_path, config)
    assert time.monotonic() - start < 1


def test_the_shape_table_is_that_of_the_model():
    model = Llama(LLM)
    assert llama_shapes(LLM) == {name: tuple(p.shape) for name, p in sorted_like(model, llama_shapes(LLM))}


def sorted_like(model, order):
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(order)
    return [(name, parameters[name]) for name in order]
