"""The cost model beside measurements that it was not fitted to: other heads, lengths and pyramids.

    python benchmarks/cost_model.py                 on an H100; writes benchmarks/results/cost_model.json

Each row is written as soon as it is measured, and none is begun after --seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from lighthouse_fx import LighthouseConfig
from lighthouse_fx.measure import cost, layer, machine

HERE = Path(__file__).resolve().parent
# What tune offers and nobody measured, the most telling first.
ROWS = [
    ({"length": 65_536, "heads": 32, "groups": 8, "dim": 128}, {"levels": 3, "pooling": 4, "topk": 1024}),
    ({"length": 49_152, "heads": 16, "groups": 16, "dim": 64}, {"levels": 4, "pooling": 2, "topk": 768}),
    ({"length": 98_304, "heads": 8, "groups": 8, "dim": 128}, {"levels": 2, "pooling": 4, "topk": 768}),
    ({"length": 131_072, "heads": 8, "groups": 8, "dim": 128}, {"levels": 3, "pooling": 4, "topk": 512}),
    ({"length": 24_576, "heads": 16, "groups": 4, "dim": 128}, {"levels": 3, "pooling": 2, "topk": 1024}),
    ({"length": 98_304, "heads": 8, "groups": 8, "dim": 128}, {"levels": 3, "pooling": 8, "topk": 768}),
    ({"length": 200_001, "heads": 8, "groups": 2, "dim": 64}, {"levels": 4, "pooling": 4, "topk": 2048}),
    ({"length": 32_768, "heads": 16, "groups": 16, "dim": 96}, {"levels": 3, "pooling": 4, "topk": 512}),
    ({"length": 16_384, "heads": 32, "groups": 8, "dim": 128}, {"levels": 2, "pooling": 8, "topk": 512}),
]


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no row after; default: 300")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cost_model.json")
    parser.add_argument("--shrink", type=int, default=1, help="divide lengths and windows by this, to try it on a CPU")
    return parser.parse_args()


def measure(shape: layer.LayerShape, config: LighthouseConfig, device: torch.device, card: cost.Card) -> dict:
    begun = time.monotonic()
    found = cost.predict(shape, config, card)
    row = {
        "shape": asdict(shape),
        "pyramid": {name: getattr(config, name) for name in ("levels", "pooling", "topk")},
        "predicted": {**asdict(found), "dense": cost.predict_dense(shape, card)},
        "measured": None,
        "failure": "",
    }
    try:
        milliseconds, memory = layer.measure_function(shape, config, device)
        dense = layer.measure_dense(shape, device)
        row["measured"] = {"milliseconds": milliseconds, "memory": memory, "dense": dense}
    except (RuntimeError, AssertionError) as error:  # one row that cannot run says so, and the others follow
        row["failure"] = str(error).partition("\n")[0]
    return row | {"seconds": time.monotonic() - begun}


def table(rows: list[dict]) -> Table:
    result = Table(title="milliseconds, forward plus backward", title_justify="left")
    compared = "predicted", "measured", "off"
    for column in ("N", "heads", "D", "L p k", *compared, *(f"dense {name}" for name in compared), "memory off"):
        result.add_column(column, justify="right")
    for row in rows:
        shape, said, is_ = row["shape"], row["predicted"], row["measured"] or {}
        cells = []
        for name in ("milliseconds", "dense"):
            cells.append(f"{said[name]:.2f}")
            cells += [f"{is_[name]:.2f}", f"{said[name] / is_[name] - 1:+.1%}"] if is_ else ["-", "-"]
        known = is_.get("memory")
        result.add_row(
            f"{shape['length']:,}",
            f"{shape['heads']}/{shape['groups']}",
            str(shape["dim"]),
            " ".join(map(str, row["pyramid"].values())),
            *cells,
            f"{said['memory'] / known - 1:+.1%}" if known else row["failure"] or "-",
        )
    return result


def compiled_beside(device: torch.device, shrink: int) -> dict:
    """One layer both ways: as the backend compiles it and as a function, which is what is measured here and by `tune`."""
    shape, config = layer.LayerShape(length=98_304 // shrink), LighthouseConfig.paper(topk=1536 // shrink)
    compiled = layer.measure_layer(shape, config, device, bandwidth=1.0, dense=False)
    function, memory = layer.measure_function(shape, config, device)
    return {
        "compiled": {"milliseconds": compiled.layer[1], "memory": compiled.memory},
        "function": {"milliseconds": function, "memory": memory},
    }


def run() -> None:
    args = flags()
    end = time.monotonic() + args.seconds
    device = torch.device(args.device)
    card = cost.H100
    about = machine.describe(device) | {
        "model": {field.name: getattr(card, field.name) for field in fields(card)},
        "command": machine.command(),
    }
    rows: list[dict] = []

    def write() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")

    about |= {"compiled beside function": compiled_beside(device, args.shrink)}
    for shape, config in ROWS:
        if time.monotonic() > end:
            break
        small = shape | {"length": shape["length"] // args.shrink}
        pyramid = config | {"topk": config["topk"] // args.shrink}
        rows.append(measure(layer.LayerShape(**small), LighthouseConfig(**pyramid), device, card))
        write()
    Console(width=150).print(table(rows))
    print("compiled beside function:", about["compiled beside function"])


if __name__ == "__main__":
    run()
