"""Errors as one line, whatever is amiss."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def test_a_torch_that_can_not_be_imported_is_no_traceback(tmp_path: Path) -> None:
    """Memory may not do for it; the classes of errors, which need it, can't be imported then either."""
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: failed to map segment')")
    command = [sys.executable, "-c", "from cilnorm.cli.app import main; main()", "run"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    found = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 1
    assert all(line.startswith("cilnorm: ") for line in found.stderr.splitlines())
    assert found.stderr.splitlines()[-1] == "cilnorm: ImportError: libtorch_cpu.so: failed to map segment"
