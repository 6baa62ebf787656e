"""Task files with which lm-eval asks local questions in the words of lmerge."""

import json

import yaml

from lmerge.data.prompts import prefix_text
from lmerge.data.records import LETTERS

FORMATS = {
    "letter": {
        "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\n"
        "D. {{choices[3]}}\nAnswer:",
        "doc_to_choice": list(LETTERS),
    },
    "cloze": {"doc_to_text": "{{question}}\nAnswer:", "doc_to_choice": "{{choices}}"},
}
"""Prompts of lmerge in the words of lm-eval."""


def write_tasks(folder, questions, examples, *, num_shots, scoring="letter"):
    """Write the questions and one task a subject; return the names of the tasks."""
    by_subject = {}
    for index, question in enumerate(questions):
        by_subject.setdefault(question.subject, []).append((index, question))
    for subject, asked in by_subject.items():
        write_rows(folder / f"{subject}_test.jsonl", asked)
        write_rows(folder / f"{subject}_dev.jsonl", enumerate(examples[subject, "en"]))
        files = {split: str(folder / f"{subject}_{split}.jsonl") for split in ("test", "dev")}
        task = {
            "task": f"{scoring}_{subject}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": num_shots,
            "output_type": "multiple_choice",
            "description": prefix_text(subject, [], scoring),
            **FORMATS[scoring],
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{scoring}_{subject}.yaml").write_text(yaml.safe_dump(task))
    return [f"{scoring}_{subject}" for subject in by_subject]


def write_rows(path, rows):
    """Write questions with their places, one JSON object a line."""
    lines = [
        {"index": i, "question": q.text, "choices": q.choices, "answer": q.answer} for i, q in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
