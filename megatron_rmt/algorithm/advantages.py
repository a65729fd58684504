"""Group-relative advantages (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1)."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, *, standardise: bool = True) -> Tensor:
    """A_i = (r_i - mean(r)) / std(r) inside each group.

    std is the population standard deviation (`unbiased=False`): the paper writes std and the group
    is all there is, not a sample of one; it gives every group advantages of mean square 1. Nothing
    is added to the denominator. A group whose rewards are all equal, up to rounding of the rewards'
    dtype, has nothing to prefer and gets zeros; so does a group of one.

    Args:
        rewards: [positions, group], float32 or float64.
        standardise: divide by the deviation. Without it small differences stay small (Dr. GRPO,
            arXiv 2503.20783).

    Returns:
        [positions, group] in the dtype of `rewards`.
    """
    exact = rewards.to(torch.float64)
    spread = exact.amax(1, keepdim=True) - exact.amin(1, keepdim=True)
    flat = spread <= 8 * torch.finfo(rewards.dtype).eps * exact.abs().amax(1, keepdim=True)
    centred = exact - exact.mean(1, keepdim=True)
    if standardise:
        centred = centred / centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(flat, 0.0, centred).to(rewards.dtype)
