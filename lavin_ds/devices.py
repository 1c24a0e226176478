"""Data sheets of GPUs: peak rates, memory, bandwidth and power, with their sources. Nothing here is measured."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass

from lavin_ds.errors import UserError

GPUS_PER_NODE = 8  # at most, for all devices below
GB = 1e9  # bytes, as in data sheets and file sizes

# Bytes that a simulation does not count: CUDA context, cuBLAS workspaces, fragmentation. The published 33.9G and 55.9G
# exceed the simulated tensors of the authors' step by 1.4 and 1.7 GB. So 1.5 GB is used for every model and card. This
# was not measured on a GPU.
OVERHEAD = 1.5e9


@dataclass(frozen=True)
class Rates:
    """Measured seconds per unit of work. A rate is 0 if no measured step did that kind of work."""

    flop: float  # of a matrix product or attention in fp32
    half_flop: float  # in bf16 or fp16
    byte: float  # read or written by an operator that is not a matrix product or attention
    operator: float  # per operator call
    exchanged_byte: float  # sent in a collective

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Device:
    """A GPU described by its data sheet, or a machine described by measured rates."""

    name: str  # as given to --device
    tflops: float  # 1e12 FLOP/s: bf16 products accumulated in fp32, dense (without sparsity)
    bandwidth: float | None  # of memory, 1e9 bytes/s; None if it limited no measured step
    memory: float  # 1e9 bytes; data sheets write GB
    watts: float | None  # board power
    link: float  # 1e9 bytes/s that one GPU sends to the others
    source: str
    driver_names: tuple[str, ...] = ()  # as torch.cuda.get_device_name() reports the card
    rates: Rates | None = None  # measured; if set, used instead of peak rates and an assumed efficiency

    def as_dict(self) -> dict:
        return asdict(self)

    def predicts_time_of(self, frozen_dtype: str) -> bool:
        """Whether the device's rates apply to a base of that dtype. Data sheets cover only half precision."""
        return self.rates is not None or frozen_dtype != "fp32"


# Sources: NVIDIA's data sheets, and for GeForce cards appendix A of the GA102 and Ada white papers. From Hopper and Ada
# on, data sheets give rates with sparsity; the rates here are half of those. Link rates are one way: 32 GB/s for PCIe
# 4.0 x16, 64 for 5.0, and half of what data sheets give for NVLink.
DEVICES = {
    device.name: device
    for device in (
        Device(
            *("a100-40g", 312, 1555, 40, 400, 300, "NVIDIA A100 data sheet, SXM 40 GB; NVLink 600 GB/s both ways"),
            driver_names=("A100-SXM4-40GB",),
        ),
        Device(
            *("a100-80g", 312, 2039, 80, 400, 300, "NVIDIA A100 data sheet, SXM 80 GB; NVLink 600 GB/s both ways"),
            driver_names=("A100-SXM4-80GB",),
        ),
        Device(
            *("a100-pcie-40g", 312, 1555, 40, 250, 32, "NVIDIA A100 data sheet, PCIe 40 GB; PCIe 4.0 x16"),
            driver_names=("A100-PCIE-40GB",),
        ),
        Device(
            *("a100-pcie-80g", 312, 1935, 80, 300, 32, "NVIDIA A100 data sheet, PCIe 80 GB; PCIe 4.0 x16"),
            driver_names=("A100 80GB PCIe",),
        ),
        Device(
            *("h100-80g", 989, 3350, 80, 700, 450, "NVIDIA H100 data sheet, SXM; NVLink 900 GB/s both ways"),
            driver_names=("H100 80GB HBM3",),
        ),
        Device(
            *("h100-pcie", 756, 2000, 80, 350, 64, "NVIDIA H100 data sheet, PCIe; PCIe 5.0 x16"),
            driver_names=("H100 PCIe",),
        ),
        Device(
            *("h100-nvl", 835, 3900, 94, 400, 300, "NVIDIA H100 data sheet, NVL; NVLink bridge 600 GB/s both ways"),
            driver_names=("H100 NVL",),
        ),
        Device(
            *("h200", 989, 4800, 141, 700, 450, "NVIDIA H200 data sheet, SXM; NVLink 900 GB/s both ways"),
            driver_names=("H200",),
        ),
        Device(
            *("h200-nvl", 835, 4800, 141, 600, 450, "NVIDIA H200 data sheet, NVL; NVLink bridge 900 GB/s both ways"),
            driver_names=("H200 NVL",),
        ),
        Device(
            *("a10", 125, 600, 24, 150, 32, "NVIDIA A10 data sheet; PCIe 4.0 x16"),
            driver_names=("A10",),
        ),
        Device(
            *("l4", 121, 300, 24, 72, 32, "NVIDIA L4 data sheet; PCIe 4.0 x16"),
            driver_names=("L4",),
        ),
        Device(
            *("l40", 181, 864, 48, 300, 32, "NVIDIA L40 data sheet; PCIe 4.0 x16"),
            driver_names=("L40",),
        ),
        Device(
            *("l40s", 362, 864, 48, 350, 32, "NVIDIA L40S data sheet; PCIe 4.0 x16"),
            driver_names=("L40S",),
        ),
        Device(
            *("rtx-3090", 71, 936, 24, 350, 32, "NVIDIA GA102 white paper, appendix A; PCIe 4.0 x16"),
            driver_names=("GeForce RTX 3090",),
        ),
        Device(
            *("rtx-4090", 165.2, 1008, 24, 450, 32, "NVIDIA Ada white paper, appendix A; PCIe 4.0 x16"),
            driver_names=("GeForce RTX 4090",),
        ),
    )
}


def find_device(driver_name: str) -> Device | None:
    """The data sheet of a card by the name that torch.cuda.get_device_name() reports. None if there is no data sheet.

    The whole name must match: an H100 PCIe is not an H100 SXM, and a laptop's RTX 4090 is not the desktop one. Old
    drivers leave out the word NVIDIA.
    """
    name = driver_name.removeprefix("NVIDIA ")
    return next((device for device in DEVICES.values() if name in device.driver_names), None)


def custom_device(tflops: float, bandwidth: float, memory: float) -> Device:
    """A device from its figures, in the units of Device. It has no known power, and the link of PCIe 4.0 x16."""
    return Device("the given device", tflops, bandwidth, memory, None, 32, "given figures")


def parse_bytes(text: str) -> int:
    """The bytes in "24GiB" (units of 2**30), "24GB" or "24" (units of 1e9).

    Raises:
        UserError: the text is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GiB|GB|G|)", text.strip(), flags=re.IGNORECASE)
    if not found or not float(found[1]):
        raise UserError(f"'{text}' is not an amount of memory. Write it like 24GiB or 24GB.")
    return int(float(found[1]) * (2**30 if found[2].lower() == "gib" else GB))
