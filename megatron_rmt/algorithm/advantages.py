"""Group-relative advantages (GRPO: DeepSeekMath, arXiv 2402.03300, section 4.1)."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor) -> Tensor:
    """A_i = (r_i - mean(r)) / std(r) inside each group.

    std is the population standard deviation (`unbiased=False`): the paper writes std and the group
    is all there is, not a sample of one; it gives every group advantages of mean square 1. Nothing
    is added to the denominator. A group whose rewards are all equal, up to rounding of the rewards'
    dtype, has nothing to prefer and gets zeros; so does a group of one.

    Args:
        rewards: [positions, group].

    Returns:
        [positions, group] in the dtype of `rewards` if that is float32 or float64, else float32.

    Raises:
        ValueError: rewards is not [positions, group] with at least one reward a group.
    """
    if rewards.dim() != 2 or rewards.shape[1] == 0:
        raise ValueError(f"rewards has shape {tuple(rewards.shape)}; pass [positions, group]")
    dtype = rewards.dtype if rewards.dtype in (torch.float32, torch.float64) else torch.float32
    rounding = torch.finfo(rewards.dtype if rewards.is_floating_point() else dtype).eps
    rewards = rewards.to(torch.float64)
    spread = rewards.amax(1, keepdim=True) - rewards.amin(1, keepdim=True)
    flat = spread <= 8 * rounding * rewards.abs().amax(1, keepdim=True)
    centred = rewards - rewards.mean(1, keepdim=True)
    deviation = centred.square().mean(1, keepdim=True).sqrt()
    return torch.where(flat, 0.0, centred / deviation).to(dtype)
