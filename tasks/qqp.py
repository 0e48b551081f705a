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
    about="Whether two questions ask the same: 1 or 0.",
    course_limits=(
        "Questions asked on Quora, in English. Its publisher calls the labels not perfect; the pairs were "
        "chosen, so the share of duplicates is not that of questions as they are asked.",
        "The course's own split: scores do not compare with GLUE's.",
    ),
)
