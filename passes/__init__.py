"""F2: passes over jaxprs (installed as jaxquant.passes).

A way through them: `program.trace` makes a program of a function; `find_weights` finds where its
parameters are used; `assign_recipe` decides what becomes of each; `make_plan` says so, with the
lowering that `rewrite` reports. `rewrite` itself needs none of these: what the leaves of a tree are
decides what runs. `observers` adds calibration to a program. Nothing here knows Flax.
"""
