"""Slow and obvious versions of what the package does fast: by ``re``, by ``named_modules`` and on whole tensors."""

import math
import re

import torch


def selected_paths(model, pattern, match="full"):
    """The paths below the root that the pattern means, by ``re`` over ``named_modules``."""
    method = {"full": re.fullmatch, "prefix": re.match, "search": re.search}[match]
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    return [name for name in names if method(pattern, name)]


def mean(values, dim):
    """The mean over all rows at once, in float64, as the dtype that is promised."""
    rows = as_rows(values, dim)
    return rows.double().mean(0).to(result_dtype(rows))


def variance(values, dim, correction=1):
    """The variance over all rows at once, in float64, as the dtype that is promised."""
    rows = as_rows(values, dim)
    return rows.double().var(0, correction=correction).to(result_dtype(rows))


def as_rows(values, dim):
    """All rows of all values, ``(rows, *rest)``, where rows lie along one dimension or several."""
    dims = (dim,) if isinstance(dim, int) else dim
    return torch.cat([value.movedim(dims, tuple(range(len(dims)))).flatten(0, len(dims) - 1) for value in values])


def counted_rows(value, mask, dim, flatten):
    """The rows of one value that its mask selects, and their numbers among all its rows, one after the other."""
    every = torch.ones((), dtype=torch.bool) if mask is None else mask
    every = every.reshape(every.shape + (1,) * (value.dim() - every.dim())).expand(value.shape).clone()
    if flatten is not None:
        length = math.prod(value.shape[:flatten])
        value, every = (each.reshape(length, *each.shape[flatten:]) for each in (value, every))
    rows, selected = as_rows([value], dim), as_rows([every], dim)
    numbers = [number for number in range(len(rows)) if selected[number].all()]
    return rows[numbers], numbers


def result_dtype(rows):
    if rows.dtype in (torch.float16, torch.bfloat16):
        return torch.float32
    return rows.dtype if rows.is_floating_point() else torch.get_default_dtype()


def top_k(rows, k, largest=True):
    """Values and row numbers of the ``k`` best rows per column of a matrix, by Python's ``sorted``."""
    columns = [sorted(enumerate(column), key=lambda pair: pair[1], reverse=largest)[:k] for column in rows.T.tolist()]
    values = torch.tensor([[value for _, value in column] for column in columns], dtype=rows.dtype).T
    indices = torch.tensor([[at for at, _ in column] for column in columns]).T
    return values, indices


def full_backward(module, call):
    """What torch's own full backward hook sees: ``[(grad_input, grad_output), ...]``, in the order of the calls."""
    seen = []
    handle = module.register_full_backward_hook(lambda module, *grads: seen.append(copied(grads)))
    try:
        call()
    finally:
        handle.remove()
    return seen


def copied(grads):
    """Nested tuples of gradients, copied: a gradient that arrives may become ``.grad``, to which the next is added."""
    if isinstance(grads, tuple):
        return tuple(copied(grad) for grad in grads)
    return None if grads is None else grads.clone()


def stacked(entries, pattern, names):
    """Per path with ``*`` where the groups stand, the entries stacked along one axis per group, by loops."""
    found = {path: re.fullmatch(pattern, path) for path in entries}
    result = {}
    for common in {starred(match, names) for match in found.values()}:
        at = {
            tuple(match[name] for name in names): path
            for path, match in found.items()
            if starred(match, names) == common
        }
        axes = [sorted({values[axis] for values in at}, key=numbers_by_size) for axis in range(len(names))]
        result[common] = stacked_along(axes, (), at, entries)
    return result


def starred(match, names):
    """The matched path with ``*`` in place of the groups, which lie apart: from the last one to the first."""
    path = match.string
    for start, end in sorted((match.span(name) for name in names), reverse=True):
        path = path[:start] + "*" + path[end:]
    return path


def stacked_along(axes, values, at, entries):
    if len(values) == len(axes):
        return entries[at[values]]
    return torch.stack([stacked_along(axes, (*values, value), at, entries) for value in axes[len(values)]])


def numbers_by_size(value):
    return (0, int(value), value) if value.isdecimal() else (1, 0, value)
