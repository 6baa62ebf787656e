"""The study's own settings, run on SmolLM2: one row for each of its published experiments.

    python benchmarks/study.py [--only gradient bayes align_merge domains languages]
                               [--steps 250] [--trials 30] [--questions 5]

Runs configs/study/*_smollm2.yaml (they need ../shared) into runs/study/, shows their progress, and
ends with one JSON object. `steps` and `trials` shorten the two that learn alphas; the JSON says how
many were run. Learned alphas stand beside those of the rule alone, with everything else equal.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, str(ROOT / "train.py")]
EXPERIMENTS = ("domains", "languages", "align_merge", "gradient", "bayes")


def call(*arguments):
    """Run a command of lmerge from the project's folder, its output passed on."""
    print("$ lmerge", *arguments, file=sys.stderr, flush=True)
    subprocess.run([*TRAIN, *map(str, arguments)], cwd=ROOT, check=True, stdout=sys.stderr)


def config(name):
    """Return the config of an experiment."""
    return f"configs/study/{name}_smollm2.yaml"


def run_dir(name):
    """Return the run folder that the config of an experiment names."""
    return ROOT / yaml.safe_load((ROOT / config(name)).read_text())["run_dir"]


def losses(folder):
    """Return what a fit measured: loss and perplexity of each text, letters and answer texts."""
    found = json.loads((folder / "metrics.json").read_text())["validate"]
    text = {name: {who: row[who]["loss"] for who in row} for name, row in found["text"].items()}
    choices = {
        name: {who: row[who]["micro"]["value"] for who in ("source", "merged")}
        for name, row in found["choices"].items()
    }
    return {"text": text, "choices": choices}


def fit(name, folder, *extra):
    """Run the fit of an experiment with further options and return what it measured."""
    call("fit", "--config", config(name), "--run_dir", folder, "--overwrite", "true", *extra)
    return losses(folder)


def gradient(options):
    """Alphas learned on the answers, beside those of the rule alone."""
    few = ("--data.max_questions", options.questions)
    steps = {"learned": options.steps, "rule": 0}
    folder = run_dir("gradient")
    return {
        who: fit("gradient", folder / who, *few, "--trainer.max_steps", count)
        for who, count in steps.items()
    } | {"steps": options.steps}


def align_merge(options):
    """The published alignment, none, and one that keeps what a layer computes."""
    few = ("--data.max_questions", options.questions)
    folder = run_dir("align_merge")
    return {
        method: fit("align_merge", folder / method, *few, "--alignment.method", method)
        for method in ("rowwise", "none", "full")
    }


def bayes(options):
    """The Bayesian search; its first trial is drawn at random."""
    folder = ROOT / "runs/study/bayes_smollm2"
    call("sweep", config("bayes"), "--count", options.trials, "--run_dir", folder)
    trials = json.loads((folder / "results.json").read_text())["trials"]
    values = [trial["metric"] for trial in trials if trial["metric"] is not None]
    return {"trials": len(trials), "best_kl": min(values), "first_kl": values[0]}


def similarity(name):
    """Return the agreement of the matrices of each pair of domains or languages."""
    call("similarity", "--config", config(name))
    settings = yaml.safe_load((ROOT / config(name)).read_text())
    return json.loads((ROOT / settings["out_dir"] / "similarity.json").read_text())["correlations"]


def main():
    """Run the experiments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=EXPERIMENTS, default=EXPERIMENTS)
    parser.add_argument("--steps", type=int, default=250, help="steps of the gradient alphas")
    parser.add_argument("--trials", type=int, default=30, help="trials of the Bayesian search")
    parser.add_argument("--questions", type=int, default=5, help="validation questions a subject")
    options = parser.parse_args()
    runs = {
        "domains": lambda: similarity("domains"),
        "languages": lambda: similarity("languages"),
        "align_merge": lambda: align_merge(options),
        "gradient": lambda: gradient(options),
        "bayes": lambda: bayes(options),
    }
    found = {}
    for name in options.only:
        start = time.perf_counter()
        found[name] = runs[name]()
        found[name + "_minutes"] = (time.perf_counter() - start) / 60
        print(f"{name}: {json.dumps(found[name])[:300]}", file=sys.stderr, flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
