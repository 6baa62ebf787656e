"""Task files with which lm-eval asks local questions in the words of lmerge."""

import json

import yaml

from lmerge.data.prompts import prefix_text
from lmerge.data.records import LETTERS

DOC_TO_TEXT = (
    "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}"
    "\nAnswer:"
)


def write_tasks(folder, questions, examples, num_shots):
    """Write the questions and one task a subject; return the names of the tasks."""
    by_subject = {}
    for index, question in enumerate(questions):
        by_subject.setdefault(question.subject, []).append((index, question))
    for subject, asked in by_subject.items():
        write_rows(folder / f"{subject}_test.jsonl", asked)
        write_rows(folder / f"{subject}_dev.jsonl", enumerate(examples[subject, "en"]))
        files = {split: str(folder / f"{subject}_{split}.jsonl") for split in ("test", "dev")}
        task = {
            "task": f"local_{subject}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache")},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "num_fewshot": num_shots,
            "output_type": "multiple_choice",
            "description": prefix_text(subject, [], "letter"),
            "doc_to_text": DOC_TO_TEXT,
            "doc_to_choice": list(LETTERS),
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
        (folder / f"{subject}.yaml").write_text(yaml.safe_dump(task, allow_unicode=True))
    return [f"local_{subject}" for subject in by_subject]


def write_rows(path, rows):
    """Write questions with their places, one JSON object a line."""
    lines = [
        {"index": i, "question": q.text, "choices": q.choices, "answer": q.answer} for i, q in rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
