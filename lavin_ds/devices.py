"""The devices that time and energy are extrapolated to, and what of their memory no simulation counts."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from lavin_ds.errors import UserError

GPUS_OF_A_NODE = 8  # at most, as these devices are sold
GB = 1e9  # bytes; as data sheets and file sizes have it

# CUDA context, cuBLAS workspaces, fragmentation: what the published 33.9G and 55.9G exceed the simulated tensors of
# the authors' own step by (1.4 and 1.7 GB), as one figure for every model and card. Not measured here: no GPU.
OVERHEAD = 1.5e9


@dataclass(frozen=True)
class Rates:
    """Measured seconds for one unit of each; 0 for what no measured step had."""

    flop: float  # of a matrix product or attention in fp32
    half_flop: float  # in bf16 or fp16
    byte: float  # read or written by an operator without a product
    operator: float  # started, whatever its size
    exchanged_byte: float  # in a collective

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet: dense (not sparse) bf16 with fp32 accumulation, memory, its bandwidth, power."""

    name: str
    tflops: float  # 1e12 operations a second
    bandwidth: float | None  # 1e9 bytes a second; None where steps were measured that it did not slow down
    memory: float  # 1e9 bytes, at least; data sheets write GB
    watts: float | None  # board power
    link: float  # 1e9 bytes a second that one GPU sends to its neighbours
    source: str
    rates: Rates | None = None  # measured on real steps; takes the place of peak rates and an assumed efficiency

    def as_dict(self) -> dict:
        return asdict(self)

    def tells_time_of(self, frozen_dtype: str) -> bool:
        """Data sheets' rates are for bf16; measured ones for any base."""
        return self.rates is not None or frozen_dtype != "fp32"


DEVICES = {
    device.name: device
    for device in (
        Device("a100-40g", 312, 1555, 40, 400, 300, "NVIDIA A100 data sheet, SXM 40 GB; NVLink 600 GB/s both ways"),
        Device("a100-80g", 312, 2039, 80, 400, 300, "NVIDIA A100 data sheet, SXM 80 GB; NVLink 600 GB/s both ways"),
        Device("h100-80g", 989, 3350, 80, 700, 450, "NVIDIA H100 data sheet, SXM; half of its figure with sparsity"),
        Device("h200", 989, 4800, 141, 700, 450, "NVIDIA H200 data sheet, SXM; half of its figure with sparsity"),
        Device("l4", 121, 300, 24, 72, 32, "NVIDIA L4 data sheet; half of its figure with sparsity; PCIe 4.0 x16"),
        Device("rtx-3090", 71, 936, 24, 350, 32, "NVIDIA GA102 white paper, appendix A; PCIe 4.0 x16"),
        Device("rtx-4090", 165.2, 1008, 24, 450, 32, "NVIDIA Ada white paper, appendix A; PCIe 4.0 x16"),
    )
}


def device_given(tflops: float, bandwidth: float, memory: float) -> Device:
    """One by its figures, in the units of Device; power unknown, and a link as PCIe 4.0 x16."""
    return Device("the device given", tflops, bandwidth, memory, None, 32, "figures given")


def parse_bytes(text: str) -> int:
    """Bytes of "24GiB" (2**30), "24GB" or "24" (1e9).

    Raises:
        UserError: it is no size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|)", text.strip(), flags=re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"'{text}' is no amount of memory: write it like 24GiB or 24GB.")
    return int(float(found[1]) * (2**30 if found[2].lower() == "gib" else GB))
