"""Parameter counts: the published totals, and the bytes on disk."""

import re
from importlib.resources import files

import pytest
from safetensors.torch import save

from lavin_ds.config import load_recipe, recipe_names
from lavin_ds.models.counting import count_parameters
from lavin_ds.models.lavin import Lavin


@pytest.mark.parametrize(
    "recipe, total",
    [
        ("lavin-7b", 3_781_296),
        ("lavin-7b-24gb", 3_781_296),
        ("lavin-13b", 5_390_080),
        ("lavin-33b", 60 * 133_130 + 491_760 + 989_824 + 2 * 6656),
        ("lavin-65b", 80 * 163_850 + 491_760 + 1_187_968 + 2 * 8192),
        ("ablation-text", 1_704_192),
        ("ablation-vision", 2_331_008),
        ("ablation-joint", 2_450_912),
        ("ablation-vitl", 2_855_536),
        # Paper 3 prints no totals: these are what its text makes (docs/fidelity.md).
        ("bottleneck-7b", 32 * 102_416 + 24 * 2 * 25_616 + 659_584),
        ("bottleneck-ablation-clip", 3_781_296),
        ("bottleneck-ablation-router", 3_781_296),
        ("bottleneck-ablation-concat", 3_003_056),
        ("bottleneck-ablation-loha-1", 11_251_952),
        ("bottleneck-ablation-loha-2", 8_776_368),
        ("bottleneck-ablation-loha-3", 5_807_168),
        ("bottleneck-ablation-lora", 5_173_568),
        ("bottleneck-ablation-weighted", 10_042_144),
    ],
)
def test_totals_are_those_of_the_papers(recipe, total):
    count = count_parameters(load_recipe(recipe))
    assert count.trainable == sum(count.components.values()) == total
    assert count.checkpoint_bytes == 3 * 4 * total


def test_components_and_frozen_parts_of_7b():
    count = count_parameters(load_recipe("lavin-7b"))
    assert count.components == {
        "llm_adapters": 32 * 81_930,
        "vision_adapters": 24 * 20_490,
        "neck": 659_584,
        "modality_embedding": 2 * 4096,
    }
    assert count.frozen["llm"] == 6_738_415_616  # LLaMA-7B
    assert count.frozen_bytes["llm"] == 2 * 6_738_415_616


@pytest.mark.parametrize(
    "override, total",
    [
        ("model.llm_adapter.at=[attention,ffn]", 8_443_776),
        ("model.vision_adapter.at=[attention]", 4_551_680),
    ],
)
def test_the_bottlenecks_other_readings(override, total):
    assert count_parameters(load_recipe("bottleneck-7b", [override])).trainable == total


def test_a_total_that_a_recipe_states_is_the_one_counted():
    stated = {}
    for name in recipe_names():
        found = re.search(r"([\d,]+) trainable parameters", (files("lavin_ds.recipes") / f"{name}.yaml").read_text())
        if found:
            stated[name] = int(found[1].replace(",", ""))
    assert len(stated) > 12
    assert stated == {name: count_parameters(load_recipe(name)).trainable for name in stated}


def test_the_text_only_ablation_reads_captions_and_has_no_vision():
    config = load_recipe("ablation-text")
    assert config.model.vision is None and config.data.captions
    assert count_parameters(config).frozen["vision"] == 0


def test_adapter_file_bytes_are_those_that_safetensors_writes():
    tiny = load_recipe("tiny")
    trainable = {name: p.detach() for name, p in Lavin(tiny.model).trainable().items()}
    assert count_parameters(tiny).adapter_file_bytes == len(save(trainable))
