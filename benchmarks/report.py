# SPDX-License-Identifier: Apache-2.0
"""Results as a page and a picture: `python -m benchmarks.report [results.json ...]`.

Without arguments, the newest results and those of the same folder and commit; of a measurement made twice, the last. The
page, report.html, and the picture, speed.png, lie beside the results.
"""

import base64
import json
import sys
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
LABELS = {
    "ours": "ours",
    "ours-4": "ours, 4 steps",
    "torch": "torch.optim.Muon",
    "dense": "dense polar express",
    "dense-compiled": "dense, torch.compile",
    "dion": "dion, Triton",
    "dion-aol": "dion, AOL, 4 steps",
    "dion-gram-ns": "dion, gram-newton-schulz",
    "gram-ns": "gram-newton-schulz",
    "gram-ns-compiled": "gram-newton-schulz, compiled",
    "emerging": "Emerging-Optimizers",
}
CEILING = 4.0  # bars beyond are cut, with their value written on them

Row = dict[str, Any]
Rows = dict[str, dict[str, Row]]


def newest(folder: Path = RESULTS) -> list[Path]:
    """The newest results and their companions, oldest first."""
    files = {path: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*/[0-9]*.json")}
    if not files:
        raise SystemExit(f"no results in {folder}; make some with `pytest benchmarks --benchmark-autosave`")
    paths = sorted(files, key=lambda path: files[path]["datetime"])
    last = paths[-1]
    commit = files[last]["commit_info"]["id"]
    return [path for path in paths if path.parent == last.parent and files[path]["commit_info"]["id"] == commit]


def rows(results: list[dict], test: str) -> Rows:
    """case -> implementation -> what was measured, with `ms`, the median, among it."""
    found: Rows = {}
    for benchmark in (b for result in results for b in result["benchmarks"]):
        params = benchmark["params"] or {}
        if benchmark["name"].startswith(test + "[") and "implementation" in params:
            row = {**benchmark["extra_info"], "ms": 1e3 * benchmark["stats"]["median"]}
            found.setdefault(params["case"], {})[params["implementation"]] = row
    return found


def best_peer(case: dict[str, Row]) -> float | None:
    """Milliseconds of the fastest implementation that is not ours."""
    return min((row["ms"] for name, row in case.items() if not name.startswith("ours")), default=None)


def bars(ax: plt.Axes, cases: Rows, colours: dict[str, Any], title: str) -> None:
    """Time relative to ours for each case, with the two floors across."""
    for x, found in enumerate(cases.values()):
        one = found.get("ours", next(iter(found.values())))
        width = 0.84 / len(found)
        for i, (name, row) in enumerate(found.items()):
            ratio = row["ms"] / one["ms"]
            left = x - 0.42 + (i + 0.5) * width
            ax.bar(left, min(ratio, CEILING), 0.9 * width, color=colours[name])
            if ratio > CEILING:
                ax.text(left, CEILING * 0.98, f"{ratio:.3g}", rotation=90, ha="center", va="top", color="white", fontsize=7)
        for floor, style in (("operations_floor_ms", "-"), ("bytes_floor_ms", ":")):
            if (height := one[floor] / one["ms"]) < CEILING:
                ax.hlines(height, x - 0.42, x + 0.42, color="black", linestyle=style, linewidth=1.2)
    labels = [f"{case}\n{found['ours']['ms']:.3g} ms" if "ours" in found else case for case, found in cases.items()]
    ax.set_xticks(range(len(cases)), labels, fontsize=8)
    ax.set_ylim(0, CEILING)
    ax.set_title(title, loc="left", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)


def picture(path: Path, panels: dict[str, Rows], machine: str) -> None:
    """Save the bars of every panel that has any."""
    panels = {title: cases for title, cases in panels.items() if cases}
    names = [name for name in LABELS if any(name in found for cases in panels.values() for found in cases.values())]
    shades = [plt.get_cmap("tab20")(i) for i in (0, 1, 6, 14, 15, 4, 5, 12, 2, 3, 8)]
    colours = dict(zip(LABELS, shades, strict=True))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(13, 4), width_ratios=[len(cases) for cases in panels.values()], squeeze=False, sharey=True
    )
    for ax, (title, cases) in zip(axes[0], panels.items(), strict=True):
        bars(ax, cases, colours, title)
    axes[0][0].set_ylabel("time relative to ours")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    lines = [plt.Line2D([], [], color="black", linestyle=style) for style in ("-", ":")]
    labels = [*(LABELS[name] for name in names), "floor: operations", "floor: bytes"]
    figure.legend([*handles, *lines], labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.suptitle(machine, x=0.99, ha="right", fontsize=8)
    figure.set_layout_engine("constrained")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def number(value: Any, form: str = ".3g", scale: float = 1.0) -> str:
    return "-" if value is None else format(scale * value, form)


def table(cases: Rows, columns: dict[str, tuple[str, str, float]]) -> str:
    """HTML: a line for each implementation of each case; columns say heading -> key, format, scale."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in ("case", "", "ms", "over best peer", *columns))
    lines = []
    for case, found in cases.items():
        best = best_peer(found)
        for i, (name, row) in enumerate(found.items()):
            cells = [number(row["ms"]), number(row["ms"] / best if best else None, ".2f")]
            cells += [number(row.get(key), form, scale) for key, form, scale in columns.values()]
            first = f"<th rowspan={len(found)}>{escape(case)}</th>" if i == 0 else ""
            mark = ' class="ours"' if name.startswith("ours") else ""
            label = f"<td>{escape(LABELS.get(name, name))}</td>"
            lines.append(f"<tr{mark}>{first}{label}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


ORTHOGONALIZE_COLUMNS = {
    "relative error": ("error", ".3f", 1.0),
    "effective TFLOP/s": ("effective_tflops", ".0f", 1.0),
    "of a large product's rate": ("of_cublas", ".0%", 1.0),
    "floor, operations, ms": ("operations_floor_ms", ".3g", 1.0),
    "floor, bytes, ms": ("bytes_floor_ms", ".3g", 1.0),
}
STEP_COLUMNS = {
    "error of the update": ("error", ".3f", 1.0),
    "floor, operations, ms": ("operations_floor_ms", ".3g", 1.0),
    "floor, bytes, ms": ("bytes_floor_ms", ".3g", 1.0),
    "first step, s": ("first_step_s", ".3g", 1.0),
    "held during a step, bytes a parameter": ("transient_bytes_per_parameter", ".2f", 1.0),
    "parameters, millions": ("parameters", ".0f", 1e-6),
}
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:75rem;margin:2rem auto;padding:0 1rem}img{max-width:100%}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}td,th{padding:.15rem .7rem;text-align:right;font-weight:400}
thead th{border-bottom:1px solid;vertical-align:bottom}tbody th{text-align:left;vertical-align:top;border-top:1px solid #bbb}
td:first-of-type{text-align:left}.ours{font-weight:600}.ours td{background:#eef4fb}"""


def page(image: Path, orthogonalize: Rows, step: Rows, machine: str) -> str:
    """One file of HTML that needs nothing else."""
    source = base64.b64encode(image.read_bytes()).decode()
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Speed of Muon</title><style>{STYLE}</style>",
        f"<h1>Speed of Muon</h1><p>{escape(machine)}</p>",
        f'<img alt="time relative to ours, by case and implementation" src="data:image/png;base64,{source}">',
        "<p>Medians of CUDA events, everyone in turns on the same data. Effective operations are those of the textbook's five "
        "steps, whatever was really done. Floors: the least operations at the rate of a large float16 product, and reading and "
        "writing every number once at the rate of a copy.</p>",
    ]
    if orthogonalize:
        parts += ["<h2>Orthogonalization</h2>", table(orthogonalize, ORTHOGONALIZE_COLUMNS)]
    if step:
        parts += ["<h2>Optimizer steps</h2>", table(step, STEP_COLUMNS)]
    return "\n".join(parts) + "\n"


def main(arguments: list[str]) -> None:
    paths = [Path(argument) for argument in arguments] or newest()
    results = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    about, folder = results[-1], paths[-1].parent
    kinds = [rows(results, test) for test in ("test_orthogonalize", "test_step")]
    if not any(kinds):
        raise SystemExit(f"no measurements of benchmarks/test_orthogonalize.py or test_step.py in {', '.join(map(str, paths))}")
    info = about["machine_info"]
    machine = (
        f"{info['gpu']}, torch {info['torch']}, triton {info['triton']}, "
        f"commit {about['commit_info']['id']}, {about['datetime'][:10]}"
    )
    packages = {name: version for result in results for name, version in result.get("peers", {}).items()}
    picture(folder / "speed.png", {"orthogonalize a batch": kinds[0], "step": kinds[1]}, machine)
    (folder / "report.html").write_text(
        page(folder / "speed.png", *kinds, ", ".join([machine, *map(" ".join, packages.items())])), encoding="utf-8"
    )
    print(f"wrote {folder / 'report.html'} and {folder / 'speed.png'}")


if __name__ == "__main__":
    main(sys.argv[1:])
