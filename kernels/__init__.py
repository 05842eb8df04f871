"""Semantic ops: a name for a computation, its formula, its hand-derived backward and, in time, its kernels.

Nothing here knows of graphs or models. `core` is what all ops share; `formulas` has one file per op, with its formula,
backward and PyTorch implementation; `triton` has the kernels; `ops` lists the ops.
"""

if __name__ == "kernels":  # the checkout is on sys.path: hand over to the PyPI package of that name
    import os as _os
    import sys as _sys
    from importlib.machinery import PathFinder as _PathFinder
    from importlib.util import module_from_spec as _module_from_spec

    _root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
    _spec = _PathFinder.find_spec("kernels", [p for p in _sys.path if _os.path.abspath(p or ".") != _root])
    if _spec is not None and _spec.loader is not None:
        _module = _sys.modules["kernels"] = _module_from_spec(_spec)
        _spec.loader.exec_module(_module)
else:
    from fastlora.kernels.core.library import register_op as register_op
