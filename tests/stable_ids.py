"""Names of parametrised cases that are the same in every process, so that several may share the tests."""


def stable_id(value):
    """The value's text, unless that holds an address; then pytest's own name for it."""
    text = str(value)
    return None if " at 0x" in text else text
