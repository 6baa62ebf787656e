"""lmerge against lm-eval on the same 5-shot MMLU test questions: time, letters, a bare forward.

    python benchmarks/mmlu_eval.py [--data ../shared/data/mmlu] [--per_subject 10] [--threads 2]

Needs the extra `bench` (lm-eval 0.4.13). One process, one model object, float32, the same threads.
lm-eval reads the questions through a task YAML of each subject that is written here, with its cache
of logits on, at the fastest of a few batch sizes. Its own `mmlu` task has one space before the
subject and strips the question; the YAMLs keep the format of Hendrycks et al., so that both sides
see the same token ids, which is checked question by question. Timed are the encoding of the
prompts and the scoring; loading the model and the data is not, on either side.

The bare forward pass runs the tokens that have to be computed, each once: the few-shot prefix of
each subject and the rest of each question, as sequences of their own (no prefix to attend to),
batched by length as lmerge does it, with logits at the last position alone.

Ends with one JSON object: lm-eval's seconds over lmerge's, the share of questions with the same
letter, and lmerge's seconds over those of the bare forward pass.
"""

import argparse
import importlib.metadata
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from lmerge.data.batching import context_length
from lmerge.data.prompts import build_choice_batches, cut_rows
from lmerge.data.questions import load_questions
from lmerge.data.records import LETTERS
from lmerge.data.stage import first_questions
from lmerge.data.tokens import encode
from lmerge.prefix import PrefixCache
from lmerge.progress import track
from lmerge.score import score_choices
from lmerge.source import load_model, load_tokenizer

NUM_SHOTS = 5
LM_EVAL = "0.4.13"


class Ours(NamedTuple):
    """What lmerge computed for each question."""

    seconds: float
    prompts: list[tuple[int, ...]]
    """Token ids that the model saw."""
    logps: list[list[float]]
    """Log-probability of each letter."""


