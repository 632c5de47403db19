"""Parameter trees by path: nested dicts as one flat dict, and back."""

from typing import Any

Tree = dict[str, Any]


def flatten(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """{"blocks/mixer_0/wq": leaf} of a nested dict."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else key
        out |= flatten(value, path) if isinstance(value, dict) else {path: value}
    return out


def unflatten(flat: dict[str, Any]) -> Tree:
    """Inverse of `flatten`."""
    tree: Tree = {}
    for path, value in flat.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = value
    return tree
