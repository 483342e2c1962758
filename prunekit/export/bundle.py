"""Bundling definitions, and everything in prunekit that they need, into one Python file.

The sources are parsed, the definitions that the given ones reach are copied in the order of their modules, and names
that two modules share (`cut`, `group`) get their module's name in front. So the file is never older than the code.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path

_SCOPES = (ast.FunctionDef, ast.Lambda, ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)
Key = tuple[str, str]  # (module, name); the name "" stands for the module itself, used as a value


@dataclass
class _Module:
    """A parsed module: its definitions, what it imports, and statements that set attributes of a definition."""

    name: str
    package: str
    tree: ast.Module
    definitions: dict[str, ast.stmt] = field(default_factory=dict)
    attached: dict[str, list[ast.stmt]] = field(default_factory=dict)
    external: dict[str, str] = field(default_factory=dict)  # local name -> import statement
    internal: dict[str, Key] = field(default_factory=dict)  # local name -> where it is defined

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def attributes(self) -> set[str]:
        """All names that the module reads as attributes."""
        return {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}


def bundle(
    roots: Iterable[Key], instead: Mapping[Key, Key], title: str, last: str = "", enclosed: str | None = None
) -> str:
    """Return the source of one file with some definitions and everything in prunekit that they need.

    Args:
        roots: definitions of the file, as (module, name).
        instead: replacements of definitions, {replaced (module, name): its replacement (module, name)}.
        title: the file's docstring.
        last: a statement at the end, which may use the roots' names.
        enclosed: the only name that the file defines; all other definitions are local to a function. diffusers runs
            files of the same name from several folders in one module, where one file's definitions would replace
            another's. A class of such a file cannot be pickled. None: the file defines all names.

    """
    return _Bundle(instead).write(roots, title, last, enclosed)


class _Bundle:
    def __init__(self, instead: Mapping[Key, Key]):
        self.instead = instead
        self.modules: dict[str, _Module] = {}
        self.reached: dict[Key, set[str]] = {}  # of a module used as a value: the names read from it
        self.imports: set[str] = set()
        self.order: list[str] = []  # modules, each after those that it imports

    def write(self, roots: Iterable[Key], title: str, last: str, enclosed: str | None) -> str:
        for root in roots:
            self._reach(root)
        for module in sorted({module for module, _ in self.reached}):
            self._put(module, set())
        self._name()
        bound = [statement.split()[-1] for statement in self.imports]
        assert len(set(bound)) == len(bound), f"two imports give one name: {sorted(self.imports)}"
        body = [
            self._renamed(self.modules[module], statement)
            for module in self.order
            for statement in self._statements(module)
        ]
        body += ast.parse(last).body
        if enclosed is not None:
            body = _function("_defined", body, enclosed)
        parts = [f'"""{title}"""', "from __future__ import annotations", "\n".join(sorted(self.imports))]
        return "\n\n".join([*parts, *map(ast.unparse, body)]) + "\n"

    def module(self, name: str) -> _Module:
        """Parse a module, once."""
        if name not in self.modules:
            package = name if _is_package(name) else name.rpartition(".")[0]
            origin = _spec(name).origin
            assert origin is not None
            tree = ast.parse(Path(origin).read_text(encoding="utf-8"))
            module = self.modules[name] = _Module(name, package, tree)
            for statement in tree.body:
                _enter(module, statement)
        return self.modules[name]

    def resolve(self, key: Key) -> Key | str | None:
        """Return where a module's name is defined: a key, another package's import statement, or None (a builtin)."""
        key = self.instead.get(key, key)
        module = self.module(key[0])
        if not key[1] or key[1] in module.definitions:
            return key
        if key[1] in module.internal:
            source, name = module.internal[key[1]]
            if _is_package(source) and importlib.util.find_spec(f"{source}.{name}") is not None:
                return (f"{source}.{name}", "")
            return self.resolve((source, name))
        return module.external.get(key[1])

    def _reach(self, key: Key) -> None:
        module, name = key
        if key in self.reached:
            return
        self.reached[key] = set()
        owner = self.module(module)
        for other, statement in owner.definitions.items():
            if statement is owner.definitions[name]:  # names that one statement defines together
                self._reach((module, other))
        for statement in [owner.definitions[name], *owner.attached.get(name, ())]:
            for reference in _references(statement, owner):
                self._follow(owner, *reference)

    def _put(self, module: str, seen: set[str]) -> None:
        """Put a module into the order, after those that it imports."""
        if module in seen or module not in self.modules:
            return
        seen.add(module)
        for source, name in self.modules[module].internal.values():
            self._put(source, seen)
            self._put(f"{source}.{name}", seen)
        if module not in self.order:
            self.order.append(module)

    def _follow(self, owner: _Module, name: str, attribute: str | None) -> None:
        target = self.resolve((owner.name, name))
        if isinstance(target, str):
            self.imports.add(target)
        elif target is not None and not target[1] and attribute is not None:
            self._follow_key(self.resolve((target[0], attribute)))
        elif target is not None and not target[1]:  # the module itself is used as a value
            asked = owner.attributes & set(self.module(target[0]).definitions)
            self.imports.add("from types import SimpleNamespace")
            for item in sorted(asked):
                self._follow_key((target[0], item))
            self.reached.setdefault(target, set()).update(asked)
        else:
            self._follow_key(target)

    def _follow_key(self, key: Key | str | None) -> None:
        if isinstance(key, str):
            self.imports.add(key)
        elif key is not None:
            self._reach(key)

    def _name(self) -> None:
        """Give every reached definition a unique name."""
        taken: dict[str, list[Key]] = {}
        for key in self.reached:
            taken.setdefault(key[1], []).append(key)
        self.names = {}
        imported = {statement.split()[-1] for statement in self.imports}
        for name, keys in taken.items():
            for module, _ in keys:
                stem, is_shared = self.modules[module].stem, len(keys) > 1 or name in imported
                self.names[module, name] = f"_{stem}_{name.strip('_')}" if is_shared else name
        self.names |= {key: f"_{self.modules[key[0]].stem}" for key in self.reached if not key[1]}
        assert len(set(self.names.values())) == len(self.names), "two definitions got one name"

    def _renamed(self, module: _Module, statement: ast.stmt) -> ast.stmt:
        statement = _Rename(self, module).renamed(statement)
        if isinstance(statement, ast.FunctionDef | ast.ClassDef):
            statement.name = self.names.get((module.name, statement.name), statement.name)
        return statement

    def _statements(self, module: str) -> Iterator[ast.stmt]:
        owner = self.modules[module]
        wanted = {name for key, name in self.reached if key == module}
        attached = {id(item): root for root, items in owner.attached.items() for item in items}
        for statement in owner.tree.body:
            root = attached.get(id(statement))
            if root in wanted or any(owner.definitions.get(name) is statement for name in wanted):
                yield statement
        if (module, "") in self.reached:
            asked = sorted(self.reached[module, ""])
            pairs = ", ".join(f"{name}={self.names[module, name]}" for name in asked)
            yield ast.parse(f"{self.names[module, '']} = SimpleNamespace({pairs})").body[0]


def _enter(module: _Module, statement: ast.stmt) -> None:
    """Enter one statement into a module's tables of definitions and imports."""
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            local = alias.asname or alias.name
            module.external[local] = ast.unparse(ast.Import([alias]))
    elif isinstance(statement, ast.ImportFrom):
        base = statement.module or ""
        if statement.level:
            parts = module.package.split(".")
            base = ".".join([*parts[: len(parts) - statement.level + 1], *filter(None, [statement.module])])
        for alias in statement.names:
            if base.partition(".")[0] == __package__.partition(".")[0]:
                module.internal[alias.asname or alias.name] = (base, alias.name)
            elif base != "__future__":
                module.external[alias.asname or alias.name] = ast.unparse(ast.ImportFrom(base, [alias], 0))
    elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
        module.definitions[statement.name] = statement
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        for target in statement.targets if isinstance(statement, ast.Assign) else [statement.target]:
            names = target.elts if isinstance(target, ast.Tuple) else [target]
            if all(isinstance(name, ast.Name) for name in names):
                module.definitions |= {name.id: statement for name in names if isinstance(name, ast.Name)}
            else:
                root = next(node.id for node in ast.walk(target) if isinstance(node, ast.Name))
                module.attached.setdefault(root, []).append(statement)


