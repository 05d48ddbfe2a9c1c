"""What this process can compute on."""

from __future__ import annotations

import torch


def has_cuda() -> bool:
    return torch.cuda.is_available()
