"""The drawings: well-formed, self-contained, nothing lost in folding, same input same bytes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import networkx as nx
import pytest

from lighthouse_fx.report import picture, picture_layout

SVG = "{http://www.w3.org/2000/svg}"
HIDDEN, HEADS, SHORT = "[1, 4096, 2048]", "[1, 32, 4096, 64]", "[1, 32, 1792, 64]"


class Model:
    """Builds the graph of a Llama-like model, node by node in traced order."""

    def __init__(self, layers, rewritten=(), *, path="model.layers.{}", attention="self_attn", strange=False):
        self.graph = nx.DiGraph()
        self.strange = strange
        self.path, self.attention = path, attention
        self.input("tokens")
        x = self.op("embedding", "model.embed_tokens", HIDDEN, "tokens", self.input("w_embed"))
        cos = self.op("cos", "model.rotary_emb", "[1, 4096, 64]", "tokens")
        for layer in range(layers):
            x = self.layer(layer, x, cos, layer in rewritten)
        x = self.op("rms_norm", "model.norm", HIDDEN, x, self.input("w_norm"))
        x = self.op("linear", "lm_head", "[1, 4096, 32000]", x, self.input("w_head"))
        self.add("output", "output", "output", "", "", "other", -1, x)

    def add(self, name, op, target, module, shape, kind, call, *preds):
        self.graph.add_node(
            name, op=op, target=target, module=module, shape=shape, kind=kind, order=len(self.graph), call=call
        )
        self.graph.add_edges_from((pred, name) for pred in preds)
        return name

    def input(self, name):
        return self.add(name, "placeholder", name, "", "[2048]", "input", -1)

    def op(self, target, module, shape, *preds, kind="other", call=-1):
        name = f"{target.rpartition('.')[2]}_{len(self.graph)}" + ("<&\"'" if self.strange else "")
        return self.add(name, "call_function", target, module, shape, kind, call, *preds)

    def layer(self, n, x, cos, rewritten):
        here = self.path.format(n)
        attn = ".".join(piece for piece in (here, self.attention) if piece)
        inner = (lambda child: ".".join(piece for piece in (here, child) if piece)) if here else (lambda child: "")
        attn = attn if here else ""
        h = self.op("rms_norm", inner("input_layernorm"), HIDDEN, x, self.input(f"w_in{n}"))
        qkv = []
        for letter in "qkv":
            y = self.op("linear", attn, HIDDEN, h, self.input(f"w_{letter}{n}"))
            y = self.op("transpose", attn, HEADS, y)
            if letter != "v":
                y = self.op("mul", attn, HEADS, y, cos)
            qkv.append(y)
        if rewritten:
            o = self.rewrite(n, attn, *qkv)
        else:
            o = self.op("scaled_dot_product_attention", attn, HEADS, *qkv, kind="attention", call=n)
        o = self.op("linear", attn, HIDDEN, self.op("reshape", attn, HIDDEN, o), self.input(f"w_o{n}"))
        x = self.op("add", here, HIDDEN, x, o)
        h = self.op("rms_norm", inner("post_attention_layernorm"), HIDDEN, x, self.input(f"w_post{n}"))
        gate = self.op("silu", inner("mlp"), "[1, 4096, 8192]", self.op("linear", inner("mlp"), "[1, 4096, 8192]", h))
        up = self.op("linear", inner("mlp"), "[1, 4096, 8192]", h)
        return self.op("add", here, HIDDEN, x, self.op("mul", inner("mlp"), HIDDEN, gate, up))

    def rewrite(self, n, attn, q, k, v):
        def ours(target, shape, *preds):
            return self.op(target, attn, shape, *preds, kind="lighthouse", call=n)

        chosen = ours("lighthouse_fx.select", "", q, k, v)
        entries, slots = ours("getitem", "[1, 32, 1792]", chosen), ours("getitem", "[1, 32, 5376]", chosen)
        short = [ours("lighthouse_fx.gather", SHORT, x, entries, slots) for x in (q, k, v)]
        o = ours("scaled_dot_product_attention", SHORT, *short)
        return ours("lighthouse_fx.scatter", HEADS, o, entries, slots)


def graphs(layers, rewritten=(), **options):
    return Model(layers, **options).graph, Model(layers, rewritten, **options).graph


def texts(svg):
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(SVG + "text")]


def calls_of(svg, style):
    found = set()
    for group in ET.fromstring(svg).iter(SVG + "g"):
        if group.get("class") == style and group.get("data-calls"):
            for piece in group.get("data-calls").split():
                first, _, last = piece.partition("-")
                found |= set(range(int(first), int(last or first) + 1))
    return found


def function(rewritten):
    """Attention fed by the inputs themselves, as when a plain function is compiled."""
    model = Model(0)
    model.graph = nx.DiGraph()
    q, k, v = (model.input(name) for name in "qkv")
    if rewritten:
        o = model.rewrite(0, "", q, k, v)
    else:
        o = model.op("scaled_dot_product_attention", "", HEADS, q, k, v, kind="attention", call=0)
    model.add("output", "output", "output", "", "", "other", -1, o)
    return model.graph


CASES = {
    "function": (function(False), function(True)),
    "one": graphs(1, {0}),
    "one_dense": graphs(1),
    "thirty": graphs(30, range(2, 28)),
    "thirty_dense": graphs(30),
    "alternating": graphs(24, range(0, 24, 2)),
    "bare": graphs(6, range(1, 6), path=""),
    "one_bare": graphs(1, {0}, path=""),
    "strange": graphs(4, {1, 2}, path="a<b>&c.{}", strange=True),
    "no_attention": (nx.DiGraph([("a", "b")]), nx.DiGraph([("a", "b")])),
    "empty": (nx.DiGraph(), nx.DiGraph()),
}
case = pytest.mark.parametrize("name", CASES)


@case
def test_self_contained_and_small(name):
    svg = picture.draw(*CASES[name], title="a <b> & 'c'", subtitle='"q" & <r>')
    ET.fromstring(svg)
    assert len(svg.encode()) < 300_000
    urls = re.findall(r"(?:https?:|url\(|href|src=|@import|<script|<image)[^\"\s]*", svg)
    assert all(url.startswith("url(#") or url == "http://www.w3.org/2000/svg" for url in urls)
    assert "a <b> & 'c'" in texts(svg)
    assert "@ID@" not in svg and not re.search(r'="-?(nan|inf)', svg)


@case
def test_no_node_is_lost(name):
    """Drawn ops times repeats, cores and ends make up the whole graph."""
    for graph in CASES[name]:
        names = picture_layout.block_names([graph])
        nodes = [node for part in picture_layout.parts(graph, names) for node in part.nodes]
        ends = [node for node, data in graph.nodes(data=True) if picture_layout.edge_node(data)]
        assert sorted(nodes + ends) == sorted(graph)


@case
def test_every_call_is_drawn(name):
    before, after = CASES[name]
    svg = picture.draw(before, after, title="t")
    rewritten = picture_layout.rewritten(after)
    calls = picture_layout.all_calls(before)
    assert calls_of(svg, "rewrite") | calls_of(svg, "ours") == rewritten
    assert calls_of(svg, "dense") == calls  # each is dense on the left
    if calls:
        assert any(text.startswith(f"{len(rewritten)} of {len(calls)} attention call") for text in texts(svg))


@case
def test_nothing_is_cut_off(name):
    root = ET.fromstring(picture.draw(*CASES[name], title="title", subtitle="word " * 80))
    width, height = float(root.get("width")), float(root.get("height"))
    for rect in root.iter(SVG + "rect"):
        assert float(rect.get("x", 0)) + float(rect.get("width")) <= width
        assert float(rect.get("y", 0)) + float(rect.get("height")) <= height
    boxes = {
        tuple(float(rect.get(key)) for key in ("x", "y", "width", "height"))
        for group in root.iter(SVG + "g")
        for rect in group.findall(SVG + "rect")
    }
    ordered = sorted(boxes)
    for i, (x, y, w, h) in enumerate(ordered):
        for u, v, s, t in ordered[i + 1 :]:
            assert x + w <= u or u + s <= x or y + h <= v or v + t <= y, "boxes overlap"


def test_equal_layers_fold():
    rows = picture_layout.rows(*CASES["thirty"])
    blocks = [row for row in rows if row.block]
    assert [len(row.members) for row in blocks] == [2, 26, 2]
    assert blocks[1].names == tuple(f"model.layers.{n}" for n in range(2, 28))
    assert rows[blocks[2].same_as] is blocks[0] and blocks[1].same_as is None
    shown = texts(picture.draw(*CASES["thirty"], title="t"))
    assert {"× 26", "× 2", "layers 2–27", "layers 0–1", "layers 28–29", "26 rewritten", "2 left dense"} <= set(shown)
    inputs = sum(data["kind"] == "input" for _, data in CASES["thirty"][0].nodes(data=True))
    assert shown.count(f"{inputs} inputs & parameters") == 2


def test_a_run_names_its_modules_and_counts_its_ops():
    shown = texts(picture.draw(*CASES["one"], title="t"))
    assert "input_layernorm, self_attn" in shown
    assert any(text.startswith("9 ops") and HEADS in text for text in shown)
    for label in ("select", "gather q", "gather k", "gather v", "scaled_dot_product_attention", "scatter"):
        assert label in shown


def test_folding_without_module_paths():
    blocks = [row for row in picture_layout.rows(*CASES["bare"]) if row.block]
    assert sum(len(row.members) for row in blocks) == 6
    assert max(len(row.members) for row in blocks) == 5
    assert "calls 1–5" in texts(picture.draw(*CASES["bare"], title="t"))


def test_shared_module_inside_a_block_stays_in_it():
    graph = Model(3).graph
    for _, data in graph.nodes(data=True):
        if data["target"] == "mul" and data["shape"] == HEADS:
            data["module"] = "model.rotary_emb"
    blocks = [row for row in picture_layout.rows(graph, graph) if row.block]
    assert [len(row.members) for row in blocks] == [3]


def test_two_calls_in_one_block():
    before, after = graphs(6, range(6))
    for graph in (before, after):
        for _, data in graph.nodes(data=True):
            found = re.match(r"model\.layers\.(\d+)(.*)", data["module"])
            if found:
                data["module"] = f"decoder.layers.{int(found[1]) // 2}.half{int(found[1]) % 2}{found[2]}"
    rows = [row for row in picture_layout.rows(before, after) if row.block]
    assert [len(row.members) for row in rows] == [3]
    assert calls_of(picture.draw(before, after, title="t"), "rewrite") == set(range(6))


@case
def test_deterministic(name):
    before, after = CASES[name]
    shuffled = nx.DiGraph()
    shuffled.add_nodes_from(reversed(list(after.nodes(data=True))))
    shuffled.add_edges_from(reversed(list(after.edges)))
    assert picture.draw(before, after, title="t") == picture.draw(before, shuffled, title="t")


def test_html_page():
    page = picture.html(
        [("graph 0 <x>", *CASES["one"]), ("graph 1", *CASES["thirty"])],
        "<table><tr><td>1</td></tr></table>",
        title="A & B",
    )
    assert page.count("<svg ") == 2 and "<title>A &amp; B</title>" in page and "graph 0 &lt;x&gt;" in page
    assert page.index("<table>") < page.index("<svg ")
    assert "<script" not in page and "prefers-color-scheme:dark" in page
    ET.fromstring(page.removeprefix("<!doctype html>"))
