"""Colours and type of the pictures, in light and dark, as CSS that stands inside each file.

Amber is dense attention, blue is Lighthouse attention, grey is everything else.
"""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif'
# (selector, property, light, dark). Plain rules and not CSS variables: Inkscape and rsvg would paint those black.
COLOURS = """
.lfx text|fill|#1c2430|#e8edf3 ; .lfx .muted,.lfx .subtitle,.lfx .times|fill|#5f6b7a|#9aa7b6
.lfx .paper,.lfx .end rect|fill|#ffffff|#0e1319 ; .lfx .band|fill|#f7f8fa|#151c25 ; .lfx .band|stroke|#e6e9ee|#232d39
.lfx .flow|stroke|#8a95a3|#74808f ; .lfx .head-grey|fill|#8a95a3|#74808f
.lfx .blue,.lfx .kept rect|stroke|#1d5fdb|#6fa2ff ; .lfx .head-blue,.lfx .ribbon-text|fill|#1d5fdb|#6fa2ff
.lfx .bracket,.lfx .end rect,.lfx .other rect|stroke|#d3d9e1|#36424f ; .lfx .strong|stroke|#5f6b7a|#9aa7b6
.lfx .cluster|fill|#edf4ff|#121f36 ; .lfx .cluster|stroke|#b5d0fb|#2b4a80 ; .lfx .ribbon|fill|#cfe1ff|#1d355f
.lfx .other rect|fill|#eceff3|#222b36 ; .lfx .other text|fill|#3a4553|#c8d1dc ; .lfx .dense rect|fill|#fde8b8|#4a3508
.lfx .dense rect|stroke|#d9920a|#d9992a ; .lfx .dense text|fill|#5a3a00|#ffe2a3 ; .lfx .ours rect|fill|#1d5fdb|#2563d8
.lfx .ours rect|stroke|#1749a8|#6fa2ff ; .lfx .ours text|fill|#ffffff|#ffffff ; .lfx .kept rect|fill|#d6e5ff|#17305e
.lfx .kept text|fill|#123a85|#d4e4ff
"""
PAGE_COLOURS = """
body|background|#f7f8fa|#151c25 ; body|color|#1c2430|#e8edf3 ; .table,figure|background|#ffffff|#0e1319
.table,figure,th,td|border-color|#e6e9ee|#232d39 ; th|color|#5f6b7a|#9aa7b6
"""


def _themed(table: str) -> str:
    rules = [rule.strip().split("|") for rule in table.strip().replace("\n", ";").split(";")]
    light, dark = ("".join(f"{rule[0]}{{{rule[1]}:{rule[column]}}}" for rule in rules) for column in (2, 3))
    return f"{light}@media (prefers-color-scheme:dark){{{dark}}}"


STYLE = (
    f".lfx text{{font-family:{FONT};font-size:12px;font-variant-numeric:tabular-nums}}"
    ".lfx .title{font-size:22px;font-weight:650}.lfx .subtitle{font-size:14px}.lfx .ribbon-text{font-weight:600}"
    ".lfx .column,.lfx .block{font-size:17px;font-weight:650}.lfx .times{font-size:15px;font-weight:600}"
    ".lfx .name{font-size:13px;font-weight:600}.lfx .flow{fill:none;stroke-width:1.5;stroke-linejoin:round}"
    ".lfx .dash{stroke-dasharray:5 3}.lfx .bracket{fill:none;stroke-width:1.5}.lfx .strong{stroke-width:2}"
) + _themed(COLOURS)
PAGE = (
    f":root{{color-scheme:light dark}}body{{margin:0;font:14px/1.5 {FONT}}}"
    "main{max-width:1400px;margin:0 auto;padding:40px 24px 64px}h1{font-size:26px;margin:0 0 24px}"
    ".table,figure{margin:0 0 28px;border:1px solid;border-radius:14px;overflow-x:auto}.table{padding:8px 20px}"
    "table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}"
    "th,td{text-align:left;vertical-align:top;padding:9px 14px 9px 0;border-bottom:1px solid}th{font-weight:600}"
    "tr:last-child td{border-bottom:0}svg.lfx{display:block;margin:0 auto}"
) + _themed(PAGE_COLOURS)