def _function(name: str, body: list[ast.stmt], result: str) -> list[ast.stmt]:
    """Return a function that runs statements and returns `result`, and an assignment of its value to `result`."""
    made = ast.parse(f"def {name}():\n    return {result}\n\n{result} = {name}()").body
    assert isinstance(made[0], ast.FunctionDef)
    made[0].body[:0] = body
    return made


def _spec(name: str) -> ModuleSpec:
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"there is no module {name}"
    return spec


def _is_package(name: str) -> bool:
    return _spec(name).submodule_search_locations is not None


def _bound(node: ast.AST) -> set[str]:
    """Return the names that a function binds: its arguments, and the names that it assigns."""
    arguments = {item.arg for item in ast.walk(node) if isinstance(item, ast.arg)}
    stored = {item.id for item in ast.walk(node) if isinstance(item, ast.Name) and isinstance(item.ctx, ast.Store)}
    return arguments | stored


class _Scoped(ast.NodeTransformer):
    """A visitor of a statement that tracks which names are bound by the functions around a node."""

    def __init__(self) -> None:
        self.bound: set[str] = set()

    def visit(self, node: ast.AST) -> ast.AST:
        before = self.bound
        if isinstance(node, _SCOPES):
            self.bound = self.bound | _bound(node)
        node = super().visit(node)
        self.bound = before
        return node


class _Find(_Scoped):
    def __init__(self, module: _Module):
        super().__init__()
        self.module = module
        self.references: list[tuple[str, str | None]] = []

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id not in self.bound:
            self.references.append((node.value.id, node.attr))
            return node
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self.bound:
            self.references.append((node.id, None))
        return node


def _references(statement: ast.stmt, module: _Module) -> list[tuple[str, str | None]]:
    """Return (name, attribute read from it or None) for every name that a statement reads from its module."""
    finder = _Find(module)
    finder.visit(statement)
    return finder.references


class _Rename(_Scoped):
    def __init__(self, bundle: _Bundle, module: _Module):
        super().__init__()
        self.bundle, self.module = bundle, module

    def renamed(self, statement: ast.stmt) -> ast.stmt:
        renamed = self.visit(statement)
        assert isinstance(renamed, ast.stmt)
        return renamed

    def _named(self, name: str) -> str | None:
        target = self.bundle.resolve((self.module.name, name)) if name not in self.bound else None
        return self.bundle.names.get(target) if isinstance(target, tuple) else None

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if isinstance(node.value, ast.Name) and node.value.id not in self.bound:
            target = self.bundle.resolve((self.module.name, node.value.id))
            if isinstance(target, tuple) and not target[1]:
                key = self.bundle.resolve((target[0], node.attr))
                assert isinstance(key, tuple)
                return ast.Name(self.bundle.names[key], node.ctx)
        return self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name(self._named(node.id) or node.id, node.ctx)
