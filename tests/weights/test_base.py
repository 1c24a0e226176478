"""How a model is built and filled."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from weights_helpers import CONFIG, filled, frozen_llama, same_trainables, write_clip, write_huggingface, write_meta

from lavin_ds.models.lavin import Lavin
from lavin_ds.models.meta import tensors_in
from lavin_ds.models.trainable import frozen_parameters
from lavin_ds.weights.base import build_model


class HostAllocations(TorchDispatchMode):
    """Adds up the bytes of every tensor that is made in host memory; views of others and of mapped files are not."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {tensor.untyped_storage().data_ptr() for tensor in tensors_in((args, *(kwargs or {}).values()))}
        for tensor in tensors_in((result,)):
            if tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() not in known:
                self.bytes += tensor.nbytes
        return result


@pytest.mark.parametrize("layout", ["meta", "huggingface"])
def test_no_frozen_weight_is_in_host_memory_on_its_way_to_another_device(tmp_path, layout):
    model = filled()
    llama = write_meta(tmp_path / "llama", model, 2) if layout == "meta" else write_huggingface(tmp_path / "hf", model)
    clip = write_clip(tmp_path / "clip.safetensors", model)
    with HostAllocations() as host:
        built = build_model(CONFIG, llama, clip, device="meta")  # a device without memory, which is not the host
    assert all(parameter.is_meta for parameter in built.parameters())
    trainable = sum(parameter.nbytes for parameter in built.trainable().values())
    assert trainable <= host.bytes < 1.1 * trainable  # they are initialised on the CPU
    assert sum(parameter.nbytes for parameter in frozen_parameters(built).values()) > 3 * trainable


def test_a_built_model_has_the_files_values_and_the_seeds(tmp_path):
    source = filled()
    built = build_model(CONFIG, write_meta(tmp_path, source, 2), write_clip(tmp_path / "clip.safetensors", source))
    for name, tensor in frozen_llama(source).items():
        assert torch.equal(built.llm.get_parameter(name), tensor), name
    for name, parameter in frozen_parameters(source).items():
        assert torch.equal(built.get_parameter(name), parameter), name
    fresh = Lavin(CONFIG.model)
    fresh.reset_trainable(CONFIG.training.seed)
    assert same_trainables(built, fresh)
    assert {n for n, p in built.named_parameters() if p.requires_grad} == set(built.trainable())
