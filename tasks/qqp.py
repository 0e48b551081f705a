"""Quora Question Pairs: do two questions ask the same thing (1) or not (0)?"""

from tasks.base import Task

QQP = Task(
    name="qqp",
    files={"train": "quora-train.csv", "dev": "quora-dev.csv", "test": "quora-test-student.csv"},
    text_columns=("sentence1", "sentence2"),
    label_column="is_duplicate",
    num_outputs=2,
    label_range=(0, 1),
    loss="cross-entropy",
    metrics=("accuracy",),
)
