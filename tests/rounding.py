"""The comparison for one computation on two code paths: another batch size, another memory layout, another kernel.

Only runs of one shape on one code path repeat to the last bit. A CPU picks the kernel of a matrix product by its shape,
strides and instruction set, and each kernel sums in an order of its own; ``torch.equal`` across them holds on one
machine and fails on the next.
"""

import torch


def assert_same_but_rounding(found, wanted, terms=32):
    """No element of ``found`` is further off than ``terms`` roundings of the largest element of ``wanted``.

    A sum of n products in another order differs by at most about n roundings of its terms; the small models of the
    tests add 32 at most.
    """
    size = wanted.detach().abs().max().item()
    torch.testing.assert_close(found, wanted, rtol=0, atol=terms * torch.finfo(wanted.dtype).eps * size)
