"""Every private API that fastlora uses exists and behaves as expected."""

from importlib import import_module

import pytest
import torch
import transformers  # noqa: F401  (the probes look at what is loaded)

from fastlora.compat.probes import run
from fastlora.compat.probes.probe import ChangedError, expect

PROBES = [(area, name) for area in run.AREAS for name in run.probes(area)]


@pytest.mark.parametrize(("area", "name"), PROBES, ids=[f"{area}.{name}" for area, name in PROBES])
def test_a_private_api_behaves_as_expected(area, name):
    assert run.failure(run.probes(area)[name]) is None


@pytest.mark.parametrize("area", run.AREAS)
def test_each_private_api_has_a_probe(area):
    module = import_module(f"fastlora.compat.{area}")
    assert sorted(run.probes(area)) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)


def test_a_change_is_reported_in_a_line(monkeypatch):
    monkeypatch.setattr("fastlora.compat.autograd.graph_task_id", lambda: 0)
    assert run.failures() == [
        "fastlora.compat.autograd (graph_task_id, NO_BACKWARD): "
        "ChangedError: expected that no backward is running by default"
    ]


def test_a_missing_api_is_reported_in_a_line(monkeypatch):
    def probes(area: str) -> None:
        raise AttributeError("module 'torch._C' has no attribute '_current_graph_task_id'")

    monkeypatch.setattr(run, "probes", probes)
    assert run.failures()[0] == (
        "fastlora.compat.autograd cannot be imported: AttributeError: "
        "module 'torch._C' has no attribute '_current_graph_task_id'"
    )


def test_probes_print_nothing_and_leave_no_state(capfd):
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    assert run.failures() == []
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() is grad
    assert capfd.readouterr() == ("", "")


def test_a_failed_expectation_states_the_expectation():
    with pytest.raises(ChangedError, match="expected that one is two"):
        expect(1 == 2, "one is two")
