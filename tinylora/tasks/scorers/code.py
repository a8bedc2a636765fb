"""Which code a scorer of the user's own is: a digest of its file and of the files beside it that it imports."""

import ast
import hashlib
import sys
from importlib.util import resolve_name
from pathlib import Path
from types import ModuleType

_INSTALLED = ("site-packages", "dist-packages")


def code_digest(module_name: str) -> str:
    """SHA-256 (hex) over the source of an imported module and of what it imports from the same folder or package.

    Line ends do not count. Installed libraries and data files are left out. Empty where there is no source.
    """
    module = sys.modules.get(module_name)
    top = sys.modules.get(module_name.partition(".")[0])
    if module is None or top is None or not getattr(top, "__file__", None):
        return ""
    home = Path(str(top.__file__)).resolve().parent
    if getattr(top, "__path__", None) is not None and home.parent.name not in _INSTALLED:
        home = home.parent
    found: dict[str, bytes] = {}
    _collect(module, home, found)
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(f"{name}\n{len(found[name])}\n".encode() + found[name])
    return digest.hexdigest() if found else ""


def _collect(module: ModuleType, home: Path, found: dict[str, bytes]) -> None:
    """Put the module's source and that of its imports below `home` into `found`, by their paths there."""
    file = getattr(module, "__file__", None)
    if not file or not str(file).endswith(".py"):
        return
    path = Path(file).resolve()
    if not path.is_relative_to(home) or set(path.relative_to(home).parts) & set(_INSTALLED):
        return
    name = path.relative_to(home).as_posix()
    if name in found:
        return
    try:
        source = path.read_bytes().replace(b"\r\n", b"\n")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return
    found[name] = source
    for imported in _imports(tree, module):
        if imported in sys.modules:
            _collect(sys.modules[imported], home, found)


def _imports(tree: ast.AST, module: ModuleType) -> set[str]:
    """Full names of the modules that a source imports; those that are none are not in `sys.modules`."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            try:
                whole = resolve_name(base, getattr(module, "__package__", None) or None) if node.level else base
            except ImportError:
                continue
            names.update([whole, *(f"{whole}.{alias.name}" for alias in node.names)])
    return {".".join(parts[: end + 1]) for name in names for parts in [name.split(".")] for end in range(len(parts))}
