"""Places inside a forward: calls of functions, found by name, read and edited as modules are."""
