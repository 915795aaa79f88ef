"""`explain`, reports, and what they can be saved as."""

import inspect
import json
import logging
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import networkx as nx
import pytest
import torch
from small_models import CONFIG, FIELDS, Block, Model, inputs, passes_only
from torch import nn

import lighthouse_fx
from lighthouse_fx.passes import pass_log


@pytest.fixture
def report():
    return lighthouse_fx.explain(Model(3), inputs(), config=CONFIG)


def test_records(report):
    assert len(report.calls) == report.rewritten == 3
    call = report.calls[1]
    assert call.module == "layers.1.attn"
    assert Path(call.source.rpartition(":")[0]).name == "small_models.py"
    assert call.query == (2, 4, 64, 8) and call.key == call.value == (2, 2, 64, 8)
    assert (call.dtype, call.is_causal, call.length, call.gathered) == ("float32", True, 64, 48)
    assert call.flops_share == pytest.approx((48 / 64) ** 2)


def test_nothing_is_computed_or_changed():
    model, x = Model(2), inputs()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    random = torch.get_rng_state()
    out = []
    lighthouse_fx.explain(lambda x: out.append(model(x)), x, config=CONFIG)
    assert torch.equal(out[0], torch.zeros_like(x))  # a placeholder: no parameter was used
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.isnan().all() and p.grad is None for p in model.parameters())


def test_explaining_leaves_no_trace_in_later_compilation():
    model, x = Model(1), inputs()
    kept = len(lighthouse_fx.reports())
    for _ in range(12):  # more than Dynamo's recompile limit
        assert lighthouse_fx.explain(model, x, config=CONFIG).rewritten == 1
    assert len(lighthouse_fx.reports()) == kept
    torch.compile(model, backend=passes_only, options=FIELDS)(x)
    assert len(lighthouse_fx.reports()) == kept + 1


def test_a_compiled_model_can_be_explained():
    model = torch.compile(Model(2), backend=passes_only, options=FIELDS)
    report = lighthouse_fx.explain(model, inputs(), config=CONFIG)
    assert [call.module for call in report.calls] == ["layers.0.attn", "layers.1.attn"]


def test_options_of_a_compiled_model_are_found():
    for compiled in (
        torch.compile(Model(2), backend="lighthouse", options={**FIELDS, "dense_layers": (0,), "max_autotune": True}),
        torch.compile(Model(2).forward, backend="lighthouse", options={**FIELDS, "dense_layers": (0,)}),
    ):
        report = lighthouse_fx.explain(compiled, inputs())
        assert [call.rewritten for call in report.calls] == [False, True] and not report.notes
    assert report.title == "forward"
    assert lighthouse_fx.explain(compiled, inputs(), config=CONFIG).rewritten == 2


def test_dynamic_shapes_of_a_compiled_model_are_kept():
    compiled = torch.compile(Model(1), backend="lighthouse", options=FIELDS, dynamic=True)
    report = lighthouse_fx.explain(compiled, inputs())
    query = report.calls[0].query
    assert isinstance(query[2], str) and query[1] == 4
    assert f"[{query[0]}, 4, {query[2]}, 8]" in str(report)  # brackets are markup to rich


def test_options_of_compiled_blocks_are_found():
    model = Model(3)
    model.layers[0].compile(backend="inductor")
    model.layers[1].compile(backend="lighthouse", options=FIELDS)
    report = lighthouse_fx.explain(nn.Sequential(model), inputs())  # below a wrapper, such as DDP
    assert [call.rewritten for call in report.calls] == [False, True, False]
    assert report.calls[0].reason == "compiled with backend='inductor'"
    assert report.calls[2].reason == "not compiled, while other modules are"


def test_blocks_that_differ_are_noted():
    model = Model(2)
    for topk, block in zip((8, 4), model.layers, strict=True):
        block.compile(backend="lighthouse", options={**FIELDS, "topk": topk})
    report = lighthouse_fx.explain(model, inputs())
    assert "2 different sets of options" in report.notes[0] and report.notes[0] in " ".join(str(report).split())
    assert lighthouse_fx.explain(model.layers[1], inputs()).calls[0].gathered == 32

    for block in model.layers:
        block.compile(backend="lighthouse", options={**FIELDS, "dense_layers": (0,)})
    assert "do not know their place" in lighthouse_fx.explain(model, inputs()).notes[0]


