"""Print, as JSON, the kernels that a compiled tiny model is predicted to launch on an H100: {kernel: launches}.

Run it in a separate process: kernels that are defined for Triton's interpreter cannot be recorded.
"""

import json
from collections import Counter

from tiny_models import batch, build

import fastlora
from fastlora.frontend import compile_graph
from fastlora.kernels.core import devices, implementations
from fastlora.kernels.core.execution import run_on_meta
from fastlora.kernels.triton.host import precompile
from fastlora.lower.precompile import loss_call, op_calls

model = build("llama").bfloat16()
head, expected, losses = model.get_output_embeddings(), [], []


def collect_calls(_, gm):
    expected.extend(op_calls(gm))
    losses.append(loss_call(gm, head))


compile_graph._compile_kernels = collect_calls
fastlora.compile(model)
model(**batch(16)).loss.backward()
devices.set_meta_gpu(devices.Gpu((9, 0), 132))
with implementations.for_precompilation(), precompile.recorded() as launches:
    for call in (*expected, next(call for call in losses if call is not None)):
        run_on_meta(call)
assert all(t.device.type != "meta" for t in model.state_dict().values())
print(json.dumps(Counter(each.function.fn.__name__ for each in launches)))
