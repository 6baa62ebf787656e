"""`lmerge transfer`: does a plan made on one domain or language serve another?"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from filelock import FileLock, Timeout
from matplotlib.figure import Figure

from lmerge.activations import Pooling
from lmerge.data.batching import context_length
from lmerge.figures import save, transfer_figure
from lmerge.files import provenance, read_json, write_json, write_text
from lmerge.information import InformationConfig
from lmerge.llama import num_layers
from lmerge.plan import check_num_removed
from lmerge.search import SearchMethod
from lmerge.similarity import Measure
from lmerge.source import Dtype, load_model, load_tokenizer, model_fingerprint
from lmerge.tables import print_columns
from lmerge.transfer import Rule
from lmerge.transfer_cells import Study
from lmerge.transfer_data import CalibrationSplit, EvalSplit, domain_texts, read_sides
from lmerge.transfer_table import (
    Refitted,
    Row,
    Summary,
    figure_panels,
    row_record,
    summaries,
    summary_columns,
    transfer_markdown,
    transfer_rows,
)
from lmerge.wandb_log import WandbMode
from lmerge.wandb_studies import log_transfer
from lmerge.wandb_tables import wandb_run

SCHEMA = 1
RESULT = "transfer.json"
SETTINGS = "settings.json"
"""What the cells in the folder belong to."""

STUDY_DOMAINS = ["medical", "legal", "math", "cs", "humanities"]
ENGLISH = ["en"]
RULES: list[Rule] = ["angular", "block_repaired"]
REMOVED = [3, 6]
REFITS: list[Refitted] = ["own", "mixed"]
FREE = ("rules", "num_removed", "refits")
"""Settings that a later call may change: cells hold for all of them."""
VALIDATION: list[CalibrationSplit] = ["val"]


def run_transfer(
    source: str = "smollm2-135m",
    out_dir: Path = Path("runs/transfer"),
    questions: str = "bank",
    domains: list[str] = STUDY_DOMAINS,
    languages: list[str] = ENGLISH,
    translated: list[str] | None = None,
    extra_domains: dict[str, list[str]] | None = None,
    rules: list[Rule] = RULES,
    num_removed: list[int] = REMOVED,
    refits: list[Refitted] = REFITS,
    information: InformationConfig = InformationConfig(),  # noqa: B008 - frozen
    num_prompts: int = 40,
    pooling: Pooling = "last",
    calibration_splits: list[CalibrationSplit] = VALIDATION,
    eval_split: EvalSplit = "val",
    holdout: float = 0.5,
    num_calibration_tokens: int = 6144,
    block_size: int = 128,
    num_eval_questions: int = 32,
    dtype: Dtype = "auto",
    seed: int = 0,
    overwrite: bool = False,
    wandb: WandbMode = "disabled",
) -> None:
    """Measure on every domain the plans made on every other; a second call goes on where one ended.

    Args:
        source: Model: hub id, local folder, GGUF file or alias.
        out_dir: Folder of the results; cells that are there are not computed again, so that rules,
            numbers and refits may be added.
        questions: Where the questions are, as in `fit --data.questions`.
        domains: Domains to compare.
        languages: ISO 639-1 codes of the languages to compare.
        translated: Domains that are taken in every language; the others in the first language
            alone. Null takes all in every language.
        extra_domains: Further domains, each a list of subjects.
        rules: How plans are made: a layer similarity (the block whose ends are most alike),
            `block_repaired` (the block that costs least once refitted) or `groups_repaired`.
        num_removed: Layers to remove; one table for each number.
        refits: What each plan is refitted on: its `own` domain's text, or as much of all domains in
            turn (`mixed`), which shows the plan's effect without the text's.
        information: Options of `npib`, `gaussian_nmi` and `gaussian_nmi_bounded`.
        num_prompts: Prompts of each domain and language for layer similarity; at least 1.
        pooling: Which token's state stands for a prompt.
        calibration_splits: Splits whose questions plans and refits may see.
        eval_split: Split that is measured on. `val` holds out a share of its questions. Nothing is
            chosen on what is measured, so `test` gives an unbiased number too.
        holdout: Share of each domain's questions that is held out, where the splits are the same;
            above 0 and below 1.
        num_calibration_tokens: Tokens of each domain to calibrate on, at most; all domains get as
            many as the smallest has.
        block_size: Tokens in a calibration block; at least 2.
        num_eval_questions: Questions of each domain and language to measure on, at most; at least
            2.
        dtype: Dtype of the weights; `auto` keeps the checkpoint's.
        seed: Seed of the samples; at least 0.
        overwrite: Whether cells of other settings in `out_dir` may be deleted.
        wandb: Whether W&B gets tables, chart and figure: `offline` writes files in `out_dir`,
            `online` sends them.
    """
    settings = {**locals(), "information": asdict(information)}
    del settings["out_dir"], settings["overwrite"], settings["wandb"]
    _check(settings)
    kept = _kept_languages(domains, languages, translated)
    sides = read_sides(
        questions,
        domains,
        languages,
        extra_domains=extra_domains,
        calibration_splits=calibration_splits,
        eval_split=eval_split,
        holdout=holdout,
        seed=seed,
    )
    model = load_model(source, dtype)
    for number in num_removed:
        check_num_removed(number, num_layers(model))
    texts = domain_texts(
        sides,
        load_tokenizer(source),
        kept=kept,
        num_prompts=num_prompts,
        num_tokens=num_calibration_tokens,
        block_size=block_size,
        num_questions=num_eval_questions,
        max_length=context_length(model.config),
        seed=seed,
    )
    made_of = {
        "model": model_fingerprint(model),
        "questions": sides.fingerprints(),
        "settings": settings,
    }
    cells = {key: value for key, value in settings.items() if key not in FREE}
    with _folder(out_dir, {**made_of, "settings": cells}, overwrite=overwrite):
        study = Study(model, texts, out_dir, information, pooling)
        study.make_plans(rules, num_removed)
        study.measure(refits)
        rows, lines, figure = _report(study, made_of, refits, seed)
    group = Path(source).name
    with wandb_run(wandb, out_dir, f"{group} transfer", "transfer", group) as run:
        if run is not None:
            log_transfer(run, rows, lines, figure)


def _kept_languages(
    domains: Sequence[str], languages: Sequence[str], translated: Sequence[str] | None
) -> dict[str, Sequence[str]]:
    """Return the languages of each domain.

    Raises:
        ValueError: When they give fewer than two groups.
    """
    kept = {
        domain: languages if translated is None or domain in translated else languages[:1]
        for domain in domains
    }
    if sum(len(set(codes)) for codes in kept.values()) < 2:
        raise ValueError(
            f"`domains` must give at least two groups with their `languages`, got {domains} in "
            f"{languages}. Add a domain or a language."
        )
    return kept


def _check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError on an option out of range, before anything is loaded."""
    for name, allowed in {
        "rules": (*get_args(Measure), *get_args(SearchMethod)),
        "refits": get_args(Refitted),
        "calibration_splits": get_args(CalibrationSplit),
    }.items():
        unknown = [value for value in settings[name] if value not in allowed]
        if not settings[name] or unknown:
            raise ValueError(
                f"`{name}` must be some of {', '.join(allowed)}, got "
                f"{unknown[0] if unknown else 'none'}; use these names."
            )
    numbers = settings["num_removed"]
    if not numbers or min(numbers) < 1:
        raise ValueError(f"`num_removed` must hold numbers from 1 on, got {numbers}; try [3, 6].")
    lows = {"num_prompts": 1, "block_size": 2, "num_eval_questions": 2, "seed": 0}
    for name, low in {**lows, "num_calibration_tokens": 2 * settings["block_size"]}.items():
        if settings[name] < low:
            raise ValueError(f"`{name}` must be at least {low}, got {settings[name]}; raise it.")
    if not 0 < settings["holdout"] < 1:
        raise ValueError(
            f"`holdout` must be above 0 and below 1, got {settings['holdout']}; try 0.5."
        )
    for name in settings["translated"] or ():
        if name not in settings["domains"]:
            raise ValueError(f"`translated` must name some of `domains`, got {name!r}; add it.")


