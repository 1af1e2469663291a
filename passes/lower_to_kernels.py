"""`lower_to_kernels`: the implementation of each quantized product on the platform, and why.

The last pass. The choice is `jaxquant.pallas_kernels.dispatch`'s, which the lowering of a product
asks too when it knows what it is compiled for; here it is written down for the place at hand, in
the notes and the fact "lowerings". An implementation that the user forces is put into the
equations, and one that does not fit is an error before anything is compiled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax

from jaxquant.core import _compat, primitives
from jaxquant.core.names import shown_name
from jaxquant.core.primitives.describe import describe_fused
from jaxquant.core.primitives.dot import split_operands
from jaxquant.core.primitives.fused import Fused
from jaxquant.core.primitives.kernels import Product, default_place
from jaxquant.core.qtensor import QTensor
from jaxquant.pallas_kernels.dispatch import Implementation, Place
from jaxquant.pallas_kernels.dot_axes import DotAxes
from jaxquant.passes.edit_jaxpr import all_bodies, edit, replace_eqns
from jaxquant.passes.pass_manager import Pass, PassResult
from jaxquant.passes.program import Program

_DOTS = (primitives.quantized_dot_general_p, primitives.quantized_dots_p)
_PRODUCTS = (*_DOTS, primitives.quantized_ragged_dot_p)


@dataclasses.dataclass(frozen=True)
class Lowering:
    """What one product becomes.

    Attributes:
      where: its module, or the user's source line.
      shapes: of the input and the weight.
      implementation: e.g. "xla: int8 dot" or "pallas tpu v5e: int4, scale after the dot".
      reason: why.
    """

    where: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    implementation: str
    reason: str

    def __str__(self) -> str:
        """One sentence."""
        x, w = ("x".join(map(str, shape)) for shape in self.shapes)
        return f"{self.where}: {x} by {w}: {self.implementation} ({self.reason})"


@dataclasses.dataclass(frozen=True)
class LowerToKernels(Pass):
    """Chooses an implementation for each product.

    Attributes:
      place: where the program will run; None for devices of the default kind, as many as the
        types of its arrays and the layouts of its weights say.
      implementation: "xla" or "pallas" to force one; None for the best.
    """

    place: Place | None = None
    implementation: Implementation | None = None

    name: ClassVar[str] = "lower_to_kernels"
    requires: ClassVar[frozenset[str]] = frozenset({"quantized"})
    ensures: ClassVar[frozenset[str]] = frozenset({"lowerings"})

    def run(self, program: Program) -> PassResult:
        """See `Pass.run`.

        Raises:
          ValueError: a forced implementation does not fit; the message names the reasons and the
            user's source line.
        """
        describe = self._describer(self.place or default_place())
        lowerings: list[Lowering] = []
        described: set[int] = set()  # bodies of fused epilogues, by identity
        for body in all_bodies(program.jaxpr):
            if id(body) in described:
                continue
            for eqn in body.eqns:
                fused = None
                if eqn.primitive is primitives.fused_epilogue_p:
                    fused = Fused.make(eqn.params["jaxpr"])
                if fused is not None:
                    described.add(id(eqn.params["jaxpr"].jaxpr))
                if fused is not None or eqn.primitive in _PRODUCTS:
                    lowerings += describe(eqn, fused)
        closed = program.jaxpr
        if self.implementation is not None:
            closed = edit(closed, lambda jaxpr, _: self._pin(jaxpr))
        after = program if closed is program.jaxpr else program.with_jaxpr(closed)
        notes = dict.fromkeys(map(str, lowerings))  # layers say the same
        return PassResult(after.with_facts(lowerings=tuple(lowerings)), tuple(notes))

    def _pin(self, jaxpr: Any) -> Any:
        return replace_eqns(jaxpr, [self._pinned(eqn) for eqn in jaxpr.eqns])

    def _pinned(self, eqn: Any) -> Any:
        if eqn.primitive not in _PRODUCTS or eqn.params["implementation"] == self.implementation:
            return eqn
        return eqn.replace(params={**eqn.params, "implementation": self.implementation})

    def _describer(self, place: Place) -> Callable[[Any, Fused | None], Sequence[Lowering]]:
        known: dict[Any, list[tuple[str, str]]] = {}  # layers repeat a few products

        def describe(eqn: Any, fused: Fused | None) -> list[Lowering]:
            where = shown_name(_compat.name_stack_names(eqn)) or _compat.source_line(eqn)
            if fused is not None:
                eqn = fused.product
            p = eqn.params
            x, _, leaves = split_operands(eqn.invars, p["x_quantized"])
            stored = jax.tree_util.tree_unflatten(p["tree"], [leaf.aval for leaf in leaves])
            several = eqn.primitive is primitives.quantized_dots_p
            weights = stored if several else [jax.tree.leaves(stored, is_leaf=_is_weight)[0]]
            form = [p.get(name) for name in ("dimension_numbers", "weight_side")]
            form.append(str(p.get("ragged_dot_dimension_numbers")))
            types = [v.aval for v in (x, *leaves, *eqn.outvars)]
            key = (eqn.primitive, *types, p["tree"], p["act"], p["precision"], *form)
            key += (str(fused and fused.epilogue), fused and fused.out)
            if key not in known:
                known[key] = self._told(eqn, fused, x.aval, stored, weights, place)
            where += " or a sibling" * several
            return [
                Lowering(where, (tuple(x.aval.shape), w.shape), *told)
                for w, told in zip(weights, known[key], strict=True)
            ]

        return describe

    def _told(
        self,
        eqn: Any,
        fused: Fused | None,
        x: Any,
        stored: Any,
        weights: Sequence[QTensor],
        place: Place,
    ) -> list[tuple[str, str]]:
        """Implementation and reason for each weight; an error names the user's line."""
        p = eqn.params
        try:
            if eqn.primitive is primitives.quantized_ragged_dot_p:
                w, group_sizes = stored
                params = {**p, "implementation": self.implementation}
                return [primitives.describe_ragged_dot(x, w, group_sizes, params, place=place)]
            products = []
            for w, out in zip(weights, eqn.outvars, strict=True):
                axes = DotAxes.make(p["dimension_numbers"], x.ndim, w.ndim, p["weight_side"])
                sharding = _compat.explicit_sharding(out.aval)
                options = p["act"], out.aval.dtype, p["precision"], sharding
                products.append(Product(x, w, axes, *options))
            if fused is not None:
                return describe_fused(fused, products, place, self.implementation)
            return primitives.describe_products(products, place, self.implementation)
        except ValueError as error:
            error.add_note(f"jaxquant: the product at {_compat.source_line(eqn)}")
            raise


def _is_weight(value: Any) -> bool:
    return isinstance(value, QTensor)
