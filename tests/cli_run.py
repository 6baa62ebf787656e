"""Runs the command line in this process, the way a shell would."""

from pathlib import Path

from lmerge.cli import main

SMALL = (
    "--data.domains=[medical]",
    "--data.num_shots=1",
    "--data.max_questions=3",
    "--data.block_size=64",
    "--data.num_calibration_tokens=1024",
    "--data.eval_tokens=4096",
    "--model.num_removed=2",
    "--trainer.max_steps=3",
    "--trainer.accelerator=cpu",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.log_every_n_steps=1",
    "--wandb=disabled",
    "--artefacts.report=false",
)
"""Options of a run that takes seconds on the tiny model."""


def run(*args: str | Path) -> None:
    """Call `lmerge ARGS`; raises SystemExit where the program would exit with an error."""
    options = [str(arg) for arg in args]
    # Random models fail the gate by chance; its own tests name an option of it.
    if options[0] in ("fit", "validate", "test") and not any("--gate." in o for o in options):
        options.append("--gate.enforce=false")
    main(options)


def fit(source: Path, run_dir: Path, *args: str | Path) -> None:
    """Fit on the tiny model in seconds."""
    run("fit", f"--model.source={source}", f"--run_dir={run_dir}", *SMALL, *args)
