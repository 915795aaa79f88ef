"""What the README says is what there is: its options, its files, its picture."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

from lighthouse_fx import LighthouseConfig

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_option_table_is_the_configuration():
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", README, re.MULTILINE))
    shown = {name: text.replace("`", "").strip('"') for name, text in rows.items()}
    assert shown == {field.name: str(field.default) for field in fields(LighthouseConfig)} | {"quota": shown["quota"]}


def test_local_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links and all((ROOT / link).exists() for link in links)


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make (\w+)`", README)) <= targets


def test_picture_of_the_idea_is_drawn_from_the_ops(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("idea", ROOT / "docs" / "idea.py")
    idea = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(idea)
    monkeypatch.setattr(idea, "HERE", tmp_path)
    assert len(idea.selection()) == idea.PYRAMID.gathered
    assert idea.main().read_text().count("<path") > 100
