"""What the command lines share: help at once, without the libraries that take seconds to import."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

SLOW = ("torch", "numpy", "diffusers", "transformers", "av", "cv2", "gradio", "omegaconf")


@pytest.mark.parametrize("program", ["sample.generate", "sample.export", "sample.demo", "eval.evaluate", "eval.bench"])
def test_help_comes_at_once(program: str) -> None:
    """In under a second of processor time, and with nothing imported that a loaded machine would wait for."""
    code = f"""
import sys
from kling_programs.{program} import main
try:
    main(["--help"])
except SystemExit as stop:
    assert not stop.code
assert not (slow := set({SLOW}) & set(sys.modules)), slow
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) > 5 and resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 1
