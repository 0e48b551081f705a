"""The tasks by name. A new one is a file with a `Task` and a line here."""

from tasks.qqp import QQP
from tasks.sst import SST
from tasks.sts import STS

TASKS = {task.name: task for task in (SST, QQP, STS)}
