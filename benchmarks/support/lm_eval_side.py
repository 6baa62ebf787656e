"""lm-eval on local questions: its model with a clock, its fastest batch size, its answers."""

import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import datasets
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from support.lm_eval_tasks import write_tasks

from lmerge.data.tokens import letter_ids

PROBED = 8
"""Prompts on which batch sizes are compared."""


class Answers(NamedTuple):
    """What lm-eval computed for each question."""

    seconds: float
    prompts: list[tuple[int, ...]]
    """Token ids that the model saw."""
    logps: list[list[float]]
    """Log-probability of each letter."""


class Timed(HFLM):
    """lm-eval's model, which notes its time and the token ids that it is asked."""

    seconds = 0.0

    def loglikelihood(self, requests, disable_tqdm=False):
        """Note the time of encoding and scoring."""
        start = time.perf_counter()
        answers = super().loglikelihood(requests, disable_tqdm)
        self.seconds += time.perf_counter() - start
        return answers

    def _loglikelihood_tokens(self, requests, *args, **kwargs):
        # The text of a request -> the ids that the model sees.
        self.prompts = {text: (*ids, *more[:-1]) for text, ids, more in requests}
        return super()._loglikelihood_tokens(requests, *args, **kwargs)


def fastest_batch_size(model, tokenizer, prompts, sizes):
    """Return the batch size at which lm-eval is fastest on prompts around the median length."""
    middle = max(0, len(prompts) // 2 - PROBED // 2)
    probe = sorted(prompts, key=len)[middle : middle + PROBED]
    letters = letter_ids(tokenizer)
    requests = [
        ((str(i), str(letter)), list(prompt), [letter])
        for i, prompt in enumerate(probe)
        for letter in letters
    ]
    times = {}
    for size in sizes:
        lm = Timed(pretrained=model, tokenizer=tokenizer, batch_size=size)
        start = time.perf_counter()
        lm._loglikelihood_tokens(requests, disable_tqdm=True)
        times[size] = time.perf_counter() - start
        print(f"lm-eval, {len(probe)} prompts, batch size {size}: {times[size]:.1f} s", flush=True)
    return min(times, key=times.get)


def run_lm_eval(model, tokenizer, questions, examples, *, num_shots, batch_size):
    """Score all questions with lm-eval."""
    lm = Timed(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as name:
        tasks = write_tasks(Path(name), questions, examples, num_shots=num_shots)
        manager = TaskManager(include_path=name, include_defaults=False)
        found = simple_evaluate(
            lm, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=True
        )
    prompts, logps = [()] * len(questions), [[]] * len(questions)
    for sample in (sample for task in tasks for sample in found["samples"][task]):
        index = sample["doc"]["index"]
        prompts[index] = lm.prompts[tuple(sample["arguments"][0])]
        logps[index] = [float(answer[0][0]) for answer in sample["resps"]]
    return Answers(lm.seconds, prompts, logps)
