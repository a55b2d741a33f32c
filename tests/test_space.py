"""A question is either whole or refused in one line; a constraint computes and does nothing else.

pytest tests/test_space.py
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.errors import UserError
from harness.expression import evaluate
from harness.space import RUN_FIELDS, Param, Space, load_space, parse_space, settings_diff

GOOD = """
name = "good"
[baseline]
lr = 0.02
width = 4
router = "linear"
ramp = "none"
ramp_end = 0.3
ramp_shape = "flat"
[params.lr]
kind = "float"
low = 0.001
high = 0.1
log = true
[params.width]
kind = "int"
low = 2
high = 10
step = 2
[params.router]
kind = "categorical"
choices = ["linear", "mlp"]
[params.ramp]
kind = "categorical"
choices = ["none", "random"]
[params.ramp_end]
kind = "float"
low = 0.1
high = 0.6
when = { ramp = "random" }
[params.ramp_shape]
kind = "categorical"
choices = ["flat", "steep"]
when = { ramp_end = [0.3, 0.6] }
[[rungs]]
depth = 2
tokens = 1000
[[rungs]]
depth = 4
tokens = 2000
[budget]
hours = 1.0
"""

DESIGN = '[[candidates]]\nname = "a"\nsettings = '
RESERVED = DESIGN.replace('"a"', '"source"')
# What is replaced in GOOD, by what, and what the one line must hold.
BROKEN = [
    ('name = "good"', 'name = "good"\nquestions = "?"', ["questions", "'?'", "unknown key", "remove"]),
    ("[baseline]", "[metric]\nsplit = 3\n[baseline]", ["metric.split", "3", "unknown key"]),
    ("low = 0.001", "low = 0.001\nlo = 1", ["params.lr.lo", "1", "unknown key"]),
    ("tokens = 1000", "tokens = 1000\nbudget = 7", ["rungs.0.budget", "7", "unknown key"]),
    ("[budget]", "[budget]\nminutes = 9", ["budget.minutes", "9", "unknown key"]),
    ("[budget]", "[decision]\nlook = [1]\n[budget]", ["decision.look", "unknown key"]),
    ("[budget]", "[agent]\nkey = 'x'\n[budget]", ["agent.key", "'x'", "unknown key"]),
    ("[budget]", "[match]\nholds = []\n[budget]", ["match.holds", "unknown key"]),
    ("[budget]", "[[constraints]]\nexp = '1'\n[budget]", ["constraints.0.exp", "missing"]),
    ('name = "good"', "", ["name", "missing", "add"]),
    ("depth = 2", "", ["rungs.0.depth", "missing"]),
    ('kind = "int"', "", ["params.width.kind", "missing"]),
    ('name = "good"', 'name = "../good"', ["name", "'../good'", "pattern"]),
    ('name = "good"', 'name = "a b"', ["name", "'a b'"]),
    ('name = "good"', 'name = "good\\n"', ["name", "pattern"]),
    ('name = "good"', 'name = ""', ["name"]),
    ('name = "good"', "name = 3", ["name", "3", "string"]),
    ("low = 0.001", "low = 0.2", ["params.lr", "0.2", "0.1", "swap"]),
    ("low = 0.001", "low = 0", ["params.lr", "log", "0"]),
    ("low = 0.001", "low = '0.001'", ["params.lr.low", "'0.001'", "number"]),
    ("low = 0.001", "low = nan", ["params.lr.low", "nan", "finite"]),
    ("high = 0.1", "high = inf", ["params.lr.high", "inf", "finite"]),
    ("high = 0.1", "high = true", ["params.lr.high", "True", "number"]),
    ("low = 0.001", "", ["params.lr", "`low`"]),
    ("log = true", "log = 1", ["params.lr.log", "1", "boolean"]),
    ("log = true", "log = true\nstep = 0.1", ["params.lr", "step", "log"]),
    ("step = 2", "step = 0", ["params.width", "step"]),
    ("step = 2", "step = 0.5", ["params.width", "whole", "0.5"]),
    ("step = 2", "choices = [2]", ["params.width", "choices"]),
    ('choices = ["linear", "mlp"]', "choices = []", ["params.router", "choices"]),
    ('choices = ["linear", "mlp"]', 'choices = ["linear", "linear"]', ["params.router", "twice"]),
    ('choices = ["linear", "mlp"]', 'choices = [["linear"]]', ["params.router.choices.0", "text"]),
    ('choices = ["linear", "mlp"]', 'choices = ["linear"]\nlow = 1', ["params.router", "only `choices`"]),
    ("lr = 0.02", "lr = 0.2", ["baseline.lr", "0.2", "0.1"]),
    ("lr = 0.02", "lr = true", ["baseline.lr", "True"]),
    ("lr = 0.02", "lr = nan", ["baseline.lr", "nan", "finite"]),
    ("lr = 0.02", "lr = [0.02]", ["baseline.lr", "number"]),
    ("lr = 0.02", "lr = 2024-01-01", ["baseline.lr", "number"]),
    ("lr = 0.02", "lr = 1" + "0" * 400, ["baseline.lr"]),
    ("lr = 0.02", "lr = 1" + "0" * 5000, ["not TOML", "4300"]),
    ("lr = 0.02", "lr = " + "[" * 5000 + "]" * 5000, ["not TOML"]),
    ("lr = 0.02", "", ["params.lr", "baseline", "add"]),
    ("width = 4", "width = 5", ["baseline.width", "5", "step 2"]),
    ("width = 4", "width = 4.5", ["baseline.width", "4.5"]),
    ("width = 4", "width = 4\nseed = 1", ["seed", "remove"]),
    ("width = 4", "width = 4\ndepth = 1", ["depth", "remove"]),
    ("width = 4", "width = 4\ntokens = 1", ["tokens", "remove"]),
    ("width = 4", "width = 4\ndevice = 'cpu'", ["device", "remove"]),
    ('{ ramp = "random" }', '{ slope = "random" }', ["params.ramp_end.when", "slope", "baseline"]),
    ('{ ramp = "random" }', '{ ramp = "rnadom" }', ["params.ramp_end.when.ramp", "rnadom", "random"]),
    ('{ ramp = "random" }', "{ ramp_end = 0.3 }", ["params.ramp_end.when", "move it up"]),
    ('{ ramp = "random" }', '{ ramp_shape = "flat" }', ["params.ramp_end.when", "move it up"]),
    ("depth = 4", "depth = 2", ["rungs", "rise", "[2, 2]"]),
    ("depth = 4", "depth = 1", ["rungs", "rise", "[2, 1]"]),
    ("depth = 4", "depth = true", ["rungs.1.depth", "True", "integer"]),
    ("depth = 4", "depth = 4.0", ["rungs.1.depth", "4.0", "integer"]),
    ("depth = 4", "depth = 0", ["rungs.1.depth", "0", "greater"]),
    ("tokens = 1000", "tokens = -5", ["rungs.0.tokens", "-5", "greater"]),
    ("tokens = 1000", "tokens = '1000'", ["rungs.0.tokens", "'1000'", "integer"]),
    ("tokens = 1000", "tokens = 1000\nseeds = 1", ["rungs.0.seeds", "1", "greater"]),
    ("hours = 1.0", "hours = inf", ["budget.hours", "inf", "finite"]),
    ("hours = 1.0", "hours = nan", ["budget.hours", "nan"]),
    ("hours = 1.0", "hours = 1e999", ["budget.hours", "inf"]),
    ("hours = 1.0", "hours = 0", ["budget.hours", "0", "greater"]),
    ("hours = 1.0", "hours = true", ["budget.hours", "True"]),
    ("[budget]", "[decision]\nlooks = [1, 2]\n[budget]", ["decision", "one value per look"]),
    ("[budget]", "[decision]\nlooks = [1, 4, 2, 8]\n[budget]", ["decision", "rise"]),
    ("[budget]", "[decision]\ndrop = [3.0, 0.8, 1.3, 1.7]\n[budget]", ["decision", "at or below"]),
    ("[budget]", "[decision]\nkeep = [2.6, 2.2, 1.9, 1.8]\n[budget]", ["decision", "1.8", "equal"]),
    ("[budget]", "[decision]\nplacebo_share = 1.0\n[budget]", ["decision.placebo_share", "1.0", "less"]),
    ("[budget]", "[match]\nhold = ['params']\n[budget]", ["match.hold.0", "'params'", "params_total"]),
    ("[budget]", f"{DESIGN}{{ depth = 1 }}\n[budget]", ["depth", "remove"]),
    ("[budget]", f"{DESIGN}{{ compile = true }}\n[budget]", ["compile", "remove"]),
    ("[budget]", f"{DESIGN}{{}}\n[budget]", ["candidates.0.settings", "at least 1"]),
    ("[budget]", f"{DESIGN}{{ lr = 0.2 }}\n[budget]", ["candidates: a: lr = 0.2", "[0.001, 0.1]", "widen"]),
    ("[budget]", f"{DESIGN}{{ x = nan }}\n[budget]", ["candidates.0.settings.x", "nan", "finite"]),
    ("[budget]", f"{DESIGN}{{ x = 1 }}\nsetting = 1\n[budget]", ["candidates.0.setting", "unknown key"]),
    ("[budget]", f"{DESIGN}{{ x = 1 }}\n" * 2 + "[budget]", ["candidates", "'a' is taken", "another"]),
    ("[budget]", f"{RESERVED}{{ x = 1 }}\n[budget]", ["candidates", "'source' is taken", "another"]),
    ("[budget]", "[source]\nsettings = { seed = 1 }\n[budget]", ["seed", "remove"]),
    ("[budget]", "[source]\nsettings = {}\ncheckpoint = 'x'\n[budget]", ["source", "not both", "remove"]),
    ("[budget]", "[source]\ncheckpoint = 3\n[budget]", ["source.checkpoint", "3", "string"]),
    ("[budget]", "[decision]\nagainst = 'best'\n[budget]", ["decision.against", "'best'", "baseline"]),
    ('name = "good"', 'name = "good"\nrungs = []', ["not TOML"]),
    ('name = "good"', "name = good", ["not TOML"]),
    ('name = "good"', '"two\\nlines" = 1\nname = "good"', ["unknown key"]),
]


@pytest.fixture
def good() -> Space:
    return parse_space(tomllib.loads(GOOD), "good.toml")


@pytest.mark.parametrize(("old", "new", "words"), BROKEN, ids=lambda x: str(x)[:40])
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    assert old in GOOD
    file = tmp_path / "space.toml"
    file.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_space(file)
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1000
    assert line.startswith(f"{file}: ")
    for word in words:
        assert word in line, line


@pytest.mark.parametrize(
    ("missing", "remedy"), [("params", ", or [[candidates]]"), ("rungs", ""), ("baseline", "")]
)
def test_a_missing_table_is_named(missing: str, remedy: str) -> None:
    raw = {k: v for k, v in tomllib.loads(GOOD).items() if k != missing}
    with pytest.raises(UserError) as caught:
        parse_space(raw, "here")
    assert str(caught.value) == f"here: {missing}: missing; add it{remedy}"


@pytest.mark.parametrize(
    ("table", "words"), [("params", "missing; add it, or [[candidates]]"), ("rungs", "at least 1")]
)
def test_an_empty_table_is_refused(table: str, words: str) -> None:
    raw = tomllib.loads(GOOD)
    with pytest.raises(UserError) as caught:
        parse_space({**raw, table: type(raw[table])()}, "here")
    assert str(caught.value).startswith(f"here: {table}: ") and words in str(caught.value)


def test_what_is_no_readable_file_is_refused(tmp_path: Path) -> None:
    latin = tmp_path / "latin.toml"
    latin.write_bytes(GOOD.replace("good", "g\xf6d").encode("latin-1"))
    for path in (tmp_path, tmp_path / "absent.toml", latin):
        with pytest.raises(UserError) as caught:
            load_space(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_run_fields_are_never_params(good: Space) -> None:
    for field in RUN_FIELDS:
        raw = good.model_dump()
        raw["baseline"][field] = 1
        raw["params"][field] = {"kind": "int", "low": 1, "high": 2}
        with pytest.raises(UserError, match=f"'{field}'.*remove it"):
            parse_space(raw, "here")


def test_the_trainer_and_the_spaces_agree_on_what_belongs_to_the_run() -> None:
    from train_small import TrainConfig

    assert {spec.name for spec in fields(TrainConfig) if spec.metadata["run"]} == RUN_FIELDS


def test_the_spaces_that_come_with_the_project_are_whole() -> None:
    files = sorted((ROOT / "search_spaces").glob("*.toml"))
    assert files
    for file in files:
        assert load_space(file).name.replace("-", "_") == file.stem.replace("-", "_")


def test_a_list_of_designs_can_stand_without_parameters(good: Space) -> None:
    raw = good.model_dump() | {"params": {}, "candidates": [{"name": "a", "settings": {"anything": 1}}]}
    space = parse_space(raw, "here")
    assert space.complete({}) == space.baseline
    with pytest.raises(UserError, match="lr"):
        space.complete({"lr": 0.05})


def test_a_point_of_the_space_is_told_from_a_design_beside_it(good: Space) -> None:
    assert good.holds(good.baseline) and good.holds({**good.baseline, "lr": 0.05, "ramp": "random"})
    assert not good.holds({**good.baseline, "new": 1}), "no parameter names it"
    assert not good.holds({**good.baseline, "ramp_end": 0.5}), "out of play, and not at its baseline value"


def test_settings_differ_where_one_of_them_leaves_a_key_out() -> None:
    old, new = {"a": 1, "b": 2, "gone": True}, {"a": 1, "b": 3, "new": "x"}
    assert settings_diff(old, new) == {"b": [2, 3], "new": [None, "x"], "gone": [True, None]}


# ---- settings ----


def test_a_parameter_out_of_play_keeps_its_baseline_value(good: Space) -> None:
    assert good.complete({"ramp_end": 0.5})["ramp_end"] == 0.3
    assert good.complete({"ramp_end": 0.5, "ramp": "random"})["ramp_end"] == 0.5
    # ramp_shape hangs on ramp_end, which hangs on ramp: out of play with its grandparent
    deep = {"ramp_shape": "steep", "ramp_end": 0.6}
    assert good.complete(deep)["ramp_shape"] == "flat"
    assert good.complete({**deep, "ramp": "random"})["ramp_shape"] == "steep"
    assert good.complete({**deep, "ramp": "random", "ramp_end": 0.5})["ramp_shape"] == "flat"


def test_nothing_laid_over_gives_the_baseline(good: Space) -> None:
    assert good.complete({}) == good.baseline


def test_numbers_get_the_kind_that_is_declared() -> None:
    space = parse_space(
        {
            "name": "kinds",
            "baseline": {"x": 1.0, "k": 2},
            "params": {
                "x": {"kind": "float", "low": 0, "high": 2},
                "k": {"kind": "int", "low": 1, "high": 4},
            },
            "rungs": [{"depth": 1, "tokens": 1}],
        },
        "here",
    )
    settings = space.complete({"x": 2, "k": 3.0})
    assert (type(settings["x"]), type(settings["k"])) == (float, int)


@pytest.mark.parametrize(
    ("overrides", "word"),
    [
        ({"lrr": 0.1}, "lrr"),
        ({"seed": 1}, "seed"),
        ({"lr": 0.2}, "0.2"),
        ({"lr": "0.02"}, "'0.02'"),
        ({"lr": True}, "True"),
        ({"lr": float("nan")}, "nan"),
        ({"lr": float("inf")}, "inf"),
        ({"lr": 10**400}, "lr"),
        ({"lr": None}, "None"),
        ({"lr": [0.02]}, "[0.02]"),
        ({"width": 3}, "step 2"),
        ({"width": 4.5}, "4.5"),
        ({"width": float("-inf")}, "-inf"),
        ({"router": "gru"}, "gru"),
        ({"router": ["linear"]}, "linear"),
        ({"__class__": 1}, "__class__"),
    ],
)
def test_what_lies_outside_is_refused(good: Space, overrides: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError) as caught:
        good.complete(overrides)
    assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@st.composite
def ranges(draw: st.DrawFn) -> Param:
    kind = draw(st.sampled_from(["float", "int"]))
    numbers = st.integers(-(10**6), 10**6) if kind == "int" else st.floats(-1e6, 1e6, allow_subnormal=False)
    low, high = sorted((draw(numbers), draw(numbers)))
    log = low > 0 and draw(st.booleans())
    return Param(kind=kind, low=low, high=high, log=log)


@settings(deadline=None)
@given(ranges(), st.data())
def test_every_value_within_a_range_is_held_and_none_outside(param: Param, data: st.DataObject) -> None:
    between = st.integers if param.kind == "int" else st.floats
    cast = int if param.kind == "int" else float
    assert param.holds(data.draw(between(cast(param.low), cast(param.high))))
    assert not param.holds(data.draw(st.floats(max_value=param.low, exclude_max=True)))
    assert not param.holds(data.draw(st.floats(min_value=param.high, exclude_min=True)))


@settings(deadline=None)
@given(
    start=st.floats(-100, 100),
    step=st.floats(0.001, 10),
    count=st.integers(1, 300),
    index=st.integers(0, 300),
    off=st.floats(0.05, 0.95),
)
def test_a_stepped_range_holds_its_grid_alone(
    start: float, step: float, count: int, index: int, off: float
) -> None:
    param = Param(kind="float", low=start, high=start + step * (count + 0.5), step=step)
    at = min(index, count)
    assert param.holds(start + step * at)
    assert not param.holds(start + step * (min(at, count - 1) + off))


@settings(deadline=None)
@given(choice=st.sampled_from([0, 1, True, False, 0.0, 1.0, "0", "True"]))
def test_a_choice_is_held_in_its_own_kind(choice: Any) -> None:
    param = Param(kind="categorical", choices=[1, "0"])
    assert param.holds(choice) == (choice == "0" or (choice == 1 and type(choice) is int))


# ---- constraints and matched budgets ----

NAMES = {"depth": 3, "router": "mlp", "virtual_width": [8, 9]}


@pytest.mark.parametrize(
    ("expr", "value"),
    [
        ("depth * 2 == 6 and router != 'linear'", True),
        ("abs(-depth) + min(1, 2) + max(virtual_width)", 13),
        ("virtual_width[0] % 3", 2),
        ("  depth > 1 if router == 'mlp' else depth > 9", True),
        ("'lin' in router or router == 'mlp'", True),
    ],
)
def test_an_honest_expression_has_its_value(expr: str, value: Any) -> None:
    assert evaluate(expr, dict(NAMES)) == value


@pytest.mark.parametrize(
    "expr",
    [
        "__import__('os').system('touch pwned')",
        "open('pwned', 'w')",
        "exec('1')",
        "eval('1')",
        "().__class__.__bases__[0].__subclasses__()",
        "depth.__class__",
        "depth.bit_length()",
        "virtual_width.clear()",
        "'{0.__class__}'.format(1)",
        "f'{1:>9999999999}'",
        "'%9999999999d' % 1",
        "'a' * 10**9",
        "virtual_width * 10**9",
        "9**9**9",
        "1 << 10**9",
        "[x for x in virtual_width]",
        "sum(x for x in iter(int, 1))",
        "[1] * 3",
        "lambda: 1",
        "(depth := 4)",
        "depth = 3",
        "depth; 1",
        "import os",
        "1 / 0",
        "1 % 0",
        "10**400 * 1.0",
        "widht > 3",
        "'x' < 1",
        "virtual_width[9]",
        "virtual_width['a']",
        "min()",
        "depth(",
        "",
        "\0",
        "depth\n\n> 3 +",
        "(" * 300 + "1" + ")" * 300,
        "-" * 20_000 + "1",
    ],
    ids=lambda e: e[:30],
)
def test_a_hostile_expression_is_refused_and_does_nothing(
    expr: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {**NAMES, "virtual_width": [8, 9]}
    with pytest.raises(UserError, match=r"^constraint `") as caught:
        evaluate(expr, names)
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)
    assert names == NAMES
    assert not list(tmp_path.iterdir())


def space_with(**more: Any) -> Space:
    return parse_space({**tomllib.loads(GOOD), **more}, "here")


FACTS = {"params_total": 1000, "params_unique_experts": 0, "flops_per_token": 50}


def test_a_constraint_sees_settings_counts_and_layers() -> None:
    space = space_with(constraints=[{"expr": "n_layer * width == params_total", "why": "for the match"}])
    assert space.broken({"width": 500, "depth": 2}, FACTS, FACTS) is None
    problem = space.broken({"width": 501, "depth": 2}, FACTS, FACTS)
    assert "n_layer * width == params_total" in problem
    assert "for the match" in problem


@pytest.mark.parametrize(
    ("total", "allowed"), [(1000, True), (1020, True), (980, True), (1021, False), (979, False)]
)
def test_a_matched_budget_holds_within_its_tolerance(total: int, allowed: bool) -> None:
    space = space_with(match={"hold": ["flops_per_token", "params_total"], "tolerance": 0.02})
    problem = space.broken({"depth": 2}, {**FACTS, "params_total": total}, FACTS)
    assert (problem is None) == allowed
    if problem:
        assert "params_total" in problem and "1,000" in problem


def test_a_matched_budget_of_nothing_stays_nothing() -> None:
    space = space_with(match={"hold": ["params_unique_experts"]})
    assert space.broken({"depth": 2}, FACTS, FACTS) is None
    assert space.broken({"depth": 2}, {**FACTS, "params_unique_experts": 1}, FACTS)


# ---- the hash ----


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: shuffled(v) for k, v in reversed(value.items())}
    return [shuffled(v) for v in value] if isinstance(value, list) else value


def test_the_hash_does_not_depend_on_the_order_of_keys(good: Space) -> None:
    raw = tomllib.loads(GOOD)
    swapped = {k: shuffled(v) if k != "params" else v for k, v in reversed(raw.items())}
    assert list(swapped) != list(raw)
    assert parse_space(swapped, "here").sha256() == good.sha256()


def test_the_hash_tells_questions_apart(good: Space) -> None:
    hashes = {good.sha256()}
    for old, new in [("lr = 0.02", "lr = 0.03"), ("tokens = 1000", "tokens = 1001"), ("good", "other")]:
        hashes.add(parse_space(tomllib.loads(GOOD.replace(old, new, 1)), "here").sha256())
    assert len(hashes) == 4


def test_a_space_comes_back_whole_from_the_ledger(good: Space) -> None:
    again = Space.model_validate(json.loads(json.dumps(good.model_dump(mode="json"), allow_nan=False)))
    assert again == good
    assert again.sha256() == good.sha256()
