"""This machine's GPUs, and a free port. torch is imported only if there is a GPU driver."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

# Device files of the drivers of NVIDIA (also of Jetson, and dxg of WSL) and AMD, in /dev.
GPU_DEVICES = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd")


def gpus() -> int:
    """Number of GPUs that torch may use. Without a driver it returns 0 without importing torch, which takes seconds."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
