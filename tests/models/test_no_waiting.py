"""On a GPU an index of unknown size, a number read back or a list copied there makes the host wait for the device."""

from __future__ import annotations

import pytest
import torch
from model_helpers import VARIANTS, fill, make_batch, pack
from torch.utils._python_dispatch import TorchDispatchMode

from lavin_ds.models.lavin import Lavin

aten = torch.ops.aten
# lift_fresh: what torch.tensor(a list) calls; the copy to a device that follows it waits.
WAITING = {aten.nonzero.default, aten.masked_select.default, aten._local_scalar_dense.default, aten.lift_fresh.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class RefuseWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in WAITING, f"{function} waits for the device"
        if function in INDEXING:
            assert not any(i is not None and i.dtype == torch.bool for i in args[1]), f"{function} by a mask waits"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [[(11, 0), (8, -1), (9, 1), (7, 0)], [(8, -1), (5, -1)]], ids=["images", "text"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("kind", ["mm", "lora"])
def test_neither_forward_nor_backward_of_a_step_waits_for_the_device(kind, packing, rows):
    model = fill(Lavin(VARIANTS[kind], activation_checkpointing=1))
    batch = make_batch(rows)
    batch = pack(batch) if packing else batch
    with RefuseWaiting():
        total, count = model(batch)
        (total / count).backward()
    assert count == int((batch.labels_BT[:, 1:] >= 0).sum())


def test_what_waits_is_seen():
    x = torch.randn(4)
    for waits in (lambda: x[x > 9], lambda: x.sum().item(), lambda: torch.tensor([1, 2]), lambda: (x > 0).nonzero()):
        with pytest.raises(AssertionError, match="waits"), RefuseWaiting():
            waits()
