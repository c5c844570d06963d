"""Where float64 is to be had."""

import torch


def device_of_float64(device: torch.device) -> torch.device:
    """The device itself, or the CPU if it has no float64 (MPS)."""
    return torch.device("cpu") if device.type == "mps" else device
