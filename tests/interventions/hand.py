"""The slow obvious versions: one plain hook at a time, one forward at a time."""

from contextlib import contextmanager

import torch


def first(value):
    return value[0] if isinstance(value, tuple) else value


def with_first(value, new):
    return (new, *value[1:]) if isinstance(value, tuple) else new


@contextmanager
def edited(model, path, edit, *, inputs=False):
    """The output (or first input) at a path becomes ``edit(tensor)`` inside the block."""
    module = dict(model.named_modules(remove_duplicate=False))[path]
    if inputs:
        handle = module.register_forward_pre_hook(lambda module, args: (edit(args[0]), *args[1:]))
    else:
        handle = module.register_forward_hook(lambda module, args, output: with_first(output, edit(first(output))))
    try:
        yield
    finally:
        handle.remove()


def values(model, paths, call, *, inputs=False):
    """What is at each path while ``call()`` runs, copied."""
    kept, modules, handles = {}, dict(model.named_modules(remove_duplicate=False)), []

    def keep(path):
        def on_input(module, args):
            kept[path] = args[0].detach().clone()

        def on_output(module, args, output):
            kept[path] = first(output).detach().clone()

        return on_input if inputs else on_output

    for path in paths:
        register = "register_forward_pre_hook" if inputs else "register_forward_hook"
        handles.append(getattr(modules[path], register)(keep(path)))
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return kept


def pasted(old, new, index):
    """A copy of ``old`` with ``new`` at ``index``."""
    made = old.clone()
    made[index] = new[index]
    return made


def sweep(model, paths, source, call, metric, indices, *, inputs=False):
    """The metric with ``source[path][index]`` pasted, for each path and each index alone: ``{path: [values]}``."""
    found = {}
    for path in paths:
        found[path] = []
        for index in indices:
            paste = lambda old, path=path, index=index: pasted(old, source[path], index)  # noqa: E731
            with torch.no_grad(), edited(model, path, paste, inputs=inputs):
                found[path].append(float(metric(call())))
    return {path: torch.tensor(numbers, dtype=torch.float64) for path, numbers in found.items()}
