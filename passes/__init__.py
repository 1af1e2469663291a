"""F2: passes over jaxprs (installed as jaxquant.passes).

A way through them: `program.trace` makes a program of a function; `find_weights` finds where its
parameters are used; `assign_recipe` decides what becomes of each; `make_plan` says so, with the
lowering that `rewrite` reports. `rewrite` itself needs none of these: what the leaves of a tree are
decides what runs. `observers` adds calibration to a program. `pass_manager` puts passes in order,
`verify` checks what they make, `dumping` writes it down. Nothing here knows Flax.
"""

from jaxquant.passes.dumping import dump as dump
from jaxquant.passes.pass_manager import Pass as Pass
from jaxquant.passes.pass_manager import PassError as PassError
from jaxquant.passes.pass_manager import PassManager as PassManager
from jaxquant.passes.pass_manager import PassResult as PassResult
from jaxquant.passes.program import Input as Input
from jaxquant.passes.program import Program as Program
from jaxquant.passes.verify import VerificationError as VerificationError
