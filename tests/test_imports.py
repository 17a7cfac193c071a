"""What a file of the package takes from another is public there."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "pyro_lrblora"


def private_imports(source: str) -> list[str]:
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [name.name for node in imports if node.module != "__future__" for name in node.names if name.name[0] == "_"]


def test_no_private_name_crosses_files():
    assert private_imports("from .start import _same\nfrom .start import same") == ["_same"]
    found = {str(path): private_imports(path.read_text()) for path in PACKAGE.rglob("*.py")}
    assert len(found) > 100
    assert {path: names for path, names in found.items() if names} == {}
