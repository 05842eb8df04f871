"""Every private API of PyTorch and transformers that fastlora relies on, each under a name of its own.

Nothing else in `rewriter/`, `patterns/` or `kernels/` uses one (`tests/test_house.py` checks that), so a new release
of PyTorch changes this folder alone. What runs in each call is an alias and not a wrapper. Everything exists in torch
2.11, the oldest version supported, and in 2.13; where the two differ, the entry says so.

`compat.probes` holds a probe for each entry, which fails if the API is gone or no longer means the same. The tests run
the probes on every supported version, and `fastlora doctor` runs them on a user's machine.

    autograd   the backward that is running, hooks on saved tensors
    calls      the calls of ops: layouts of tensors, the profiler, CUDA devices and streams, running below autograd
    dispatch   modes, function overrides, tensor subclasses, operators
    launches   launches of Triton's kernels
    modules    the compiled-call slot and the hooks of `nn.Module`, FSDP's state, transformers' configurations
    dynamo     TorchDynamo and Inductor: settings, errors, counters, marks on what is traced
    tracing    fake tensors, symbolic shapes, and the calls that enter and leave modes in a traced graph
"""
