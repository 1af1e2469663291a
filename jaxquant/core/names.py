"""How parameters and modules are named: the one place that turns key paths and scopes into text.

Frontends call `module_scope` around every module call while a model is traced; passes read the
names back with `innermost_module` and name parameters with `path_string`, so recipes, plans and
checkpoints speak of ``layers/attn/query/kernel`` whichever library the model is written in.
Nothing here may depend on Flax, and nothing else may parse or build these strings.
"""

from __future__ import annotations

import contextlib
import posixpath
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax

_SCOPE_PREFIX = "jq:"
# Attributes by which boxes (nn.Partitioned, nnx.Variable) hold their array: no part of the name.
_BOX_ATTRIBUTES = frozenset({"value", "raw_value"})
# An autodiff or batching transform prints around the scopes it acted on: "transpose(jvp(name))".
_TRANSFORM_OPENING = re.compile(r"^(?:[A-Za-z_]\w*\()+")


def path_string(keypath: Iterable[Any]) -> str:
    """Names a leaf as users do, e.g. ``"layers/attn/query/kernel"``.

    Args:
      keypath: the key path of the leaf, from `jax.tree_util.tree_flatten_with_path`, or any
        sequence of plain keys (strings, integers).

    Returns:
      The keys joined by ``/``. Linen's leading ``params`` collection is dropped, other
      collections (``batch_stats``, ``cache``) stay; a trailing ``.value`` of a box (an
      `nn.Partitioned`, an `nnx.Variable`) is dropped, and so are empty keys. The empty path is
      ``""``.
    """
    keys = list(keypath)
    while keys and _is_box_attribute(keys[-1]):
        keys.pop()
    parts = [part for part in (str(_plain_key(key)) for key in keys) if part]
    if len(parts) > 1 and parts[0] == "params":
        parts = parts[1:]
    return "/".join(parts)


def group_names(firsts: Mapping[str, str]) -> dict[str, str]:
    """Names of groups of leaves that stay valid where a subtree is moved, as `QTensor.input_group`.

    Args:
      firsts: for the path of each leaf in a group the path of the group's first leaf.

    Returns:
      For each path the way from it to the first leaf, up to what all leaves of the group have in
      common: ``"../../q/kernel"``. So it is the same for the group's leaves, and for other layers.
    """
    common: dict[str, list[str]] = {}
    for path, first in firsts.items():
        parts = path.split("/")
        shared = common.setdefault(first, parts)
        equal = [a == b for a, b in zip(shared, parts, strict=False)]
        common[first] = shared[: (*equal, False).index(False)]
    names = {}
    for path, first in firsts.items():
        kept = min(len(common[first]), path.count("/"))
        up = path.count("/") + 1 - kept
        names[path] = "/".join([*[".."] * up, *first.split("/")[kept:]])
    return names


def group_first(path: str, name: str) -> str:
    """The path that a name of `group_names` leads to from a leaf's path."""
    return posixpath.normpath(posixpath.join("/", path, name)).lstrip("/")


def _is_box_attribute(key: Any) -> bool:
    return isinstance(key, jax.tree_util.GetAttrKey) and key.name in _BOX_ATTRIBUTES


def _plain_key(key: Any) -> Hashable:
    """The dict key, index or attribute name that a JAX key entry stands for."""
    for attribute in ("key", "idx", "name"):
        if type(key).__module__.startswith("jax") and hasattr(key, attribute):
            return getattr(key, attribute)
    return key


@contextlib.contextmanager
def module_scope(path: Sequence[Hashable] | str, cls: type | str) -> Iterator[None]:
    """Opens a named scope that records the module path and class of the equations traced in it.

    Args:
      path: the module's path from the root, as a string joined by ``/`` or a sequence of keys.
      cls: the module's class, or its name.
    """
    text = path if isinstance(path, str) else "/".join(map(str, path))
    class_name = cls if isinstance(cls, str) else cls.__name__
    with jax.named_scope(f"{_SCOPE_PREFIX}{_encode(text)}:{class_name}"):
        yield


def innermost_module(names: Sequence[str]) -> tuple[str, str] | None:
    """The innermost module scope among the scope names of one equation, outermost first.

    Args:
      names: the entries of the equation's name stack; entries may still carry the transforms
        that JAX prints around them (``"jvp(jq:mlp:Dense)"``).

    Returns:
      ``(module path, class name)``, or None where no module scope is open.
    """
    for name in reversed(names):
        bare = _TRANSFORM_OPENING.sub("", name).rstrip(")")
        if bare.startswith(_SCOPE_PREFIX):
            path, separator, cls = bare[len(_SCOPE_PREFIX) :].rpartition(":")
            if separator:
                return _decode(path), cls
    return None


def _encode(path: str) -> str:
    # A name stack is printed joined by "/", so the path inside one scope name must hold none.
    return path.replace("%", "%25").replace(".", "%2E").replace("/", ".")


def _decode(path: str) -> str:
    return path.replace(".", "/").replace("%2E", ".").replace("%25", "%")


def shown_name(names: Sequence[str]) -> str:
    """For people: the path of the innermost module, or all scope names where there is no module.

    Args:
      names: scope names, outermost first.
    """
    module = innermost_module(names)
    if module is None:
        return "/".join(names)
    path, cls = module
    return path or cls
