"""Memory is measured as the system has it; what is freed stays for the next step, or goes back when asked."""

import subprocess
import sys

import pytest

PROGRAM = """
import re, torch
from pathlib import Path
from training.memory import give_back_memory, peak_memory_mib

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 2**10

start = peak_memory_mib(torch.device("cpu"))
# Blocks small enough for the heap, and one behind them that stays: the heap's end cannot move.
blocks = [torch.ones(2**14) for _ in range(1600)]
stays = torch.ones(2**14)
full = resident()
del blocks
kept = resident()
give_back_memory()
print(start, full, kept, resident(), peak_memory_mib(torch.device("cpu")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and glibc's malloc is Linux's")
def test_what_is_freed_goes_back_and_the_peak_stays():
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    start, full, kept, after, peak = map(float, run.stdout.split())
    assert full > start + 90  # 100 MiB of blocks
    assert kept > full - 10  # freed, and not given back
    assert after < full - 80
    assert peak >= full - 1


KEPT = """
import resource, torch
from training.memory import give_back_memory, keep_freed_memory

def faults_of_a_step():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.ones(2**20) for _ in range(20)]  # 4 MiB each: malloc would map each of its own
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults_of_a_step()
before = faults_of_a_step()
keep_freed_memory()
faults_of_a_step()
after = faults_of_a_step()
give_back_memory()
print(before, after, faults_of_a_step())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is Linux's")
def test_what_is_kept_costs_no_page_faults_again():
    run = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, check=True)
    before, after, given_back = map(int, run.stdout.split())
    assert before > 20  # 80 MiB, by the page, or by the huge page
    assert after < before / 10
    assert given_back > 20
