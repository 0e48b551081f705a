"""What the kernels compile to for GPUs that are not here, and that the audit sees what it is there to see."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[1]
# In two processes of about the same length, for pytest -n 2
PARTS = (("down", "merge", "drop"), ("up", "outer", "outer_dot", "backward_x", "backward_y"))


def audit(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """In a process of its own: kernels imported under the interpreter do not compile."""
    given = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
    command = [sys.executable, "-m", "kernels.audit", *arguments]
    return subprocess.run(command, cwd=ROOT, env=given | environment, capture_output=True, text=True)


@pytest.mark.parametrize("operations", PARTS, ids="-".join)
def test_every_kernel_compiles_to_what_it_should(operations):
    run = audit(*operations)
    assert run.returncode == 0, run.stdout + run.stderr
    for operation in operations:
        assert f"\n{operation} sm_80 r8 768 fp16" in run.stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["sideways"], {}, "sideways is no operation"),
        (["--what"], {}, "unrecognized arguments"),
        (["drop"], {"TRITON_INTERPRET": "1"}, "TRITON_INTERPRET is set"),
    ],
    ids=str,
)
def test_bad_usage_is_a_line_and_code_2(arguments, environment, said):
    run = audit(*arguments, **environment)
    assert run.returncode == 2
    assert run.stderr.startswith("error: ")
    assert said in run.stderr
    assert len(run.stderr.splitlines()) == 1


class TestFaults:
    """The checks themselves, on measurements made up for them."""

    @pytest.fixture
    def case(self):
        from kernels.audit import cases

        return next(one for one in cases("down") if one.architecture == 80 and one.dtype == "fp16")

    @pytest.fixture
    def good(self):
        compiled = pytest.importorskip("kernels.compiled").Compiled
        return compiled(
            registers=64, stack=0, local=0, shared=1024, instructions=400, widest=16, narrowest=4, mma=True,
            tf32=False,
        )  # fmt: skip

    def test_what_is_good_has_none(self, case, good):
        from kernels.audit import faults

        assert faults(case, good, 400) == faults(case, good, None) == []
        assert faults(case._replace(dtype="fp32"), good._replace(mma=False), 400) == []

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"stack": 8}, "8 bytes spilled"),
            ({"local": 1}, "1 bytes spilled"),
            ({"registers": 169}, "169 registers"),
            ({"shared": 97 * 1024}, "bytes of shared memory"),
            ({"widest": 8}, "loads 8 bytes at the widest"),
            ({"narrowest": 2}, "loads as few as 2 bytes"),
            ({"mma": False}, "no tensor cores"),
            ({"tf32": True}, "TF32"),
            ({"instructions": 441}, "441 instructions, 400 when tuned"),
            ({"instructions": 359}, "359 instructions, 400 when tuned"),
        ],
        ids=str,
    )
    def test_each_fault_is_named(self, case, good, change, said):
        from kernels.audit import faults

        (fault,) = faults(case, good._replace(**change), 400)
        assert said in fault

    def test_tensor_cores_and_48_kib_are_too_much_for_a_t4(self, case, good):
        from kernels.audit import faults

        found = faults(case._replace(architecture=75), good._replace(shared=49 * 1024), 400)
        assert found == [
            "50176 bytes of shared memory, over 49152",
            "tensor cores, which were not meant",
        ]


def test_every_launch_of_the_table_is_compiled():
    from kernels.audit import OPERATIONS, cases
    from kernels.launch import KERNEL_OF, TABLE

    compiled = {(KERNEL_OF.get(one, one), case.launch) for one in OPERATIONS for case in cases(one)}
    missing = {
        (operation, architecture, limit)
        for (operation, architecture), entries in TABLE.items()
        for limit, launch in entries
        if (operation, launch) not in compiled
    }
    assert missing == set()
