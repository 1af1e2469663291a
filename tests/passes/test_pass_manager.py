"""Order, promises, records and errors of the pass manager; passes of third parties."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import primitives as jp

import jaxquant as jq
from jaxquant.passes import (
    Pass,
    PassError,
    PassManager,
    PassResult,
    VerificationError,
    edit_jaxpr,
)
from jaxquant.passes.pipeline import evaluate
from jaxquant.passes.program import trace


def model(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


P = {"w": jnp.linspace(-1, 1, 32).reshape(4, 8), "v": jnp.linspace(1, -1, 16).reshape(8, 2)}
X = jnp.linspace(0, 1, 12).reshape(3, 4)


def program():
    return trace(model, P, (X,))


@dataclasses.dataclass(frozen=True)
class CountDots(Pass):
    """An analysis: leaves the program alone."""

    name: ClassVar[str] = "count_dots"
    ensures: ClassVar[frozenset[str]] = frozenset({"dots"})

    def run(self, program):
        count = sum(e.primitive is jp.dot_general_p for e in program.jaxpr.jaxpr.eqns)
        return PassResult(program.with_facts(dots=count), (f"{count} dots",))


@dataclasses.dataclass(frozen=True)
class SinForTanh(Pass):
    """Edits equations."""

    primitive: object = jax.extend.core.primitives.sin_p
    name: ClassVar[str] = "sin_for_tanh"
    requires: ClassVar[frozenset[str]] = frozenset({"dots"})

    def run(self, program):
        def change(jaxpr, _):
            eqns = [
                e.replace(primitive=self.primitive, params={"accuracy": None})
                if e.primitive is jp.tanh_p
                else e
                for e in jaxpr.eqns
            ]
            return edit_jaxpr.replace_eqns(
                jaxpr, jaxpr.eqns if all(map(lambda a, b: a is b, eqns, jaxpr.eqns)) else eqns
            )

        return PassResult(program.with_jaxpr(edit_jaxpr.edit(program.jaxpr, change)))


@dataclasses.dataclass(frozen=True)
class Broken(Pass):
    """Does what ``how`` says to a program."""

    how: str
    name: ClassVar[str] = "broken"

    def run(self, program):
        jaxpr = program.jaxpr.jaxpr
        dot = jaxpr.eqns[-1]
        if self.how == "type":
            bad = dot.replace(outvars=[edit_jaxpr.new_var(X.aval)])
            eqns, outs = [*jaxpr.eqns[:-1], bad], bad.outvars
        elif self.how == "scope":
            eqns, outs = jaxpr.eqns[1:], jaxpr.outvars
        elif self.how == "output":
            eqns, outs = jaxpr.eqns, [*jaxpr.outvars, *jaxpr.outvars]
        elif self.how == "raise":
            raise KeyError("what the pass itself found")
        else:
            return program
        changed = jaxpr.replace(eqns=eqns, outvars=outs)
        return PassResult(program.with_jaxpr(edit_jaxpr.ClosedJaxpr(changed, program.jaxpr.consts)))


def test_a_pass_of_somebody_else_changes_the_program_and_is_recorded():
    manager = PassManager([CountDots(), SinForTanh()])
    after = manager.run(program())
    out = evaluate(after, jax.tree.leaves((P, X)))
    np.testing.assert_allclose(out[0], jnp.sin(X @ P["w"]) @ P["v"], rtol=1e-6)
    first, second = manager.records
    assert (first.name, first.changed, first.notes) == ("count_dots", False, ("2 dots",))
    assert (second.name, second.changed, second.equations) == ("sin_for_tanh", True, 3)
    assert first.seconds > 0 and second.seconds > 0


def test_facts_are_dropped_when_the_program_changes():
    after = PassManager([CountDots(), SinForTanh()]).run(program())
    assert "dots" not in after.facts
    unchanged = PassManager([CountDots(), SinForTanh(), CountDots()]).run(program())
    assert unchanged.facts == {"dots": 2}


def test_an_unmet_requirement_says_what_would_meet_it():
    with pytest.raises(PassError, match=r"'sin_for_tanh' \(the first\) requires dots.*put count"):
        PassManager([SinForTanh(), CountDots()]).run(program())


def test_a_broken_promise_is_an_error():
    class Liar(CountDots):
        name: ClassVar[str] = "liar"

        def run(self, program):
            return PassResult(program)

    with pytest.raises(PassError, match="'liar'.*ensures dots"):
        PassManager([Liar()]).run(program())


@pytest.mark.parametrize("verify", ["changed", "all"])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("type", r"ill-typed(.|\n)*dot_general(.|\n)*test_pass_manager.py"),
        ("scope", "read before it is bound(.|\n)*test_pass_manager.py"),
        ("output", "1 outputs became 2"),
    ],
)
def test_a_program_that_a_pass_broke_is_found(how, message, verify):
    manager = PassManager([CountDots(), Broken(how)], verify=verify)
    with pytest.raises(VerificationError, match=message) as caught:
        manager.run(program())
    assert "pass 'broken' (after count_dots)" in str(caught.value)


def test_an_error_of_a_pass_keeps_its_type_and_names_the_pass():
    with pytest.raises(KeyError) as caught:
        PassManager([CountDots(), Broken("raise")]).run(program())
    assert caught.value.__notes__ == ["jaxquant: raised by pass 'broken' (after count_dots)"]


def test_what_is_no_result_or_no_pass_is_refused():
    with pytest.raises(PassError, match="returned Program, not a PassResult"):
        PassManager([Broken("nothing")]).run(program())
    with pytest.raises(TypeError, match="is not a jaxquant.passes.Pass"):
        PassManager([CountDots])
    with pytest.raises(ValueError, match="verify='some' must be one of"):
        PassManager([], verify="some")


def test_the_environment_chooses_what_is_verified(monkeypatch):
    monkeypatch.setenv("JAXQUANT_VERIFY", "yes")
    with pytest.raises(ValueError, match="JAXQUANT_VERIFY='yes' must be 1"):
        PassManager([])


def test_third_party_passes_run_anywhere_in_compile():
    qp = jq.ptq(jq.quantize("w8a16")(model), P, X)
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Look(CountDots):
        def run(self, program):
            seen.append(program.stage)
            return super().run(program)

    def passes(default):
        return [Look(), SinForTanh(), *default, Look()]

    compiled = jq.compile(model, qp, X, passes=passes)
    floats = jax.tree.map(lambda q: q.dequantize(), qp, is_leaf=lambda x: isinstance(x, jq.QTensor))
    expected = jnp.sin(X @ floats["w"]) @ floats["v"]
    np.testing.assert_allclose(compiled(qp, X), expected, rtol=1e-5, atol=1e-6)
    assert seen == ["float", "quantized"]
