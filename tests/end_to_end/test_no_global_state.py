"""Importing fastlora and compiling a model change no attribute of other libraries."""

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import importlib, inspect, os, pickle, sys, types
sys.path.insert(0, {tests!r})
import torch, transformers, peft, accelerate
import torch._dynamo, torch._inductor.compile_fx, torch.utils.checkpoint, torch.library
from tiny_models import batch, build, step

model, twin = build("llama"), build("llama")
step(torch.compile(twin, backend="eager"), batch())  # TorchDynamo itself imports and sets attributes
step(twin, batch())
LIBRARIES = ("torch", "transformers", "peft", "accelerate")


def modules():
    return [m for n, m in list(sys.modules.items()) if n.split(".")[0] in LIBRARIES and isinstance(m, types.ModuleType)]


def snapshot(known):
    found = {{}}
    for module in known:
        for name, value in vars(module).items():
            if inspect.isroutine(value) or inspect.isclass(value):
                found[module.__name__, name] = id(value)
            if inspect.isclass(value) and value.__module__.split(".")[0] in LIBRARIES:
                for key, member in vars(value).items():
                    if inspect.isroutine(member) or isinstance(member, (property, staticmethod, classmethod)):
                        found[module.__name__, name, key] = id(member)
    return found


known = modules()
before = snapshot(known)
folder, environment = set(os.listdir(".")), dict(os.environ)
config = torch._dynamo.config.save_config_portable() if hasattr(torch._dynamo.config, "save_config_portable") else None
import fastlora
fastlora.compile(model)
step(model, batch())
fastlora.report(model)
after = snapshot(known)
changed = [key for key in before if after.get(key) != before[key]] + [key for key in after if key not in before]
# TorchDynamo itself, with any backend, puts the entry points of compiled code into the globals of the traced function.
changed = [key for key in changed if not key[1].startswith(("__compiled_fn_", "__resume_at_"))]
assert not changed, changed[:20]
assert set(os.listdir(".")) == folder
assert dict(os.environ) == environment
if config is not None:
    assert torch._dynamo.config.save_config_portable() == config
"""


def test_importing_and_compiling_change_no_global_state(tmp_path):
    tests = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", PROGRAM.format(tests=tests)], check=True, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []
