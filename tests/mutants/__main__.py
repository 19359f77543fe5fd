# SPDX-License-Identifier: Apache-2.0
"""Try to kill every mutant, print who did, and draw mutants x clauses as a page.

python -m tests.mutants            # all of them, as many at a time as there are processors
python -m tests.mutants epsilon    # those with this in their name, seed or clauses
"""

import html
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.mutants import ROOT, Mutant, every, kill

PAGE = ROOT / "runs" / "mutants.html"
STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem; color: #222 }
table { border-collapse: collapse; font-size: 12px }
th { text-align: left; font-weight: normal; white-space: nowrap; padding: 0 .5rem 0 0 }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); padding: .3rem 0; height: 5rem }
td { border: 1px solid #eee; width: 11px; height: 18px } .killed { background: #2a7f4f } .alive { background: #c33 }
tr:hover { background: #f4f4f4 } small { color: #777 }
"""


def page(found: dict[Mutant, set[str]]) -> str:
    """One self-contained page."""
    clauses = sorted({clause for mutant in found for clause in mutant.clauses}, key=_by_section)
    dead = sum(killers == set(mutant.clauses) for mutant, killers in found.items())
    rows = []
    for mutant, killers in found.items():
        cells = (("killed" if c in killers else "alive") if c in mutant.clauses else "" for c in clauses)
        columns = "".join(f'<td class="{cell}" title="{clause}"></td>' for clause, cell in zip(clauses, cells, strict=True))
        rows.append(
            f"<tr><th title={_quoted(mutant.source)}>{html.escape(mutant.name)} <small>{mutant.seed}</small></th>{columns}</tr>"
        )
    head = "".join(f"<th>{clause}</th>" for clause in clauses)
    return (
        f"<!doctype html><meta charset=utf-8><title>Mutants</title><style>{STYLE}</style>"
        f"<h1>{dead} of {len(found)} wrong optimizers are noticed</h1><p>Green: the clause fails for the mutant, as it should. "
        "Red: it does not. Only clauses that a mutant names were run. Its name tells, on hovering, where it was met.</p>"
        f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _quoted(text: str) -> str:
    return f'"{html.escape(text)}"'


def _by_section(clause: str) -> tuple[str, int]:
    section, _, number = clause.partition("-")
    return section, int(number)


def attempt(mutant: Mutant) -> set[str]:
    with tempfile.TemporaryDirectory() as folder:
        return kill(mutant, Path(folder))


def main() -> int:
    wanted = " ".join(sys.argv[1:])
    mutants = [each for each in every() if wanted in " ".join((each.name, each.seed, *each.clauses))]
    if not mutants:
        sys.exit(f"no mutant has {wanted!r} in its name, seed or clauses")
    found: dict[Mutant, set[str]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {pool.submit(attempt, mutant): mutant for mutant in mutants}
        for future in as_completed(futures):
            mutant = futures[future]
            found[mutant] = future.result()
            alive = [clause for clause in mutant.clauses if clause not in found[mutant]]
            verdict = f"not noticed by {' '.join(alive)}" if alive else f"killed by {' '.join(mutant.clauses)}"
            print(f"{len(found):3}/{len(mutants)}  {mutant.name}: {verdict}", flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page({mutant: found[mutant] for mutant in mutants}), encoding="utf-8")
    dead = [mutant for mutant, killers in found.items() if killers == set(mutant.clauses)]
    twice = sum(len(mutant.clauses) > 1 for mutant in dead)
    print(f"{len(dead)} of {len(found)} killed, {twice} of them by two clauses or more; {PAGE.relative_to(ROOT)}")
    return len(dead) < len(found)


if __name__ == "__main__":
    sys.exit(main())
