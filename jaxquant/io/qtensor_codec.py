"""QTensors in a checkpoint: their static fields go into the node, their parts are child nodes.

Restoring checks that this jaxquant gives the qtype the meaning that the writer gave it, and runs
the one validator of QTensors on what the manifest claims, before any array is read.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxquant.core.qtensor import QTensor
from jaxquant.core.qtypes import QType, get_qtype
from jaxquant.core.recipe import ActScheme, Rule
from jaxquant.core.schemes import checked_fields
from jaxquant.core.turns import InputTurn
from jaxquant.io.containers import Decoder, Encoder, Node, Place, register
from jaxquant.io.manifest import DTYPES, CheckpointError, take

PARTS = ("codes", "scale", "zero_point", "input_scale", "input_factor")
_OPTIONAL = PARTS[2:]
_PART_KINDS = ("array", "qtensor", "None")


class QTensorCodec:
    """Node of a `QTensor`."""

    kind = "qtensor"
    types: tuple[type, ...] = (QTensor,)

    def encode(self, value: QTensor, encoder: Encoder, place: Place) -> Node:
        """Static fields and parts; refuses a QTensor that breaks an invariant."""
        name = place.name
        for part in PARTS:
            if not _is_part(getattr(value, part)):
                kind = type(getattr(value, part)).__name__
                raise TypeError(f"cannot save {name!r}: its {part} is a {kind}, not an array")
        value.validate(name)
        if value.qtype != get_qtype(value.qtype.name):
            raise TypeError(f"cannot save {name!r}: {value.qtype!r} is not the registered type")
        encoder.qtypes[value.qtype.name] = definition(value.qtype)
        rules = encode_rules(value.op_rules, name)
        if rules not in encoder.op_rules:
            encoder.op_rules.append(rules)
        node: Node = {
            "qtype": value.qtype.name,
            "shape": list(value.shape),
            "dtype": np.dtype(value.dtype).name,
            "act": None if value.act is None else value.act.to_json(),
            "act_ops": None if value.act_ops is None else list(value.act_ops),
            "packed_axis": value.packed_axis,
            "packed_length": value.packed_length,
            "op_rules": encoder.op_rules.index(rules),
            "input_group": value.input_group,
            "contracted": None if value.contracted is None else list(value.contracted),
            "input_turn": _turn_to_json(value.input_turn),
        }
        for part in PARTS:
            node[part] = encoder.encode(getattr(value, part), place.child(part))
        return node

    def decode(self, node: Node, decoder: Decoder, place: Place) -> QTensor:
        """The QTensor, validated."""
        where = decoder.at(place)
        static = {
            "qtype": take(node, "qtype", str, where),
            "dtype": take(node, "dtype", str, where),
            "act": take(node, "act", (dict, type(None)), where),
            "packed_axis": take(node, "packed_axis", (int, type(None)), where),
            "packed_length": take(node, "packed_length", (int, type(None)), where),
        }
        # Checkpoints of format 1 that were written before there were such fields lack them.
        node = {"input_turn": None, "input_factor": {"kind": "None", "value": ""}, **node}
        group = take({"input_group": None, **node}, "input_group", (str, type(None)), where)
        ops = take({"act_ops": None, **node}, "act_ops", (list, type(None)), where)
        if ops is not None and not all(isinstance(op, str) for op in ops):
            raise CheckpointError(f"{where}: act_ops is no list of names: {ops}")
        axes = take({"contracted": None, **node}, "contracted", (list, type(None)), where)
        if axes is not None and not all(type(axis) is int for axis in axes):
            raise CheckpointError(f"{where}: contracted is no list of axes: {axes}")
        rules = take(node, "op_rules", int, where)
        if not 0 <= rules < len(decoder.op_rules):
            raise CheckpointError(f"{where}: there are no op_rules {rules}")
        if static["dtype"] not in DTYPES:
            raise CheckpointError(f"{where}: unknown dtype {static['dtype']!r}")
        if place.weight is None:
            place = dataclasses.replace(place, weight=node, weight_path=place.path)
        parts = []
        for part in PARTS:
            child = take(node, part, dict, where)
            if child.get("kind") not in _PART_KINDS or (
                child["kind"] == "None" and part not in _OPTIONAL
            ):
                raise CheckpointError(f"{where}: {part} is a {child.get('kind')!r}")
            parts.append(decoder.decode(child, place.child(part)))
        try:
            act = None if static["act"] is None else ActScheme.from_json(static["act"])
            codes, scale, zero_point, input_scale, input_factor = parts
            tensor = QTensor(
                codes,
                scale,
                zero_point,
                input_scale,
                get_qtype(static["qtype"]),
                jnp.dtype(static["dtype"]),
                act,
                static["packed_axis"],
                static["packed_length"],
                decoder.op_rules[rules],
                group,
                None if axes is None else tuple(axes),
                act_ops=None if ops is None else tuple(ops),
                input_factor=input_factor,
                input_turn=_turn_from_json(node["input_turn"]),
            ).validate("QTensor")
        except (ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{where}: {error}") from error
        if tensor.qtype.name not in decoder.qtypes:  # what its codes stand for is not known then
            raise CheckpointError(f"{where}: qtypes does not define {tensor.qtype.name}")
        if list(tensor.shape) != take(node, "shape", list, where):
            raise CheckpointError(
                f"{where}: its arrays make a weight of shape {list(tensor.shape)}, not"
                f" {node['shape']}"
            )
        return tensor


def _turn_to_json(turn: InputTurn | None) -> dict[str, int] | None:
    return None if turn is None else dataclasses.asdict(turn)


def _turn_from_json(data: Any) -> InputTurn | None:
    """The inverse of `_turn_to_json`.

    Raises:
      ValueError: it is none.
    """
    if data is None:
        return None
    if not isinstance(data, dict) or not all(type(value) is int for value in data.values()):
        raise ValueError(f"malformed input_turn: {data!r}")
    return InputTurn(**checked_fields(InputTurn, data))


def definition(qtype: QType) -> dict[str, Any]:
    """What codes of this type mean, as JSON: the fields that decide it, of exact floats."""
    fields = dataclasses.asdict(qtype)
    for irrelevant in ("default_group_size", "scale_dtype", "group_size", "scale_qtype"):
        del fields[irrelevant]
    return {**fields, "table": None if qtype.table is None else list(qtype.table)}


def check_definitions(written: dict[str, Any], where: str) -> None:
    """Checks that the writer's qtypes mean what they mean here.

    Raises:
      CheckpointError: a type is unknown, or its codes stand for other numbers.
    """
    for name, fields in written.items():
        try:
            known = definition(get_qtype(name))
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}. A newer jaxquant may know it") from error
        if fields != known:
            raise CheckpointError(
                f"{where}: {name} codes were written as {fields}; this jaxquant reads {known}"
            )


def encode_rules(rules: tuple[Any, ...], name: str) -> list[Any]:
    """The rules for weightless ops that a QTensor carries, as JSON."""
    wrong = [rule for rule in rules if not isinstance(rule, Rule)]
    if wrong:
        raise TypeError(f"cannot save {name!r}: its op_rules hold {wrong[0]!r}, which is no Rule")
    return [rule.to_json() for rule in rules]


def decode_rules(rules: Any, where: str) -> tuple[Rule, ...]:
    """The inverse of `encode_rules`."""
    if not isinstance(rules, list):
        raise CheckpointError(f"{where}: malformed op_rules")
    try:
        return tuple(Rule.from_json(rule) for rule in rules)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{where}: malformed op_rules: {error}") from error


def _is_part(value: Any) -> bool:
    return value is None or hasattr(value, "dtype")


register(QTensorCodec())
