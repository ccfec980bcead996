"""Integer arithmetic on named sizes, in contracts and families of kernels."""

import ast
from typing import Any

from osmium.errors import KernelError

__all__ = ["Expression", "split_at_commas"]


class Expression:
    """Integer arithmetic on named sizes.  Raises: KernelError for anything else."""

    def __init__(self, text: str, where: str) -> None:
        self.text = text.strip()
        try:
            tree = ast.parse(self.text, mode="eval")
            self.names = tuple(_names(tree))
            """Names of sizes, in order of appearance, each once."""
            integers = ast.fix_missing_locations(_Integers().visit(tree))
            self.source = ast.unparse(integers)
            """The expression in Python, with integer division."""
            self._code = compile(integers, where, "eval")
        except (SyntaxError, ValueError) as error:
            raise KernelError(f"{where}: {self.text!r} is not an expression: {error}") from None

    def __call__(self, sizes: dict[str, Any]) -> int:
        return int(eval(self._code, {"__builtins__": {}, "min": min, "max": max}, sizes))


class _Integers(ast.NodeTransformer):
    """ceil(a / b) becomes -(-a // b); every other division becomes a floor division."""

    ALLOWED = (
        ast.Expression, ast.BinOp, ast.UnaryOp, ast.USub, ast.Compare, ast.Name, ast.Load,
        ast.Constant, ast.Call, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod,
        ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE,
    )  # fmt: skip

    def visit(self, node: ast.AST) -> Any:
        if not isinstance(node, self.ALLOWED):
            raise ValueError(f"{type(node).__name__} is not arithmetic")
        return super().visit(node)

    def visit_Constant(self, node: ast.Constant) -> Any:
        if type(node.value) is not int:
            raise ValueError(f"{node.value!r} is not an integer")
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else "?"
        if name in ("min", "max"):
            return self.generic_visit(node)
        (argument,) = node.args if len(node.args) == 1 else (None,)
        if name != "ceil":
            raise ValueError(f"{name}() is not known")
        if not isinstance(argument, ast.BinOp) or not isinstance(argument.op, ast.Div):
            raise ValueError("ceil takes a division, ceil(a / b)")
        top, bottom = self.visit(argument.left), self.visit(argument.right)
        floor = ast.BinOp(ast.UnaryOp(ast.USub(), top), ast.FloorDiv(), bottom)
        return ast.UnaryOp(ast.USub(), floor)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        self.generic_visit(node)
        if isinstance(node.op, ast.Div):
            node.op = ast.FloorDiv()
        return node


def _names(tree: ast.AST) -> list[str]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    found.sort(key=lambda node: (node.lineno, node.col_offset))
    return [n for n in dict.fromkeys(node.id for node in found) if n not in ("ceil", "min", "max")]


def split_at_commas(text: str) -> list[str]:
    """Split at commas outside of brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([") - (letter in ")]")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts
