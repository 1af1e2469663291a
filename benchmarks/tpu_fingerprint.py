"""Which kernel a static figure is of: a hash of what is handed to the TPU compiler.

`benchmarks.tpu_static` writes one beside each program of ours, and takes a program from its file
only while the hash is still that of today's kernel; a test compares what is on record. It is of the
traced program, as jax prints it: the kernel's body, grid, blocks, index maps, scratch and limits,
and what surrounds the call. Names of functions are left out, and there are no source locations in
it, so a kernel keeps its hash when it is renamed or moved. Another jax prints, and lowers,
otherwise: hashes are of one version.
"""

from __future__ import annotations

import hashlib
import importlib
import re

import jax

from benchmarks.tpu_aot import Job

# Names say nothing of what a program does; numpy 1 and 2 print a number differently.
_NAMES = re.compile(r"\b(name|jaxpr)=\w+|\blet \w+ = (?={)")
_NUMPY = re.compile(r"np\.\w+\((-?\w+)\)")


def fingerprint(job: Job) -> str:
    """16 hexadecimal digits of the program that a job compiles, for one device.

    Args:
      job: its maker returns a function that has a Pallas call of its own, not within another jit.

    Raises:
      ValueError: there is no such call.
    """
    module, _, function = job.maker.partition(":")
    fn, avals, *_ = getattr(importlib.import_module(module), function)(**job.arguments)
    traced = jax.make_jaxpr(fn)(*avals)
    calls = [eqn for eqn in traced.eqns if eqn.primitive.name == "pallas_call"]
    if not calls:
        raise ValueError(f"{job.name} has no Pallas call")
    texts = [str(traced)]
    for call in calls:  # which jax leaves out where it prints the blocks of a call
        texts += [str(m.index_map_jaxpr) for m in call.params["grid_mapping"].block_mappings]
        texts += [str(m.pipeline_mode) for m in call.params["grid_mapping"].block_mappings]
    text = _NUMPY.sub(r"\1", _NAMES.sub("", "\n".join(texts)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
