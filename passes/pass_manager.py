"""`Pass` and `PassManager`: a named step over a program, and the order of such steps.

A pass is a frozen dataclass whose fields are its options. It says what it requires of a program
and what it ensures; the manager checks both, verifies programs (`verify`), times each pass, writes
dumps (`dumping`), and sees to it that an error names the pass and those before it. Passes of third
parties are passes like ours: put them anywhere in the sequence. See docs/passes.md.
"""

from __future__ import annotations

import abc
import dataclasses
import os
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, get_args

from jaxquant.passes import dumping
from jaxquant.passes.program import Program
from jaxquant.passes.verify import VerificationError, Verifier

Verify = Literal["changed", "all", "off"]


class PassError(ValueError):
    """A pass cannot run where it stands, or broke what it promised."""


@dataclasses.dataclass(frozen=True, eq=False)
class PassResult:
    """What a pass made of a program.

    Attributes:
      program: the program after it; the very same object if there was nothing to do.
      notes: one sentence for each decision, for dumps and plans.
    """

    program: Program
    notes: tuple[str, ...] = ()


class Pass(abc.ABC):
    """One step of a pipeline. Implement as a frozen dataclass; the fields are the options.

    Attributes:
      name: shown in dumps, records and errors.
      requires: what has to be known of the program: a stage ("float", "quantized") or names of
        facts.
      ensures: facts, or the stage, that the program has afterwards.
      retraces: True if the pass makes its equations by tracing. Tracing infers types, so that the
        verifier need not; equations that a pass puts together by hand are always checked. What
        such a pass does to constraints on weights and to their donation is its own business.
      keeps_outputs: False if the pass adds outputs to the program or takes some away.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    retraces: ClassVar[bool] = False
    keeps_outputs: ClassVar[bool] = True

    @abc.abstractmethod
    def run(self, program: Program) -> PassResult:
        """Applies the pass. The program is not changed; a new one is returned, or the same."""


@dataclasses.dataclass(frozen=True)
class Record:
    """What the manager saw of one pass.

    Attributes:
      name: the pass.
      seconds: time of the pass itself.
      verify_seconds: time of the checks after it.
      changed: whether the jaxpr is another one.
      equations: number of equations after it, those of inner jaxprs included.
      notes: what the pass said.
    """

    name: str
    seconds: float
    verify_seconds: float
    changed: bool
    equations: int
    notes: tuple[str, ...]


def default_verify() -> Verify:
    """What to verify: "all" under ``JAXQUANT_VERIFY=1``, else "changed".

    Raises:
      ValueError: the variable has another value than "", "0" or "1".
    """
    value = os.environ.get("JAXQUANT_VERIFY", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"JAXQUANT_VERIFY={value!r} must be 1 (check everything) or 0")
    return "all" if value == "1" else "changed"


class PassManager:
    """Runs passes in order.

    Args:
      passes: the pipeline.
      verify: "all" checks the whole program before the first pass and after each; "changed" checks
        the equations that a pass put together and what must survive it; "off" checks nothing. When
        None, what the environment says (see `default_verify`).
      title: names the run in dumps.

    Attributes:
      records: a `Record` for each pass of the last run.
    """

    def __init__(
        self, passes: Sequence[Pass], *, verify: Verify | None = None, title: str = "program"
    ) -> None:
        verify = default_verify() if verify is None else verify
        if verify not in get_args(Verify):
            raise ValueError(f"verify={verify!r} must be one of {list(get_args(Verify))}")
        for step in passes:
            if not isinstance(step, Pass):
                raise TypeError(f"passes: {step!r} is not a jaxquant.passes.Pass")
        self.passes = tuple(passes)
        self.records: tuple[Record, ...] = ()
        self._verify, self._title = verify, title

    def run(self, program: Program) -> Program:
        """The program after all passes.

        Raises:
          PassError: what a pass requires is missing, or it broke its promise.
          VerificationError: a program is ill-formed, or lost what must survive.
        """
        dump = dumping.start(self._title, program)
        verifier = Verifier(full=self._verify == "all")
        records: list[Record] = []
        self.records = ()
        if self._verify == "all":
            self._check(verifier, program, None, "the program given to the pass manager")
        for number, step in enumerate(self.passes):
            where = self._where(number)
            self._require(step, program, where)
            start = time.perf_counter()
            try:
                result = step.run(program)
            except Exception as error:
                error.add_note(f"jaxquant: raised by {where}")
                raise
            seconds = time.perf_counter() - start
            if not isinstance(result, PassResult):
                raise PassError(f"{where} returned {type(result).__name__}, not a PassResult")
            after = result.program
            changed = after.jaxpr is not program.jaxpr
            self._promised(step, after, where)
            start = time.perf_counter()
            if changed and self._verify != "off":
                self._check(verifier, after, (program, step), where)
            verify_seconds = time.perf_counter() - start
            records.append(
                Record(
                    step.name, seconds, verify_seconds, changed,
                    verifier.equations(after.jaxpr), result.notes,
                )
            )  # fmt: skip
            self.records = tuple(records)
            if dump is not None:
                dump.write(step, after, records[-1])
            program = after
        return program

    def _where(self, number: int) -> str:
        before = ", ".join(step.name for step in self.passes[:number])
        name = self.passes[number].name
        return f"pass {name!r} (after {before})" if before else f"pass {name!r} (the first)"

    def _require(self, step: Pass, program: Program, where: str) -> None:
        missing = sorted(step.requires - _known(program))
        if not missing:
            return
        helpers = [p.name for p in self.passes if p.ensures & set(missing)]
        hint = f"; put {' or '.join(helpers)} before it" if helpers else ""
        raise PassError(
            f"{where} requires {', '.join(missing)}, but the program is in stage "
            f"{program.stage!r} with facts {sorted(program.facts)}{hint}"
        )

    @staticmethod
    def _promised(step: Pass, program: Program, where: str) -> None:
        broken = sorted(step.ensures - _known(program))
        if broken:
            raise PassError(f"{where} ensures {', '.join(broken)}, but its result lacks it")

    @staticmethod
    def _check(
        verifier: Verifier, program: Program, change: tuple[Program, Any] | None, where: str
    ) -> None:
        try:
            verifier.check(program)
            if change is not None:
                before, step = change
                verifier.check_change(
                    before, program, outputs=step.keeps_outputs, retraced=step.retraces
                )
        except VerificationError as error:
            raise VerificationError(f"{where}: {error}") from error


def _known(program: Program) -> set[str]:
    return {program.stage, *program.facts}
