"""What the README and docs/ say is what there is: options, files, pictures, figures, messages, and code that runs."""

import ast
import importlib
import importlib.util
import json
import math
import re
import textwrap
from dataclasses import fields
from functools import cache
from itertools import chain, product
from pathlib import Path

import pytest
import torch

from lighthouse_fx import LighthouseConfig, TwoStage, backend, explain
from lighthouse_fx import compile as lighthouse_compile
from lighthouse_fx.cli.main import main
from lighthouse_fx.kernels import Pyramid
from lighthouse_fx.passes.pyramid import pyramid_over

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
FENCE = re.compile(r"(?:^<!-- (?P<mark>.+?) -->\n)?^```(?P<language>\w*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("name", PAGES)


def blocks(name, language="python"):
    """The code blocks of a page, each with the comment above it, or None."""
    return [(m["mark"], m["body"]) for m in FENCE.finditer(PAGES[name]) if m["language"] == language]


def prose(text):
    return FENCE.sub("", text)


# --- README -----------------------------------------------------------------------------------------------------------


def test_option_table_is_the_configuration():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGES["options.md"], re.MULTILINE))
    shown = {name: text.replace("`", "").strip('"') for name, text in rows.items()}
    assert shown == {field.name: str(field.default) for field in fields(LighthouseConfig)} | {"quota": shown["quota"]}


def test_readme_is_short():
    assert len(README.split()) < 1200


