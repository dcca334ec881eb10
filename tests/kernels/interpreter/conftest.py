"""These tests run Triton kernels on a CPU, which Triton decides when it is imported: they are collected only under TRITON_INTERPRET=1.

`test_interpreter.py` beside this folder runs them so, in a process of their own; to run them by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreter
"""

import os
import sys
from pathlib import Path

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*.py"]
sys.path.insert(0, str(Path(__file__).parents[1]))  # kernel_cases