def test_another_backend_is_noted(tmp_path):
    report = lighthouse_fx.explain(torch.compile(Model(1), backend="aot_eager"), inputs())
    (note,) = report.notes
    assert "backend='aot_eager'" in note and report.title == "Model" and report.to_dict()["notes"] == [note]
    assert "aot_eager" in report.save(tmp_path / "x.html").read_text()
    assert lighthouse_fx.explain(Model(1), inputs()).notes == ()


class InPlace(nn.Module):
    """Writes to what a graph returned, in the next graph or in eager code."""

    def __init__(self, eager):
        super().__init__()
        self.first, self.second, self.eager = Block(), Block(), eager

    def forward(self, x):
        x = self.first(x)
        if self.eager:
            return self.second(add_one(x))
        torch._dynamo.graph_break()
        x += 1
        return self.second(x.mul_(2))


@torch._dynamo.disable
def add_one(x):
    x += 1
    assert x.requires_grad and not x.is_leaf and bool((x == 1).all())
    return x


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("tokens", [64, 16384])  # the larger one is of lazily committed memory
def test_in_place_ops_after_a_graph_break(eager, tokens):
    report = lighthouse_fx.explain(InPlace(eager), inputs(tokens=tokens), config=CONFIG)
    assert report.rewritten == len(report.graphs) == 2


def test_outputs_larger_than_memory():
    with torch.device("meta"):
        weight = torch.ones(1, 1)
    x = torch.ones(1, 1)
    shape = (2**22, 2**22)  # 64 TiB
    lighthouse_fx.explain(lambda x: x.expand(shape) + 1, x)
    assert lighthouse_fx.explain(lambda x: x.expand(shape) + 1, weight).graphs


class Stateful(Model):
    def __init__(self):
        super().__init__(1)
        self.count, self.seen = 0, []
        self.register_buffer("kept", torch.ones(1))

    def forward(self, x):
        self.count += 1
        self.seen.append(self.count)
        self.fresh = x * 2
        self.kept = x.sum()
        return super().forward(x)


def test_attributes_are_put_back():
    model = Stateful()
    kept = model.kept
    for called in (model, lambda x: model(x)):
        lighthouse_fx.explain(called, inputs(), config=CONFIG)
        assert (model.count, model.seen, hasattr(model, "fresh")) == (0, [], False)
        assert model.kept is kept


def test_every_explanation_is_a_first_one():
    """At many lengths, with a graph break, too; and a real compile after them is as static as ever.

    Where torch.compile takes no limit of its own, as before torch 2.12, the graph break uses Dynamo's up: the report says so.
    """

    class Broken(Model):
        def forward(self, x):
            x = super().forward(x)
            torch._dynamo.graph_break()
            return super().forward(x)

    limited = "recompile_limit" not in inspect.signature(torch.compile).parameters
    limit = torch._dynamo.config.recompile_limit if limited else 1000
    for model, graphs in ((Model(1), 1), (Broken(1), 2)):
        for tokens in range(64, 76):
            report = lighthouse_fx.explain(model, inputs(tokens=tokens), config=CONFIG)
            if graphs > 1 and tokens >= 64 + limit:
                assert not report.calls and "torch._dynamo.reset()" in report.notes[0]
                continue
            assert [call.query for call in report.calls] == [(2, 4, tokens, 8)] * graphs
    kept = len(lighthouse_fx.reports())
    torch.compile(Model(1), backend=passes_only, options=FIELDS)(inputs(tokens=96))
    assert [call.length for graph in lighthouse_fx.reports()[kept:] for call in graph.calls] == [96]


def test_ops_tell_what_serves_them(report):
    assert {call.ops for call in report.calls} == {"plain PyTorch"}
    assert "plain PyTorch" in str(report) and report.to_dict()["calls"][0]["ops"] == "plain PyTorch"
    dense = lighthouse_fx.explain(Model(1), inputs(tokens=9), config=CONFIG)
    assert dense.calls[0].ops == "" and "ops" not in dense.table().columns[-2].header


