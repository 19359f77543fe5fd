# SPDX-License-Identifier: Apache-2.0
"""Which clauses of SPEC.md each implementation holds: `python -m conformance.scorecard [--jobs 2] [NAME ...]`.

Runs the suite once for every target of TARGETS, or for those named, in a process of its own, which takes minutes; prints a
table, and the defects with a command for each; and writes scorecard.json and .png, and defects.md, into conformance/scorecard.
Implementations that were not named keep what that file says of them. A known failure (xfails/) is a failure.
"""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

from conformance.conftest import CLAUSES

HERE = Path(__file__).parent
FOLDER = HERE / "scorecard"
# name of a target and of its list of known failures -> what it is called, the distribution it comes in, how that is installed
TARGETS = {
    "impl": ("this repository", "polar-muon", "pip install -e ."),
    "reference": ("reference/", "polar-muon", "pip install -e ."),
    "torch_optim": ("torch.optim.Muon", "torch", "pip install torch"),
    "kellerjordan": ("KellerJordan/Muon", "muon-optimizer", "pip install git+https://github.com/KellerJordan/Muon"),
    "dion": ("dion", "dion", "pip install git+https://github.com/microsoft/dion"),
    "emerging_optimizers": ("Emerging-Optimizers", "emerging-optimizers", "pip install emerging-optimizers (Python 3.12)"),
    "optax": ("optax.contrib.muon", "optax", "pip install optax jax"),
    "xtuner": ("xtuner", "xtuner", "pip install git+https://github.com/InternLM/xtuner"),
    "gram_newton_schulz": ("gram-newton-schulz", "gram-newton-schulz", "pip install gram-newton-schulz"),
}
VERDICTS = {
    "passed": "held",
    "failed": "failed",
    "xfailed": "failed",
    "unsupported": "not offered",
    "skipped": "not run",
    "not run": "not run",
}
COLOURS = {"held": "#2a7fb8", "failed": "#e66101", "not offered": "#e8e8e8", "not run": "#ffffff"}
ROW = re.compile(rf"^[A-Z]+ +({'|'.join(VERDICTS)}) +((?:[A-Z]+-\d+ ?)+)$", re.M)


def parse(output: str) -> dict[str, str]:
    """Clause -> verdict, of the table that closes the suite's output."""
    found = {id: VERDICTS[outcome] for outcome, ids in ROW.findall(output) for id in ids.split()}
    return {id: found.get(id, "not run") for id in CLAUSES} if found else {}


def version(distribution: str) -> str:
    """Of a distribution, with the commit where it was installed from one."""
    try:
        found = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return ""
    origin = json.loads(found.read_text("direct_url.json") or "{}")
    commit = origin.get("vcs_info", {}).get("commit_id", "")[:7]
    return f"{found.version.partition('+')[0]} at {commit}" if commit else found.version.partition("+")[0]


