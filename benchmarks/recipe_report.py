"""Train recipes on MNIST over seeds and write what they reach.

    python benchmarks/recipe_report.py                      # fast over 10 seeds, classic over 5, best over 5
    python benchmarks/recipe_report.py --recipe fast --seeds 10

Each training is a whole ``gammabeta train`` process, as a user would start it, so that its total is the time
from the prompt to the last line, imports, loading, evaluation and pictures included. It writes
benchmarks/results/recipes.json and the tables of docs/recipes.md.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.suites.machine import describe

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"
OPEN, CLOSE = "<!-- recipes -->", "<!-- end of recipes -->"
SEEDS = {"fast": 10, "classic": 5, "best": 5}


def train(recipe: str, seed: int) -> dict[str, Any]:
    """Train once in a process of its own and return its JSON result and the seconds of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "gammabeta", "train", "--recipe", recipe, "--seed", str(seed)]
        clock = time.perf_counter()
        done = subprocess.run(
            [*command, "--out", str(Path(folder) / "run"), "--json", "--quiet"],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        process = time.perf_counter() - clock
    result = json.loads(done.stdout)
    del result["run"]
    return {"recipe": recipe, "seed": seed, "process_seconds": round(process, 2), **result}


def table(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of each seed, and one of each recipe's median and lowest."""
    lines = [
        "| recipe | seeds | median test accuracy | lowest "
        "| median seconds of training | of the process | commit |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        accuracy = [row["test_accuracy"] for row in mine]
        training = statistics.median(row["seconds"]["train"] for row in mine)
        process = statistics.median(row["process_seconds"] for row in mine)
        lines.append(
            f"| {recipe} | {len(mine)} | {statistics.median(accuracy):.4f} | {min(accuracy):.4f} "
            f"| {training:.2f} | {process:.2f} | {', '.join(dict.fromkeys(row['commit'] for row in mine))} |"
        )
    lines += ["", "| recipe | seed | moving loss | train accuracy | test accuracy | training s | process s |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {row['recipe']} | {row['seed']} | {row['loss']:.4f} | {row['train_accuracy']:.5f} "
        f"| {row['test_accuracy']:.4f} | {row['seconds']['train']:.2f} | {row['process_seconds']:.2f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", action="append", choices=sorted(SEEDS), help="repeatable; default: all")
    parser.add_argument("--publish", action="store_true", help="only write the tables anew")
    parser.add_argument("--seeds", type=int, help="from 0; default: 10 for fast, 5 for the others")
    options = parser.parse_args()
    path = RESULTS / "recipes.json"
    document: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"rows": []}
    if options.publish:
        publish(document)
        return
    machine = describe()
    for recipe in options.recipe or SEEDS:
        rows = [train(recipe, seed) for seed in range(options.seeds or SEEDS[recipe])]
        rows = [{**row, "commit": machine["commit"]} for row in rows]
        document["rows"] = [row for row in document["rows"] if row["recipe"] != recipe] + rows
    document["machine"] = machine
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n", "utf-8")
    publish(document)


def publish(document: dict[str, Any]) -> None:
    """Write the tables into ``docs/recipes.md``, between its marks, and print them."""
    machine = document["machine"]
    where = f"{machine['machine']}, {machine['threads']} threads, {machine['date']}"
    text = DOCS.read_text("utf-8")
    before, _, rest = text.partition(OPEN)
    _, _, after = rest.partition(CLOSE)
    tables = table(document["rows"])
    DOCS.write_text(f"{before}{OPEN}\n{where}\n\n{tables}\n{CLOSE}{after}", "utf-8")
    print(tables)


if __name__ == "__main__":
    main()