@pytest.mark.gpu
def test_ops_on_a_gpu():
    report = lighthouse_fx.explain(Model(1).cuda(), inputs().cuda(), config=CONFIG)
    assert report.calls[0].ops == "Triton"


def test_nothing_found_is_said(tmp_path):
    report = lighthouse_fx.explain(nn.Linear(32, 32), inputs())
    assert "no attention call was found" in str(report) and report.table().row_count == 1
    assert "no attention call was found" in report.save(tmp_path / "x.html").read_text()
    assert "nothing was traced" in str(lighthouse_fx.explain(lambda x: x, inputs()))


def test_reasons_follow_the_state_of_the_model():
    model, x = Model(1), inputs()
    with torch.no_grad():
        assert "no_grad" in lighthouse_fx.explain(model, x, config=CONFIG).calls[0].reason
    with lighthouse_fx.dense():
        assert "dense stage" in lighthouse_fx.explain(model, x, config=CONFIG).calls[0].reason
    assert "eval" in lighthouse_fx.explain(model.eval(), x, config=CONFIG).calls[0].reason


def test_graph_breaks_make_several_graphs():
    def function(model, x):
        x = model(x)
        torch._dynamo.graph_break()
        return model(x).sum()

    report = lighthouse_fx.explain(function, Model(1), inputs(), config=CONFIG)
    assert len(report.graphs) == 2 and report.rewritten == 2


