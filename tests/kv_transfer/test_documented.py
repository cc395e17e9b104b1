"""The page that newcomers read first knows every module that moves KV."""

from pathlib import Path

import vllm.distributed.kv_transfer as package

ROOT = Path(package.__file__).parent
PAGE = ROOT.parents[2] / "docs" / "architecture.md"


def test_every_module_stands_in_the_architecture():
    text = PAGE.read_text()
    modules = [path for path in ROOT.rglob("*.py") if path.name != "__init__.py"]
    assert len(modules) > 40
    assert not [str(path) for path in modules if f"{path.name}`" not in text]
