"""Constraint expressions of a search space: arithmetic and comparisons over names, nothing else."""

from __future__ import annotations

import ast
from typing import Any

from harness.errors import UserError


def evaluate(expr: str, names: dict[str, Any]) -> Any:
    """Value of a constraint expression. Raises UserError when it cannot be read."""
    from simpleeval import DEFAULT_OPERATORS, SimpleEval

    functions = {"abs": abs, "min": min, "max": max}
    # `%` on a text would format it, to any length
    operators = {**DEFAULT_OPERATORS, ast.Mod: lambda a, b: divmod(a, b)[1]}
    reader = SimpleEval(names=names, functions=functions, operators=operators)
    for node in (ast.Attribute, ast.JoinedStr, ast.FormattedValue):
        del reader.nodes[node]
    try:
        tree = ast.parse(expr.strip(), mode="eval")  # one expression: no assignment, no second statement
        return reader.eval(expr, previously_parsed=tree.body)
    except Exception as error:  # whatever a stranger's expression runs into
        shown, reason = (" ".join(text.split())[:200] for text in (expr, str(error) or type(error).__name__))
        raise UserError(f"constraint `{shown}`: {reason}; write it over settings and counts") from None
