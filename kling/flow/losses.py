"""The training loss."""

from __future__ import annotations

from torch import Tensor


def flow_loss(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Per sample: sum of m |v_hat - v|^2 over unknown elements, over the sum of m. (b, c, G, h, w) -> (b,).

    The mean of these over samples does not depend on the number of ranks or on accumulation. Given elements (m = 0) carry no loss.
    """
    error = (prediction.float() - target.float()).square().mean(dim=1, keepdim=True)  # (b, 1, G, h, w)
    return (mask * error).flatten(1).sum(1) / mask.flatten(1).sum(1).clamp(min=1e-6)
