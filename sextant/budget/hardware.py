"""Devices and their peaks, with the source of each figure."""

from __future__ import annotations

import torch

BF16_PEAKS: dict[str, float] = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "B200": 2250e12,
}
"""Dense bf16 FLOP/s from the vendor's data sheets (SXM boards), by a word in the device's name."""


def bf16_peak(device: torch.device) -> float | None:
    """Dense bf16 peak of a CUDA device in FLOP/s, or None when it is not known (and for CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for word, peak in BF16_PEAKS.items() if word in name.replace("-", " ").split()), None)
