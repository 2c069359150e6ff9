"""A rank that is asked to stop while it still imports."""

import subprocess
import sys

STARTING = """
import os, signal
from parallel.start import hold_stop_signals

hold_stop_signals()
os.kill(os.getpid(), signal.SIGTERM)
os.kill(os.getpid(), signal.SIGINT)
from training.stopping import StopRequest

request = StopRequest()
before = request.asked
request.listen(says_so=True)
print(before, request.asked)
os.kill(os.getpid(), signal.SIGTERM)
print("alive")
"""


def test_a_signal_during_the_imports_is_remembered() -> None:
    done = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "False True\nalive\n"), done.stderr
    assert done.stderr == "asked by SIGINT: saving after this step\n", "once, however often it is asked"
