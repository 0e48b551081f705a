"""Semantic textual similarity (Agirre et al. 2013): 0 unrelated to 5 same meaning."""

from tasks.base import Task

STS = Task(
    name="sts",
    files={"train": "sts-train.csv", "dev": "sts-dev.csv", "test": "sts-test-student.csv"},
    text_columns=("sentence1", "sentence2"),
    label_column="similarity",
    num_outputs=1,
    label_range=(0, 5),
    loss="mse",
    metrics=("pearson", "spearman"),
    about="How alike two sentences are in meaning, from 0 (unrelated) to 5 (the same).",
    course_limits=(
        "Pairs from SemEval's tasks of semantic similarity (Agirre et al. 2013; Cer et al. 2017), in "
        "English: headlines, captions, forum posts. Grades are means over annotators.",
        "The course's own split: scores do not compare with those of the STS Benchmark.",
    ),
)
