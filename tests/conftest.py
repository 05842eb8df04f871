"""What every test starts from, which tests are fast, and in which order files run."""

import gc
import os
import re

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton, whose own functions are defined then

hypothesis.settings.register_profile("fastlora", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("fastlora")

FAST = (
    r"tests/test_house\.py::(?!test_the_package_type_checks|test_the_wheel)",
    r"tests/kernels/test_(semantic_op|kernel_cache|call_site)\.py",
    r"tests/kernels/.*\[pytorch-.*check_gradcheck\]",
    r"tests/patterns/test_(lora|norm|rotary|mlp|loss)_patterns\.py",
    r"tests/rewriter/test_(view|rulebook|rule_lint|rule_messages|pattern_messages|pattern_defaults|rule_lint_mutations|legality|passes)\.py",
    r"tests/models/test_equal_to_eager\.py::test_float32_step_equals_eager\[llama-train\]",
    r"tests/models/test_explain_and_report\.py::test_(json_and_html|sites_name|the_printed)",
    r"tests/tools/test_(loss_comparison|loss_masking|dataset_reading|output_folder)\.py",
)
"""What to run at every save: `pytest -m fast`, or for one layer `pytest -m fast tests/rewriter`."""

LONGEST = (
    "kernels/test_compiles_for_gpus.py",
    "models/test_equal_to_eager.py",
    "zoo/test_architectures.py",
    "test_house.py",
    "kernels/test_linear_cross_entropy.py",
    "zoo/test_ways.py",
    "models/test_quantized_models.py",
    "tools/test_step_benchmark.py",
    "rewriter/test_interference.py",
    "end_to_end/test_experts.py",
    "tools/test_finetune_cli.py",
    "end_to_end/test_trainers.py",
    "end_to_end/test_changed_modules.py",
    "end_to_end/test_logits_are_tensors.py",
    "kernels/test_linear_cross_entropy_errors.py",
)
"""Files that take more than half a minute. They run first, so that processes side by side end together."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    found = set()
    for item in items:
        for pattern in FAST:
            if re.match(pattern, item.nodeid):
                found.add(pattern)
                item.add_marker("fast")
                break
    if config.args_source is pytest.Config.ArgsSource.TESTPATHS and found != set(FAST):
        raise pytest.UsageError(f"conftest.FAST names no test: {', '.join(set(FAST) - found)}")
    first = {f"tests/{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: first.get(item.nodeid.partition("::")[0], len(first)))


def pytest_collection_finish() -> None:
    """What was imported stays, so nobody has to look through it for garbage, which took a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    """No compiled code of an earlier test, and one thread: the tests run side by side."""
    torch._dynamo.reset()
    torch.set_autocast_enabled("cpu", False)  # tracing that fails inside an autocast region may leave it on
    torch.set_num_threads(1)
