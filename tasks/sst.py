"""Stanford Sentiment Treebank, five classes (Socher et al. 2013): 0 very negative to 4 very positive."""

from tasks.base import Task

SST = Task(
    name="sst",
    files={"train": "ids-sst-train.csv", "dev": "ids-sst-dev.csv", "test": "ids-sst-test-student.csv"},
    text_columns=("sentence",),
    label_column="sentiment",
    num_outputs=5,
    label_range=(0, 4),
    loss="cross-entropy",
    metrics=("accuracy",),
    about="The sentiment of a sentence, from 0 (very negative) to 4 (very positive).",
    course_limits=(
        "Sentences of English film reviews (Socher et al. 2013): one domain, one register, and the opinions "
        "of reviewers. The five classes were cut from a finer scale, so neighbours overlap.",
    ),
    ordered=True,
)
