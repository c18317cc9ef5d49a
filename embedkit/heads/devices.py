"""Devices that heads may be fitted on."""

from __future__ import annotations

from embedkit.errors import EvaluationError


def require_device(device: str) -> None:
    """Raise unless torch can compute on a device.

    Raises
    ------
    EvaluationError
        When there is no such device; only a caller may choose another.
    """
    import torch

    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EvaluationError(f"heads cannot be fitted on the device {device!r}: {reason}; the CPU is 'cpu'") from error
