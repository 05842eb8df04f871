"""Prints, as JSON, the kernels that a compiled tiny model is expected to launch on an H100: {kernel: launches}.

Runs in a process of its own, as kernels that are defined for Triton's interpreter cannot be recorded.
"""

import json
from collections import Counter

from tiny_models import batch, build

import fastlora
from fastlora.foresight import calls, loss_call
from fastlora.kernels import forms
from fastlora.kernels.gpu import ahead, launch

model = build("llama").bfloat16()
fastlora.compile(model)
model(**batch(16)).loss.backward()
launch.take_for(launch.Gpu((9, 0), 132))
graphs = model._compiled_call_impl.session.graphs
head = model.get_output_embeddings()
with forms.rehearsed(), ahead.recorded() as launches:
    for graph in graphs:
        for call in calls(graph.gm, graph.rewrites):
            call.op.rehearse(call.values, call.needs)
    losses = [call for graph in graphs if (call := loss_call(graph.gm, head)) is not None]
    losses[0].op.rehearse(losses[0].values, losses[0].needs)
assert all(t.device.type != "meta" for t in model.state_dict().values())
print(json.dumps(Counter(each.function.fn.__name__ for each in launches)))
