"""Contents of reports, and that explaining a model does not change it."""

import json
import re
import sys

import pytest
import tiny_models
import torch
from tiny_models import COMMON, batch, build, step

import fastlora
from fastlora.rewrite.pipeline import rewrite


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_explain_reports_what_compile_fuses(family):
    model = build(family)
    explained = fastlora.explain(model, **batch())
    step(fastlora.compile(model), batch())
    compiled = fastlora.report(model)
    assert explained.coverage == compiled.coverage
    assert [(s.op, s.where, s.count) for s in explained.fused] == [(s.op, s.where, s.count) for s in compiled.fused]


def test_explain_changes_neither_model_nor_random_state():
    model = build("llama", dropout=0.1)
    before = torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    fastlora.explain(model, **batch())
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_explaining_a_compiled_model_keeps_it_compiled():
    model = fastlora.compile(build("llama"))
    step(model, batch())
    graphs = fastlora.report(model).graphs
    fastlora.explain(model, **batch())
    assert fastlora.report(model).graphs == graphs


def test_sites_name_the_module_and_the_line_of_the_models_source():
    report = fastlora.explain(build("llama"), **batch())
    norms = [site for site in report.fused if site.op == "rms_norm"]
    assert any(re.fullmatch(r".*layers\.\*\.input_layernorm \(modeling_llama\.py:\d+\)", site.where) for site in norms)
    assert all(re.search(r"norms\.py:\d+", site.rule) for site in norms)
    assert sum(site.count for site in report.fused if site.op == "lora_mlp") == COMMON["num_hidden_layers"]


def test_a_missed_candidate_has_a_reason_and_a_location():
    model = build("llama")
    attention = model.base_model.model.model.layers[0].self_attn
    attention.o_proj.lora_dropout["default"] = torch.nn.Identity()

    class Doubled(torch.nn.Module):
        def forward(self, x):
            activated = torch.nn.functional.silu(x)
            return activated * x.square() + activated

    for layer in model.base_model.model.model.layers:
        layer.mlp.act_fn = Doubled()
    missed = fastlora.explain(model, **batch()).missed
    assert {miss.op for miss in missed} == {"glu"}
    assert all("also used by" in miss.reason and "test_explain_and_report.py:" in miss.where for miss in missed)
    assert sum(miss.count for miss in missed) == COMMON["num_hidden_layers"]


def test_the_printed_report_shows_coverage_and_time():
    text = str(fastlora.explain(build("llama"), **batch()))
    assert re.search(r"matched in \d+\.\d+ s", text)
    assert re.search(r"lora\s+21\s+21", text)


def test_json_and_html_contain_the_whole_report(tmp_path):
    report = fastlora.explain(build("llama"), **batch())
    data = json.loads(report.to_json())
    assert data["coverage"]["lora"] == {"seen": 21, "fused": 21}
    assert len(data["fused"]) == len(report.fused)
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "lora_mlp" in page
    assert "torch.ops.fastlora" in page


def test_reporting_on_an_uncompiled_model_raises():
    with pytest.raises(fastlora.FastLoRAError, match=r"fastlora\.compile\(model\)"):
        fastlora.report(build("llama"))


def test_matching_is_linear_in_the_size_of_the_graph(monkeypatch):
    """Measured in calls of Python functions, independent of the machine's load. Each node takes about 300."""
    rules = fastlora.default_rules()

    def work(layers: int) -> tuple[int, int]:
        """Return the number of nodes of a graph with this many layers, and of calls that rewriting it takes."""
        monkeypatch.setitem(tiny_models.COMMON, "num_hidden_layers", layers)
        graphs, calls = [], [0]

        def capture(gm, inputs):
            graphs.append(gm)
            return gm.forward

        def note(frame, event, argument):
            if event == "call":
                calls[0] += 1

        torch._dynamo.reset()
        torch.compile(build("llama"), backend=capture)(**batch(), use_cache=False)
        nodes = len(graphs[-1].graph.nodes)
        sys.setprofile(note)
        try:
            (result,) = rewrite(graphs[-1], rules)
        finally:
            sys.setprofile(None)
        assert len(result.anchors["lora"]) == layers * 7
        return nodes, calls[0]

    work(2)  # fill caches
    (nodes, calls), (more_nodes, more_calls) = work(2), work(4)
    assert more_calls <= calls * more_nodes / nodes
    assert more_calls - calls <= 600 * (more_nodes - nodes)
