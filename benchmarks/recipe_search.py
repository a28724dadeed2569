"""Compare recipes over seeds on held-out training images; the test images are not looked at.

    python benchmarks/recipe_search.py --seeds 5 "epochs=0.5" "epochs=0.5 shift=1" …

Each argument is a recipe: overrides of ``--base``, separated by blanks. The trials are interleaved, seed by
seed. The table gives accuracy on the last 10,000 training images, trained on the first 50,000, and the median
of the seconds of training; docs/recipes.md tells what was learnt from it.
"""

import argparse
import json
import statistics
from pathlib import Path

from gammabeta import data
from gammabeta.train import build_network, fit, load_recipe
from gammabeta.train.run import hold_out

HELD_OUT = 10_000


def trial(base: str, overrides: list[str], seed: int, held: data.Dataset) -> dict[str, float]:
    """Train once; return accuracy and seconds. Epochs are of 60,000 images, to match a full training."""
    recipe = load_recipe(base, overrides)
    recipe = recipe.model_copy(update={"epochs": recipe.epochs * 60_000 / len(held.train.labels)})
    outcome = fit(build_network(recipe, held, seed), held, recipe, device="cpu", seed=seed)
    return {"accuracy": outcome.test.accuracy, "seconds": outcome.seconds["train"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipes", nargs="+", metavar="OVERRIDES")
    parser.add_argument("--base", default="fast")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=1000, help="seeds of the search, not of the report")
    parser.add_argument("--out", type=Path, help="append each trial to this file of JSON lines")
    options = parser.parse_args()
    held = hold_out(data.load("mnist"), HELD_OUT)
    results: dict[str, list[dict[str, float]]] = {recipe: [] for recipe in options.recipes}
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for recipe, trials in results.items():
            trials.append(trial(options.base, recipe.split(), seed, held))
            if options.out:
                with options.out.open("a") as file:
                    file.write(json.dumps({"recipe": recipe, "seed": seed, **trials[-1]}) + "\n")
    print("| overrides | seeds | median | lowest | seconds |\n|---|---|---|---|---|")
    for recipe, trials in results.items():
        accuracies = [t["accuracy"] for t in trials]
        seconds = statistics.median(t["seconds"] for t in trials)
        row = (recipe, len(trials), f"{statistics.median(accuracies):.4f}", f"{min(accuracies):.4f}")
        print("|", " | ".join(map(str, row)), "|", f"{seconds:.2f} |", flush=True)


if __name__ == "__main__":
    main()
