"""Train recipes on MNIST over seeds and write what they reach.

    python benchmarks/recipe_report.py                      # fast over 10 seeds, classic over 5, best over 5
    python benchmarks/recipe_report.py --recipe fast --seeds 10

Each training is a whole ``gammabeta train`` process, as a user would start it, so that its total is the time
from the prompt to the last line, imports, loading, evaluation and pictures included. It writes
benchmarks/results/recipes.json and the tables of docs/recipes.md.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.harness import RESULTS, command
from benchmarks.harness.machine import describe
from benchmarks.harness.report import table, write_between

DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"
OPEN, CLOSE = "<!-- recipes -->", "<!-- end of recipes -->"
SEEDS = {"fast": 10, "classic": 5, "best": 5}
TIMEOUT = 3600.0


def train(recipe: str, seed: int) -> dict[str, Any]:
    """Train once in a process of its own and return its JSON result and the seconds of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "run")
        run = command.train(["--recipe", recipe, "--seed", str(seed), "--out", out], timeout=TIMEOUT)
    result = {key: value for key, value in run.result.items() if key != "run"}
    return {"recipe": recipe, "seed": seed, "process_seconds": round(run.seconds, 2), **result}


def tables(rows: list[dict[str, Any]]) -> str:
    """Return a Markdown table of each recipe's median and lowest, and one of each seed."""
    recipes = []
    for recipe in dict.fromkeys(row["recipe"] for row in rows):
        mine = [row for row in rows if row["recipe"] == recipe]
        accuracy = [row["test_accuracy"] for row in mine]
        recipes.append(
            {
                "recipe": recipe,
                "seeds": len(mine),
                "median test accuracy": f"{median(accuracy):.4f}",
                "lowest": f"{min(accuracy):.4f}",
                "median seconds of training": f"{median(row['seconds']['train'] for row in mine):.2f}",
                "of the process": f"{median(row['process_seconds'] for row in mine):.2f}",
                "commit": ", ".join(dict.fromkeys(row["commit"] for row in mine)),
            }
        )
    seeds = [
        {
            "recipe": row["recipe"],
            "seed": row["seed"],
            "moving loss": f"{row['loss']:.4f}",
            "train accuracy": f"{row['train_accuracy']:.5f}",
            "test accuracy": f"{row['test_accuracy']:.4f}",
            "training s": f"{row['seconds']['train']:.2f}",
            "process s": f"{row['process_seconds']:.2f}",
        }
        for row in rows
    ]
    return f"{table(recipes)}\n{table(seeds)}"


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
    text = tables(document["rows"])
    write_between(DOCS, OPEN, CLOSE, f"{where}\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
