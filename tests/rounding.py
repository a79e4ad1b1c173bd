"""What another processor may change: the order of float32's sums, and so their rounding."""

import torch

SHARE = 100 * torch.finfo(torch.float32).eps  # some twenty sums in a row, a few roundings each


def near(found, wanted):
    """Whether two tensors, made by other sums of the same, differ by rounding only.

    A sum errs by a share of its terms, not of itself: an entry near 0 may be off by as much as any
    other, so the tolerance is a share of the largest entry.
    """
    return bool((found - wanted).abs().max() <= SHARE * max(1, float(wanted.abs().max())))