def defects(name: str, clauses: dict[str, str]) -> list[dict[str, Any]]:
    """The known failures of a target, one entry for each reason, with the command that shows the first of its tests.

    What is so in some versions counts where its clause has failed.
    """
    path = HERE / "xfails" / f"{name}.txt"
    grouped: dict[str, list[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        test, _, reason = (part.strip() for part in line.partition("  # "))
        elsewhere = "in some versions" in reason and clauses[reason.partition(":")[0]] != "failed"
        if reason and not test.startswith("#") and not elsewhere:
            grouped.setdefault(reason, []).append(test)
    target = f"--target=conformance.targets.{name}:Target"
    return [
        {"defect": reason, "tests": len(tests), "shown by": f'pytest "conformance/{tests[0]}" {target} --xfails=/dev/null'}
        for reason, tests in sorted(grouped.items())
    ]


def measure(name: str) -> dict[str, Any]:
    """Run the suite for a target; without clauses where it cannot be imported or did not come to an end."""
    label, distribution, install = TARGETS[name]
    result: dict[str, Any] = {"label": label, "version": version(distribution), "install": install, "clauses": {}}
    command = [sys.executable, "-m", "pytest", "conformance", f"--target=conformance.targets.{name}:Target"]
    command += ["-q", "--tb=no", "-p", "no:cacheprovider"]
    lines = []
    with subprocess.Popen(
        command, cwd=HERE.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if done := re.search(r"\[ *(\d+%)\]$", line.rstrip()):
                sys.stderr.write(f"{name}: {done[1]}\n")
    output = "".join(lines)
    if process.returncode == 4 and "ERROR: --target=" in output:
        result["problem"] = "not installed"
    elif not (clauses := parse(output)):
        result["problem"] = f"no table of clauses; the end of the output:\n{output[-2000:]}"
    else:
        result |= {"clauses": clauses, "defects": defects(name, clauses), "green": process.returncode == 0}
    sys.stderr.write(f"{name}: {result.get('problem', 'done')}\n")
    return result


def sections() -> list[str]:
    return list(dict.fromkeys(id.partition("-")[0] for id in CLAUSES))


def counts(clauses: dict[str, str], section: str = "") -> str:
    """held/failed/not offered, a section's or all; clauses that were not run are counted with these."""
    found = Counter(verdict for id, verdict in clauses.items() if id.startswith(f"{section}-" if section else ""))
    return f"{found['held']}/{found['failed']}/{found['not offered'] + found['not run']}"


def table(results: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Lines: implementations by sections, then what is not there."""
    there = [each for each in results.values() if each["clauses"]]
    rows = [["held/failed/not offered", "version", "all", *sections()]]
    for each in there:
        by_section = [counts(each["clauses"], section) for section in sections()]
        rows.append([each["label"], each["version"], counts(each["clauses"]), *by_section])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    yield from ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    for name, each in results.items():
        if not each["clauses"]:
            yield f"{each['label']}: {each['problem']}; to install it: {each['install']}"
        elif not each["green"]:
            stale = f"xfails/{name}.txt is of another version; what it lists and passes counts as failed"
            yield f"{each['label']} {each['version']}: {stale}"


def page(results: dict[str, dict[str, Any]]) -> Iterable[str]:
    """Lines of Markdown: what each implementation fails, and the command that shows it."""
    yield "# What other implementations do otherwise than [SPEC.md](../../SPEC.md) says"
    yield "\nWritten by `python -m conformance.scorecard`: deviations, how many tests each fails, and how to see one."
    for each in results.values():
        if each.get("defects"):
            yield f"\n## {each['label']} {each['version']}\n\n`{each['install']}`\n"
        for defect in each.get("defects", ()):
            clause, _, text = defect["defect"].partition(": ")
            yield f"- **{clause}** {text} ({defect['tests']})<br>`{defect['shown by']}`"


def draw(results: dict[str, dict[str, Any]], path: Path) -> None:
    """One cell for each clause of each implementation."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle
    except ImportError as error:
        raise SystemExit(f"the picture is drawn by matplotlib (pip install matplotlib): {error}") from error
    rows = [each for each in results.values() if each["clauses"]]
    half = sections().index("SKIP")  # in two parts, for a page is not that wide
    figure = Figure(figsize=(15, 0.7 * len(rows) + 2.4), layout="constrained")
    for axes, part in zip(figure.subplots(2), (sections()[:half], sections()[half:]), strict=True):
        x = 0
        for section in part:
            own = [id for id in CLAUSES if id.startswith(section + "-")]
            for y, each in enumerate(rows):
                for i, id in enumerate(own):
                    colour = COLOURS[each["clauses"][id]]
                    axes.add_patch(Rectangle((x + i + 0.05, y + 0.1), 0.9, 0.8, facecolor=colour, edgecolor="#b0b0b0", lw=0.4))
            for i, id in enumerate(own):
                axes.text(x + i + 0.5, -0.15, id.partition("-")[2], ha="center", va="bottom", fontsize=9)
            axes.text(x + len(own) / 2, -0.85, section, ha="center", va="bottom", fontsize=11, weight="bold")
            x += len(own) + (1 if len(own) > 1 else 2)  # a name is wider than one clause
        axes.set(xlim=(-0.5, 62), ylim=(len(rows), -1.6), yticks=[y + 0.5 for y in range(len(rows))], xticks=[])
        axes.set_yticklabels([f"{each['label']} {each['version']}".strip() for each in rows], fontsize=11)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    for y, each in enumerate(rows):
        figure.axes[0].text(47.5, y + 0.5, counts(each["clauses"]), va="center", fontsize=11)
    legend = [Patch(facecolor=COLOURS[v], edgecolor="#b0b0b0", label=v) for v in ("held", "failed", "not offered")]
    figure.legend(handles=legend, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m conformance.scorecard", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", choices=[[], *TARGETS], help=f"some of {', '.join(TARGETS)} [all]")
    parser.add_argument("--jobs", type=int, default=1, help="how many run at a time [1]")
    options = parser.parse_args(arguments)
    data = FOLDER / "scorecard.json"
    known = json.loads(data.read_text()) if options.names and data.exists() else {}
    names = options.names or list(TARGETS)
    with ThreadPoolExecutor(options.jobs) as pool:
        found = known | dict(zip(names, pool.map(measure, names), strict=True))
    results = {name: found[name] for name in TARGETS if name in found}
    FOLDER.mkdir(exist_ok=True)
    data.write_text(json.dumps(results, indent=1) + "\n")
    (FOLDER / "defects.md").write_text("\n".join(page(results)) + "\n")
    sys.stdout.write("\n".join(["", *table(results), "", *page(results)]) + "\n")
    draw(results, FOLDER / "scorecard.png")


if __name__ == "__main__":
    main()