@contextmanager
def _folder(out_dir: Path, made_of: Mapping[str, Any], *, overwrite: bool) -> Iterator[None]:
    """Hold the folder whose cells belong to these settings; only one process works in it.

    Raises:
        ValueError: When it holds something else.
    """
    path = out_dir / SETTINGS
    if out_dir.exists() and any(out_dir.iterdir()):
        if not path.is_file():
            raise ValueError(
                f"`out_dir` must be free or hold {SETTINGS}, got {out_dir} without one. Choose "
                "another folder."
            )
        if read_json(path, schema=SCHEMA) != json.loads(json.dumps(made_of, default=str)):
            if not overwrite:
                raise ValueError(
                    f"`out_dir` must hold cells of the same settings, model and questions, got "
                    f"{out_dir} with others. Choose another folder, or replace it with "
                    "`--overwrite=true`."
                )
            shutil.rmtree(out_dir)
    write_json(path, made_of, schema=SCHEMA)
    try:
        with FileLock(out_dir / "transfer.lock", timeout=0):
            yield
    except Timeout as error:
        raise ValueError(
            f"another `lmerge transfer` runs in {out_dir}. Choose another `--out_dir`."
        ) from error


def _report(
    study: Study, made_of: Mapping[str, Any], refits: Sequence[Refitted], seed: int
) -> tuple[list[Row], list[Summary], Figure]:
    """Write the tables and the figure, print the summary, and return all three."""
    out_dir = study.folder
    rows = transfer_rows(
        study.plans, study.models, study.source_nats, study.tokens, refits=refits, seed=seed
    )
    lines = summaries(rows, study.plans, study.models, study.tokens, seed=seed)
    write_text(out_dir / "transfer.md", transfer_markdown(rows, lines))
    figure = transfer_figure(figure_panels(rows))
    save(figure, out_dir / "transfer.png")
    data = {
        **made_of,
        "num_tokens": {"calibration": study.num_tokens, "measured": study.measured_tokens()},
        "summary": [{**line._asdict(), "interval": line.interval._asdict()} for line in lines],
        "rows": [row_record(row) for row in rows],
        "provenance": provenance(),
    }
    write_json(out_dir / RESULT, json.loads(json.dumps(data)), schema=SCHEMA)
    title = "Loss above the source (nats/token)"
    print_columns(title, *summary_columns(lines), num_keys=3)
    return rows, lines, figure