def read(folder, per_subject, num_subjects):
    """Return test questions of evenly spread subjects and the few-shot examples."""
    questions = load_questions(folder, "test")
    subjects = sorted({question.subject for question in questions})
    kept = set(subjects[:: -(-len(subjects) // num_subjects)]) if num_subjects else set(subjects)
    examples = {}
    for question in load_questions(folder, "dev"):
        examples.setdefault((question.subject, question.language), []).append(question)
    chosen = [question for question in questions if question.subject in kept]
    return first_questions(chosen, per_subject), examples


def make_batches(model, tokenizer, questions, examples, max_tokens):
    """Return the batches that `lmerge test` would score."""
    return build_choice_batches(
        questions,
        examples,
        tokenizer,
        scoring="letter",
        num_shots=NUM_SHOTS,
        max_tokens_per_batch=max_tokens,
        max_length=context_length(model.config),
    )


def run_lmerge(model, tokenizer, questions, examples, max_tokens):
    """Score all questions with lmerge; also return the batches."""
    start = time.perf_counter()
    batches = make_batches(model, tokenizer, questions, examples, max_tokens)
    prefixes = PrefixCache()
    scores = [score_choices(model, batch, prefixes) for batch in track(batches, "lmerge")]
    seconds = time.perf_counter() - start
    prompts, logps = [()] * len(questions), [[]] * len(questions)
    for batch, logp_B4 in zip(batches, scores, strict=True):
        for row, index in enumerate(batch.index_B.tolist()):
            tail = batch.token_BT[row][batch.segment_BT[row] == 0]
            prompts[index] = (*batch.prefix_P.tolist(), *tail.tolist())
            logps[index] = logp_B4[row].tolist()
    return Ours(seconds, prompts, logps), batches


def unique_sequences(batches):
    """Return the tokens that have to be computed: each prefix once, and what follows it."""
    prefixes = {tuple(batch.prefix_P.tolist()) for batch in batches}
    tails = [
        tuple(token_T[segment_T == 0].tolist())
        for batch in batches
        for token_T, segment_T in zip(batch.token_BT, batch.segment_BT, strict=True)
    ]
    return [*prefixes, *tails]


@torch.no_grad()
def run_bare(model, sequences, max_tokens):
    """Return the seconds of a forward pass of sequences, cut into batches as lmerge cuts."""
    cuts = cut_rows([len(sequence) for sequence in sequences], max_tokens)
    parts = [[sequences[i] for i in cut] for cut in cuts]
    start = time.perf_counter()
    for part in track(parts, "bare forward"):
        last_B = torch.tensor([len(sequence) - 1 for sequence in part])
        rows = [list(sequence) + [0] * (len(part[-1]) - len(sequence)) for sequence in part]
        state_BTD = model.model(input_ids=torch.tensor(rows), use_cache=False).last_hidden_state
        model.lm_head(state_BTD[torch.arange(len(part)), last_B]).log_softmax(dim=-1)
    return time.perf_counter() - start


def margin(logps):
    """Return how far the chosen letter is ahead of the next, in nats."""
    first, second = sorted(logps, reverse=True)[:2]
    return first - second


def compare(questions, ours, theirs):
    """Return one record a question; explain those whose letters differ."""
    records = []
    for question, mine, other, prompt, other_prompt in zip(
        questions, ours.logps, theirs.logps, ours.prompts, theirs.prompts, strict=True
    ):
        record = {
            "id": question.id,
            "lmerge": LETTERS[mine.index(max(mine))],
            "lm_eval": LETTERS[other.index(max(other))],
            "margin": margin(mine),
            "lm_eval_margin": margin(other),
            "largest_difference": max(abs(a - b) for a, b in zip(mine, other, strict=True)),
            "same_prompt": prompt == other_prompt,
        }
        records.append(record)
        if record["lmerge"] != record["lm_eval"]:
            cause = "other token ids"
            if record["same_prompt"]:
                near = record["margin"] <= 2 * record["largest_difference"]
                cause = "rounding" if near else "unexplained"
            print(
                "{id}: lmerge {lmerge} by {margin:.1e} nats, lm-eval {lm_eval} by "
                "{lm_eval_margin:.1e}; largest difference {largest_difference:.1e}: ".format(
                    **record
                )
                + cause
            )
    return records


def report(records, ours, bare, theirs, num_unique):
    """Print times and agreement; return the three numbers of the last line."""
    num_asked, num_tokens = len(records), sum(map(len, theirs.prompts))
    rows = (("lmerge", ours), ("bare forward of the unique tokens", bare))
    print(f"{num_asked} questions, {num_tokens} prompt tokens, {num_unique} of them unique")
    print(f"{theirs.seconds:9.1f} s  {num_asked / theirs.seconds:7.2f} questions/s  lm-eval")
    for name, seconds in rows:
        rate = f"{num_asked / seconds:7.2f} questions/s, {num_unique / seconds:6.0f} unique/s"
        print(f"{seconds:9.1f} s  {rate}  {name}")
    same = sum(record["lmerge"] == record["lm_eval"] for record in records)
    prompts = sum(record["same_prompt"] for record in records)
    largest = max(record["largest_difference"] for record in records)
    least = min(record["margin"] for record in records)
    print(f"same letter on {same} of {num_asked}; same token ids on {prompts} of {num_asked}")
    print(f"log-probabilities differ by at most {largest:.1e} nats; least margin {least:.1e}")
    return {
        "speedup_vs_lm_eval": round(theirs.seconds / ours, 3),
        "same_letter": round(same / num_asked, 5),
        "vs_bare_forward": round(ours / bare, 3),
    }


def parse():
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--data", default="../shared/data/mmlu", help="Folder of MMLU's CSV files.")
    parser.add_argument("--source", default="smollm2-135m", help="Model.")
    parser.add_argument("--per_subject", type=int, default=10, help="First questions of each.")
    parser.add_argument("--subjects", type=int, default=0, help="Subjects; 0 is all of them.")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads.")
    parser.add_argument("--eval_tokens", type=int, default=2048, help="Tokens in a batch of ours.")
    parser.add_argument("--turns", type=int, default=2, help="Timings of lmerge and bare forward.")
    parser.add_argument(
        "--batch_sizes", type=int, nargs="+", default=[1, 4, 8], help="Tried for lm-eval."
    )
    parser.add_argument("--no_lm_eval", action="store_true", help="Time ours alone.")
    parser.add_argument("--out", type=Path, default=None, help="JSON file for all records.")
    return parser.parse_args()


def check_lm_eval():
    """Stop with one line where the lm-eval that we compare with is not installed."""
    try:
        version = importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"lm-eval {LM_EVAL} must be installed; run: pip install '.[bench]'")
    if version != LM_EVAL:
        print(f"lm-eval is {version}, not {LM_EVAL}")


def main():
    """Time all three in turns, compare the letters, report."""
    options = parse()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    torch.set_num_threads(options.threads)
    if not Path(options.data).is_dir():
        sys.exit(f"`--data` must be a folder of MMLU's CSV files, got {options.data!r}")
    if not options.no_lm_eval:
        check_lm_eval()
    model, tokenizer = load_model(options.source, "float32"), load_tokenizer(options.source)
    questions, examples = read(options.data, options.per_subject, options.subjects)
    print(f"{options.source}, float32, {options.threads} threads, {NUM_SHOTS}-shot", flush=True)
    encode(tokenizer, ["warm up"])
    model(torch.arange(64)[None])
    times, bare_times = [], []
    for _ in range(options.turns):
        ours, batches = run_lmerge(model, tokenizer, questions, examples, options.eval_tokens)
        sequences = unique_sequences(batches)
        times.append(ours.seconds)
        bare_times.append(run_bare(model, sequences, options.eval_tokens))
        print(f"lmerge {times[-1]:.1f} s, bare forward {bare_times[-1]:.1f} s", flush=True)
    if options.no_lm_eval:
        return
    # Imported here, since --no_lm_eval does without it and it takes seconds.
    from support.lm_eval_side import fastest_batch_size, run_lm_eval

    size = fastest_batch_size(model, tokenizer, ours.prompts, options.batch_sizes)
    theirs = run_lm_eval(
        model, tokenizer, questions, examples, num_shots=NUM_SHOTS, batch_size=size
    )
    records = compare(questions, ours, theirs)
    seconds = [statistics.median(values) for values in (times, bare_times)]
    result = report(records, seconds[0], seconds[1], theirs, sum(map(len, sequences)))
    if options.out is not None:
        details = {**result, "seconds": [*seconds, theirs.seconds], "questions": records}
        options.out.write_text(json.dumps(details, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
