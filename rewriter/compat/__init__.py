"""All private APIs of PyTorch, Triton and transformers that fastlora uses, each under a separate name.

Nothing else in `rewriter/`, `patterns/` or `kernels/` uses private APIs (`tests/test_house.py` checks that), so a new
release of PyTorch only affects this folder. APIs that run in each call are aliases instead of wrappers. Everything
exists in torch 2.11, the oldest supported version, and in 2.13; if the two differ, the docstring says how.

`compat.probes` has a probe for each name, which fails if the API is missing or behaves differently. The tests run the
probes on every supported version, and `fastlora doctor` runs them on a user's machine.

    autograd   the running backward, hooks on saved tensors
    calls      calls of ops: layouts of tensors, the profiler, CUDA devices and streams, running below autograd
    dispatch   modes, function overrides, tensor subclasses, operators
    launches   launches of Triton kernels
    modules    the compiled-call slot and the hooks of `nn.Module`, FSDP's state, transformers' configurations
    dynamo     TorchDynamo and Inductor: settings, errors, counters, metadata of traced graphs
    tracing    fake tensors, symbolic shapes, and the calls that enter and exit modes in a traced graph
"""