def test_every_snippet_of_the_readme_runs(monkeypatch, tmp_path):
    # What a reader has: a model of transformers, an optimiser, batches and the documents in them.
    transformers = pytest.importorskip("transformers")
    compile_fx = importlib.import_module("torch._inductor.compile_fx")
    for module in (compile_fx, backend):
        monkeypatch.setattr(module, "compile_fx", lambda gm, inputs, **options: gm)
    monkeypatch.chdir(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=6, num_attention_heads=2, use_cache=False
    )
    input_ids = torch.randint(64, (1, 1024))

    def fresh():
        torch._dynamo.reset()
        model = transformers.LlamaForCausalLM(config)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}

    q = torch.randn(1, 2, 1024, 16)
    names = {"torch": torch, "input_ids": input_ids, "total_steps": 2, "batch_of": lambda step: input_ids}
    names |= dict.fromkeys("qkv", q)
    names |= {"document_ids": (torch.arange(1024) // 300)[None]}
    snippets = [m["body"] for m in FENCE.finditer(README) if m["language"] == "python"]
    assert len(snippets) == 4
    for snippet in snippets:
        names |= fresh()
        exec(compile(snippet, "README.md", "exec"), names)
    assert (tmp_path / "graph.html").is_file()


def test_local_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


def make_targets():
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_make_targets_exist():
    assert set(re.findall(r"`make (\w+)`", README + "".join(PAGES.values()))) <= make_targets()


def test_picture_of_the_idea_is_drawn_from_the_ops(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("idea", ROOT / "docs" / "idea.py")
    idea = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(idea)
    monkeypatch.setattr(idea, "HERE", tmp_path)
    assert len(idea.selection()) == idea.PYRAMID.gathered
    assert idea.main().read_text().count("<path") > 100


# --- CONTRIBUTING -----------------------------------------------------------------------------------------------------

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_contributing_names_what_there_is():
    paths = set(re.findall(r"`((?:\w+/|\.)[\w./-]*)`", CONTRIBUTING)) - {".venv", ".venv/frameworks", ".venv/bin/pre-commit"}
    inner = {"unit/", "integration/", "gpu/", "repo/", "support/"}
    missing = {path for path in paths if not (ROOT / ("tests" if path in inner else "") / path).exists()}
    assert not missing
    assert set(re.findall(r"make (\w+)", CONTRIBUTING)) - {"installs"} <= make_targets()


def test_table_of_rooms_is_the_tree():
    folders = {path.parent for name in ("lighthouse_fx", "passes", "kernels") for path in (ROOT / name).rglob("*.py")}
    listed = re.findall(r"^\| `([\w/]+)/` \|", CONTRIBUTING, re.MULTILINE)
    assert sorted(listed) == sorted([*(str(folder.relative_to(ROOT)) for folder in folders), "tests"])


def test_a_compile_is_walked_in_at_most_twelve_files():
    steps = re.findall(r"^(\d+)\. `([\w/]+\.py)`:", CONTRIBUTING, re.MULTILINE)
    assert [int(number) for number, _ in steps] == [*range(1, len(steps) + 1)] and len(steps) <= 12


# --- pages: links and site --------------------------------------------------------------------------------------------


@each_page
def test_links_of_a_page_lead_somewhere(name):
    for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", prose(PAGES[name])):
        if "://" in link:
            continue
        assert (ROOT / "docs" / link).is_file() if link else anchor, f"{name}: {link} is no file"
        if anchor:
            titles = re.findall(r"^#+ (.+)$", prose(PAGES[link or name]), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


def test_nav_lists_every_page_once():
    nav = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    assert sorted(re.findall(r"^  - .+: (\w+\.md)$", nav, re.MULTILINE)) == sorted(PAGES)


def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path), strict=True))
    shown = re.findall(r'<img[^>]* src="([^"]+)"', (tmp_path / "choosing_a_pyramid" / "index.html").read_text())
    pictures = [(tmp_path / "choosing_a_pyramid" / source).resolve() for source in shown]
    assert {path.name for path in pictures} == {"layer.png", "train_step.png", "budget.png"}
    assert all(path.is_file() and path.is_relative_to(tmp_path.resolve()) for path in pictures)


def test_commands_exist(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    known = re.findall(r"^    (\w+)  ", capsys.readouterr().out, re.MULTILINE)
    pages = "".join(PAGES.values())
    said = set(re.findall(r"`lighthouse (\w+)", pages))
    coming = set(re.findall(r"`lighthouse (\w+)`, is not part of this version yet", pages))
    assert said - coming and said - coming <= set(known)
    assert not coming & set(known), f"{coming} has come: say in docs/choosing_a_pyramid.md what it does"


# --- pages: code ------------------------------------------------------------------------------------------------------


@each_page
def test_python_of_a_page_compiles(name):
    for _, body in blocks(name):
        compile(body, name, "exec")


@pytest.mark.parametrize("name", [name for name in PAGES if any(mark == "runs" for mark, _ in blocks(name))])
def test_code_marked_as_running_runs(name, monkeypatch, tmp_path):
    # What Inductor makes of a graph is tested elsewhere, and takes long.
    compile_fx = importlib.import_module("torch._inductor.compile_fx")  # the package has a function of that name
    for module in (compile_fx, backend):
        monkeypatch.setattr(module, "compile_fx", lambda gm, inputs, **options: gm)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = f"page_{name.removesuffix('.md')}"  # a real one, as Dynamo looks globals up by it
    Path(f"{module}.py").write_text("\n".join(body for mark, body in blocks(name) if mark == "runs"))
    importlib.import_module(module)


def test_every_python_block_runs_or_is_an_excerpt():
    marks = {(name, mark) for name in PAGES for mark, _ in blocks(name)}
    assert {name for name, mark in marks if mark == "runs"} >= {"index.md", "tools.md", "two_stages.md", "evidence.md"}
    assert not {name for name, mark in marks if mark != "runs" and not str(mark).startswith("from ")}


def test_excerpts_of_examples_are_verbatim():
    found = blocks("frameworks.md")
    for mark, body in found:
        path = mark.removeprefix("from ")
        text = (ROOT / path).read_text(encoding="utf-8")
        assert f"\n{body}" in f"\n{textwrap.dedent(text)}", f"{path} does not contain:\n{body}"
    every = {f"from examples/frameworks/{path.name}" for path in (ROOT / "examples" / "frameworks").glob("*.py")}
    assert {mark for mark, _ in found} == every - {"from examples/frameworks/tiny.py"}


# --- pages: figures ---------------------------------------------------------------------------------------------------


def rows(name, header):
    """The cells of the table whose header begins so."""
    table = PAGES[name].partition(f"\n| {header}")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def number(text):
    return float(re.match(r"[\d,.]+", text)[0].replace(",", ""))


def test_table_of_pyramids_follows_from_the_geometry():
    found = rows("choosing_a_pyramid.md", "levels")
    assert len(found) == 7
    for row in found:
        levels, pooling, topk, gathered, kept, work = map(number, row)
        pyramid = Pyramid(length=98_304, levels=int(levels), pooling=int(pooling), topk=int(topk))
        share = pyramid.gathered / pyramid.length
        assert gathered == pyramid.gathered
        assert math.isclose(kept, 100 * share, abs_tol=0.051) and math.isclose(work, 100 * share**2, abs_tol=0.051)


def test_table_of_speeds_is_that_of_the_benchmark():
    measured = json.loads((ROOT / "benchmarks" / "results" / "layer.json").read_text())["rows"]
    found = rows("choosing_a_pyramid.md", "N")
    assert len(found) == len(measured)
    for row, of in zip(found, measured, strict=True):
        length, topk, gathered, kept, lighthouse = map(number, row[:5])
        assert (length, topk, gathered) == (of["shape"]["length"], of["topk"], of["gathered"])
        assert math.isclose(kept, 100 * gathered / length, abs_tol=0.051)
        assert math.isclose(lighthouse, of["layer"][1], rel_tol=0.02)
        if row[5] == "not run":
            assert not of["dense"] and row[6] == ""
            continue
        assert math.isclose(number(row[5]), of["dense"][1], rel_tol=0.02)
        assert math.isclose(number(row[6]), of["dense"][1] / of["layer"][1], rel_tol=0.03)


def test_speeds_of_the_default_are_those_of_the_benchmark():
    measured = json.loads((ROOT / "benchmarks" / "results" / "layer_default.json").read_text())["rows"]
    for row, of in zip(rows("choosing_a_pyramid.md", "length"), measured, strict=True):
        config, length = LighthouseConfig(), of["shape"]["length"]
        assert tuple(map(number, row[:3])) == (length, pyramid_over(length, config).topk, of["gathered"])
        assert math.isclose(number(row[3]), of["layer"][1], rel_tol=0.02)
        assert math.isclose(number(row[4]), of["dense"][1], rel_tol=0.02)
        assert math.isclose(number(row[5]), of["dense"][1] / of["layer"][1], rel_tol=0.03)
        assert math.isclose(number(row[6]), of["memory"] / 1e6, rel_tol=0.01)


def test_seconds_of_a_step_are_those_of_the_benchmark():
    runs = json.loads((ROOT / "benchmarks" / "results" / "train_step.json").read_text())["runs"]
    for page in (README, PAGES["choosing_a_pyramid.md"]):
        assert all(f"{run['seconds']:.2f} s" in " ".join(page.split()) for run in runs)
        assert "{:.1f} and {:.1f} times".format(*(runs[0]["seconds"] / run["seconds"] for run in runs[1:])) in page


def test_table_of_budgets_is_that_of_the_run():
    measured = json.loads((ROOT / "benchmarks" / "results" / "budget.json").read_text())["results"]
    on_gpu = json.loads((ROOT / "benchmarks" / "results" / "budget_gpu.json").read_text())["results"]
    found = rows("choosing_a_pyramid.md", "run") + rows("choosing_a_pyramid.md", "on the H100")
    assert [(row[0], row[1]) for row in found] == [(of["name"], of["topk"]) for of in measured + on_gpu]
    moves = [sum(len(event["changed"]) for event in of["events"]) for of in measured]
    assert f"{moves[-2]} and {moves[-1]} moves in 200 steps" in PAGES["choosing_a_pyramid.md"]
    for row, of in zip(found, measured + on_gpu, strict=True):
        kept, work, *speed, at_switch, final = map(number, row[2:])
        assert speed == [round(of["tokens_per_second"])] * (of in on_gpu)
        assert math.isclose(kept, 100 * of["kept"], abs_tol=0.051) and math.isclose(work, 100 * of["work"], abs_tol=0.051)
        assert math.isclose(at_switch, of["at_switch"], abs_tol=0.0005) and math.isclose(final, of["final"], abs_tol=0.0005)


def test_table_of_documents_is_that_of_the_benchmark():
    measured = json.loads((ROOT / "benchmarks" / "results" / "documents.json").read_text())
    page = PAGES["packed_documents.md"]
    labels = {"0%": "random lengths", "75%": "one of 75% of the row", "90%": "one of 90%"}
    largest = dict.fromkeys(product(("layer", "llama"), (16_384, 98_304)), 0.0)
    for what, name in (("layer", "a layer"), ("llama", "a Llama")):
        for row in measured[what]:
            for share, times in row["documents_ms"].items():
                start = rf"^\| {name}, {row['length']:,} \| {labels[share]} \| "
                shown = re.search(start + r"(.+) \|$", page, re.MULTILINE)[1].split(" | ")
                for text, time in zip(shown, times.values(), strict=True):
                    assert math.isclose(number(text), time / row["undivided_ms"], abs_tol=0.0051)
                    largest[what, row["length"]] = max(largest[what, row["length"]], number(text))
    assert f"at most **{largest['layer', 98_304]:.2f} times**" in page
    assert f"at 16,384 at most **{largest['llama', 16_384]:.2f}**, at 98,304 at most {largest['llama', 98_304]:.2f}" in page


def test_evidence_is_that_of_the_runs():
    measured = json.loads((ROOT / "benchmarks" / "results" / "recipes_wsd.json").read_text())
    compared = [runs for name, runs in measured.items() if name.startswith("at_")]
    for run in [*measured["rows"], *chain.from_iterable(compared)]:
        figures = [run["final"]]
        if run["switch_loss"] is not None and run["seed"] == 0 and run in measured["rows"]:
            figures.append(run["switch_loss"])
        assert all(f"{figure:.3f}" in PAGES["evidence.md"] for figure in figures), run["name"]
        assert "note" in run or f"{run['train_seconds']:.0f} s" in PAGES["evidence.md"]
        assert run["passkeys"] == pytest.approx(0.1, abs=0.005) or f"({run['passkeys']:.0%} in one)" in PAGES["evidence.md"]
    for runs in compared:
        for seed in {run["seed"] for run in runs}:
            dense, staged = (next(x for x in runs if x["seed"] == seed and x["name"] == n) for n in ("dense", "recommended"))
            assert f"{staged['final'] - dense['final']:+.2f}" in PAGES["evidence.md"]


def test_runs_of_the_transfer_table_are_those_recorded():
    folder = ROOT / "benchmarks" / "results" / "transfer"
    label = {"dense2500_s0": "dense, 2,500 steps", "dense_s0_again": "dense, seed 0 again"}
    label |= {"window_edge0_s0": "sliding window 512, no dense layer, seed 0"}
    label |= {f"dense_s{seed}": f"dense, seed {seed}" for seed in (0, 1)}
    label |= {f"window_s{seed}": f"sliding window 512, seed {seed}" for seed in (0, 1)}
    label |= {f"pyramid_s{seed}": f"causal pyramid and local branch, seed {seed}" for seed in (0, 1)}
    shown = {row[0]: row[1:] for row in rows("evidence.md", "run | final loss")}
    assert {path.stem for path in folder.glob("*.jsonl")} == set(label) and set(shown) == set(label.values())
    for name, title in label.items():
        records = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        final, far, switch, later, leak = (cell.strip("*") for cell in shown[title])
        assert (final, far) == tuple(f"{records[-1]['dense'][part]:.3f}" for part in ("loss", "far"))
        if records[0]["run"]["forms"]:
            at = {record["step"]: record for record in records if record["record"] == "step"}
            assert switch == f"{at[2400]['dense']['loss']:.3f} ({at[2400]['own']['loss']:.3f})"
            assert later == f"{at[2450]['dense']['loss']:.3f}"
            (seen,) = [record for record in records if record["record"] == "leak"]
            assert abs(float(leak.split(" ±")[0])) == pytest.approx(abs(seen["leak"]), abs=0.0006)


@pytest.mark.parametrize("figure", ["2.489", "2.092", "2.420", "2.070", "0.023", "0.006", "4%", "9,732", "9,021", "9,100"])
def test_figures_of_the_run_are_those_of_the_readme(figure):
    assert figure in README and figure in PAGES["two_stages.md"]


# --- pages: messages --------------------------------------------------------------------------------------------------

GAP = "\0"  # for what a message fills in


@cache
def messages():
    """Every string in the package that is no docstring, as it is put together, with GAPs."""
    found = []
    for folder in ("lighthouse_fx", "passes", "kernels"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8"))
            said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(p.value if isinstance(p, ast.Constant) else GAP for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
                    found.append(node.value.replace("{}", GAP))
    return found


def occurs(message):
    """Whether some string has the parts of a message between its `...` in this order."""
    parts = [part for part in re.split(r"\.\.\.", " ".join(message.split())) if part.strip()]
    pattern = re.compile(".*?".join(re.escape(part.strip()) for part in parts), re.DOTALL)
    return sum(map(len, parts)) >= 15 and any(pattern.search(text) for text in messages())


@pytest.mark.parametrize("message", [body.strip() for _, body in blocks("troubleshooting.md", "text")])
def test_messages_of_troubleshooting_are_those_of_the_package(message):
    assert occurs(message), f"no string of the package has {message!r}"


def test_a_message_that_does_not_occur_is_found_out():
    assert occurs("needs no gradient: nothing trains through this call")
    assert not occurs("needs no gradients: nothing trains through this call")
    assert not occurs("quota=... does not divide levels=...")
    assert not occurs("...")


def shown(first, message):
    """Whether a page's message that begins so, or its whole, is what really was said."""
    (of,) = [" ".join(body.split()) for _, body in blocks("troubleshooting.md", "text") if body.startswith(first)]
    return re.search(".*?".join(map(re.escape, of.split("..."))), message, re.DOTALL)


def reason(mask=None, tokens=64, **options):
    """Why attention of so many tokens stays dense."""
    q = torch.randn(1, 2, tokens, 8, requires_grad=True)
    attend = torch.nn.functional.scaled_dot_product_attention
    report = explain(lambda q: attend(q, q, q, attn_mask=mask, is_causal=mask is None), q, config=LighthouseConfig(**options))
    return report.calls[0].reason


def test_reasons_are_given_as_troubleshooting_quotes_them():
    assert shown("not worth it", reason(topk=64))
    assert shown("... tokens are fewer", reason(tokens=8, levels=3))
    assert shown("explicit attn_mask", reason(mask=torch.ones(64, 64).tril().bool(), topk=2))
    with torch.no_grad():
        assert shown("gradients are off", reason(topk=2))


def wrong_plan():
    TwoStage(8, fraction=0.5).load_state_dict(TwoStage(9, fraction=0.5).state_dict())


def step_back():
    schedule = TwoStage(8, fraction=0.5)
    for step in (3, 2):
        with schedule.stage(step):
            pass


@pytest.mark.parametrize(
    ("first", "provoke"),
    [
        ("options has", lambda: backend.split_options({"top_k": 8})),
        ("quota=", lambda: LighthouseConfig(topk=8, quota=3)),
        ("state has", wrong_plan),
        ("step=", step_back),
        ("schedule.stage() does not know", lambda: TwoStage(8, fraction=0.5).stage().__enter__()),
        ("schedule.stage() is for training", torch.no_grad()(lambda: TwoStage(8, fraction=0.5).stage(0).__enter__())),
        ("model=", lambda: lighthouse_compile(torch.nn.Linear(2, 2))),
    ],
)
def test_errors_are_raised_as_troubleshooting_quotes_them(first, provoke):
    with pytest.raises((TypeError, ValueError, RuntimeError)) as raised:
        provoke()
    assert shown(first, str(raised.value))
