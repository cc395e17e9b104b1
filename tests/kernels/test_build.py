"""setup.py builds the extension where it can, and lets the installation go on where it can't."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def build(tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            *(sys.executable, "setup.py", "-q", "build_ext"),
            *("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp")),
        ],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_without_a_compiler_the_installation_goes_on(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="/nonexistent/c++")
    assert result.returncode == 0, result.stderr
    assert "could not be built" in result.stderr and "Set CXX" in result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_a_compiler_that_fails_is_named_and_the_installation_goes_on(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="false")
    assert result.returncode == 0
    assert "'false'" in result.stderr
    assert not list(tmp_path.rglob("*.so"))
