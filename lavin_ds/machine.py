"""What this machine has to run on: its GPUs, and a port that is free. Nothing here imports torch unless it must."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

# What drivers of NVIDIA (also Jetson's, and WSL's dxg) and AMD put into /dev.
GPU_DEVICES = ("nvidia*", "nvhost*", "nvgpu*", "nvmap", "dxg", "kfd")


def gpus() -> int:
    """Number of GPUs that torch may use. Without a driver the answer is 0 and torch, which takes seconds to import,
    is not asked."""
    if sys.platform == "linux" and not any(any(Path("/dev").glob(pattern)) for pattern in GPU_DEVICES):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def free_port() -> int:
    """A TCP port of the loopback interface that no process listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
