"""Data sheets: each card has its own, and sizes are read with their units."""

import pytest

from lavin_ds.devices import DEVICES, find_device, parse_bytes
from lavin_ds.errors import UserError


@pytest.mark.parametrize(
    ("name", "device", "tflops", "bandwidth"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40g", 312, 1555),
        ("A100-SXM4-40GB", "a100-40g", 312, 1555),  # a driver before 460
        ("NVIDIA A100-SXM4-80GB", "a100-80g", 312, 2039),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40g", 312, 1555),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80g", 312, 1935),
        ("NVIDIA H100 80GB HBM3", "h100-80g", 989, 3350),
        ("NVIDIA H100 PCIe", "h100-pcie", 756, 2000),
        ("NVIDIA H100 NVL", "h100-nvl", 835, 3900),
        ("NVIDIA H200", "h200", 989, 4800),
        ("NVIDIA H200 NVL", "h200-nvl", 835, 4800),
        ("NVIDIA A10", "a10", 125, 600),
        ("NVIDIA L4", "l4", 121, 300),
        ("NVIDIA L40", "l40", 181, 864),
        ("NVIDIA L40S", "l40s", 362, 864),
        ("NVIDIA GeForce RTX 3090", "rtx-3090", 71, 936),
        ("NVIDIA GeForce RTX 4090", "rtx-4090", 165.2, 1008),
    ],
)
def test_a_card_is_found_by_its_drivers_name(name, device, tflops, bandwidth):
    found = find_device(name)
    assert (found.name, found.tflops, found.bandwidth) == (device, tflops, bandwidth)


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A10G",
        "NVIDIA A100X",
        "NVIDIA H20",
        "NVIDIA GH200 480GB",
        "NVIDIA L4 something",
        "Tesla T4",
        "",
    ],
)
def test_a_card_without_a_data_sheet_gets_no_figure_of_another(name):
    assert find_device(name) is None


def test_no_two_data_sheets_claim_one_card():
    names = [name for device in DEVICES.values() for name in device.driver_names]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("text, size", [("24GiB", 24 * 2**30), ("24 GB", 24_000_000_000), ("80", 80_000_000_000)])
def test_sizes_are_read_with_their_units(text, size):
    assert parse_bytes(text) == size
    with pytest.raises(UserError, match="not an amount of memory"):
        parse_bytes("a lot")