def test_meta_model_is_enough():
    with torch.device("meta"):
        model, x = Model(2), torch.empty(1, 131072, 32)
    report = lighthouse_fx.explain(model, x)
    assert [call.gathered for call in report.calls] == [131072 * 3 // 4] * 2


def test_graphs_before_and_after(report):
    (graph,) = report.graphs
    for side in (graph.before, graph.after):
        assert isinstance(side, nx.DiGraph) and nx.is_directed_acyclic_graph(side)
        attributes = {"op", "target", "module", "shape", "kind", "order", "call"}
        assert all(attributes <= data.keys() for _, data in side.nodes(data=True))

    def count(side, target):
        return sum(data["target"] == target for _, data in side.nodes(data=True))

    assert count(graph.before, "scaled_dot_product_attention") == count(graph.after, "scaled_dot_product_attention") == 3
    assert [count(graph.after, f"lighthouse_fx.{name}") for name in ("select", "gather", "scatter")] == [3, 9, 3]
    assert not any(data["kind"] == "lighthouse" for _, data in graph.before.nodes(data=True))
    assert sorted(data["call"] for _, data in graph.before.nodes(data=True) if data["kind"] == "attention") == [0, 1, 2]
    (scatter,) = [n for n, d in graph.after.nodes(data=True) if d["target"] == "lighthouse_fx.scatter" and d["call"] == 1]
    assert any(nx.has_path(graph.after, n, scatter) for n, d in graph.after.nodes(data=True) if d["kind"] == "input")


def test_checkpointed_graphs_are_joined():
    report = lighthouse_fx.explain(Model(2, checkpointing="inside"), inputs(), config=CONFIG)
    assert report.rewritten == 2
    before, after = report.graphs[0].before, report.graphs[0].after
    assert sorted(d["call"] for _, d in before.nodes(data=True) if d["kind"] == "attention") == [0, 1]
    scatters = [n for n, d in after.nodes(data=True) if d["target"] == "lighthouse_fx.scatter"]
    assert len(scatters) == 2
    assert all(any(nx.has_path(after, n, s) for n, d in after.nodes(data=True) if d["kind"] == "input") for s in scatters)


def test_table(report):
    text = str(report)
    for words in ("layers.1.attn", "small_models.py", "3 of 3", "48", "56.2%", "yes"):
        assert words in text


def test_table_shows_reasons_and_remedies():
    text = str(lighthouse_fx.explain(Model(1), inputs(tokens=9), config=CONFIG))
    text = " ".join(text.replace("│", " ").split())
    assert "worth" in text and "topk" in text


def test_files(report, tmp_path):
    svg = report.save(tmp_path / "deep" / "graph.svg")
    ET.parse(svg)
    page = report.save(tmp_path / "graph.html").read_text()
    assert "layers.1.attn" in page and "<svg" in page and "http-equiv" not in page
    data = json.loads(report.save(tmp_path / "graph.json").read_text())
    assert data["rewritten"] == 3 and data["calls"][0]["gathered"] == 48
    assert nx.node_link_graph(data["graphs"][0]["after"], edges="edges").number_of_nodes() > 10


def test_the_picture_says_which_graph_and_why(tmp_path):
    def function(model, x):
        x = model(x)
        torch._dynamo.graph_break()
        return model(x)

    config = lighthouse_fx.LighthouseConfig(**FIELDS, dense_layers=(0,))
    report = lighthouse_fx.explain(function, Model(3), inputs(), config=config)
    shown = ["".join(element.itertext()) for element in ET.parse(report.save(tmp_path / "x.svg")).iter()]
    assert "function, graph 1 of 2" in shown
    assert "2 of 3 attention calls rewritten · left dense: layer excluded" in shown  # counted once


def test_bad_suffix(report, tmp_path):
    with pytest.raises(ValueError, match=r"\.png.*\.svg, \.html, \.json"):
        report.save(tmp_path / "graph.png")


def test_nothing_traced_has_nothing_to_save(tmp_path):
    with pytest.raises(ValueError, match="no graph"):
        lighthouse_fx.Report(graphs=()).save(tmp_path / "x.svg")


def test_one_log_line_per_graph(caplog):
    with caplog.at_level(logging.INFO, logger="lighthouse_fx"):
        torch.compile(Model(2), backend=passes_only, options={**FIELDS, "dense_layers": (0,)})(inputs())
    (line,) = [record.getMessage() for record in caplog.records if record.name == "lighthouse_fx"]
    assert line.startswith("1 of 2 attention calls rewritten") and "layers.0.attn: layer excluded" in line


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from small_models import *
torch.compile(Model(1), backend="lighthouse", options=FIELDS)(inputs()).sum().backward()
import lighthouse_fx
print(lighthouse_fx.reports()[-1].summary())
"""


def test_logs_artifacts_and_reports_with_a_warm_cache(tmp_path):
    """TORCH_LOGS shows the line, TORCH_TRACE has both graphs, and a warm cache changes neither nor the report."""
    import os

    for run in range(2):
        trace = tmp_path / f"trace{run}"
        environment = {
            **os.environ,
            "TORCH_LOGS": "+lighthouse_fx",
            "TORCH_TRACE": str(trace),
        }
        script = SCRIPT.format(tests=str(Path(__file__).parents[2] / "support"))
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
        assert "1 of 1 attention calls rewritten" in done.stdout
        assert "1 of 1 attention calls rewritten" in done.stderr
        text = "".join(path.read_text() for path in trace.iterdir())
        assert "lighthouse_before_passes" in text and "lighthouse_after_passes" in text
        assert "lighthouse_fx.scatter" in text
        passes = ["lighthouse_pass_00_before", "lighthouse_pass_13_rewrite_attention"]  # the others change no operation here
        assert re.findall(r'"name": "(lighthouse_pass_\w+)"', text) == passes
        (line,) = re.findall(r"rewrite_attention: (.*)", done.stderr)
        assert "+3 lighthouse_fx.gather.default" in line and "1 attention calls, 1 not refused" in line
        assert "find_attention: no operation changed; 1 attention calls" in done.stderr
        assert done.stderr.count("def forward") == 2 and "graph after rewrite_attention" in done.stderr


def test_passes_are_not_watched_where_nobody_looks(monkeypatch):
    monkeypatch.setattr(pass_log, "trace_log", logging.Logger("quiet"))  # pytest itself listens to PyTorch's
    monkeypatch.setattr(pass_log, "_count", None)  # counting would fail
    assert "1 of 1" in lighthouse_fx.explain(Model(1), inputs(), config=CONFIG).graphs[0].summary()
