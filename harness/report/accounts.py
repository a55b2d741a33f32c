"""What the night tried and cost: arms, failures, rejections, money, and how to do it again."""

from __future__ import annotations

from collections import Counter

from harness.ledger import Event
from harness.records import BASELINE_ARM, PLACEBO_ARM, SOURCE_ARM, Status, Trial, TrialState
from harness.report.document import (
    LONGEST_CELL,
    Bullets,
    Code,
    Line,
    Number,
    Prose,
    Section,
    Table,
    join,
    plain,
)
from harness.report.quantities import score, starting_point
from harness.view import StudyView


def arms(view: StudyView) -> Section:
    names = list(
        dict.fromkeys([*(c.arm for c in view.candidates.values()), *(e["arm"] for e in view.rejected)])
    )
    names += [arm for arm in dict.fromkeys(e["arm"] for e in view.spends) if arm not in names]
    usd = last_spends(view)
    rows = []
    for arm in names:
        mine = [c for c in view.candidates.values() if c.arm == arm]
        trials = [view.trials[t] for c in mine for t in c.trials]
        money = [e["usd"] for e in usd if e["arm"] == arm]
        kept = sum(c.id in view.incumbents[1:] for c in mine)
        seconds = sum(t.finished.get("train_seconds") or 0.0 for t in trials)
        status = Counter(str(c.status) for c in mine if c.arm not in (BASELINE_ARM, SOURCE_ARM))
        opened = status[Status.OPEN] + status[Status.AUDIT]
        cells: tuple[tuple[str, float | int | None, str], ...] = (
            ("proposals", len(mine), "d"),
            ("rejected", sum(e["arm"] == arm for e in view.rejected), "d"),
            ("trainings", len(trials), "d"),
            ("kept", kept, "d"),
            ("discarded", status[Status.DISCARDED], "d"),
            ("no-effect", status[Status.NO_EFFECT], "d"),
            ("open", opened, "d"),
            ("train s", seconds, ",.0f"),
            ("kept per training hour", kept / (seconds / 3600) if seconds else None, ".2f"),
            ("USD", sum(money) if money else None, ".3f"),
            ("kept per USD", kept / sum(money) if sum(money) else None, ".2f"),
        )
        rows.append(((arm,), *((Number(v, form, f"arm/{arm}/{name}"),) for name, v, form in cells)))
    columns = ("arm", *(name for name, _, _ in cells)) if rows else ("arm",)
    note = (
        f"A keep by {PLACEBO_ARM} is a false one and counts as none here; the noise floor above tells of it."
    )
    return Section("Yield per arm", (Table(columns, tuple(rows)), Prose((note,))))


def failures(view: StudyView) -> Section:
    failed: dict[str, list[Trial]] = {}
    for t in view.trials.values():
        if t.state == TrialState.FAIL:
            failed.setdefault(str(t.failure), []).append(t)
    blocks = []
    if failed:
        rows = tuple(
            (
                (kind,),
                (Number(len(trials), "d", f"failures/{kind}", tuple(t.id for t in trials)),),
                (Code(trials[0].id),),
                (plain(trials[0].detail, LONGEST_CELL) or "–",),
                (Code(trials[0].finished["log"]) if trials[0].finished.get("log") else "–",),
            )
            for kind, trials in sorted(failed.items())
        )
        blocks.append(Table(("kind", "trials", "for example", "detail", "log"), rows))
    else:
        blocks.append(Prose(("No training failed.",)))
    blocks.append(_rejections(view))
    return Section("Failures and rejections", tuple(blocks))


def _rejections(view: StudyView) -> Table | Prose:
    kinds: dict[str, list[Event]] = {}
    for e in view.rejected:
        kinds.setdefault(e["kind"], []).append(e)
    if not kinds:
        return Prose(("No proposal was rejected.",))
    rows = tuple(
        (
            (kind,),
            (Number(len(events), "d", f"rejected/{kind}"),),
            (join([(arm,) for arm in dict.fromkeys(e["arm"] for e in events)], ", ")),
            (plain(events[0]["detail"], LONGEST_CELL) or "–",),
        )
        for kind, events in sorted(kinds.items())
    )
    return Table(("rejected as", "proposals", "arms", "for example"), rows)


def last_spends(view: StudyView) -> list[Event]:
    """The last record of each call: settled where it is known, reserved where it is not."""
    return list({e["call"]: e for e in view.spends}.values())


def cost(view: StudyView) -> Section:
    trials, calls = list(view.trials.values()), last_spends(view)
    on_cpu = [t.seconds for t in trials if not view.space.rungs[t.rung].gpus]
    budget = [e for e in view.sessions if e["event"] == "opened"][-1].get("budget") or {}

    def number(name: str, value: float | int | None, form: str) -> Number:
        return Number(value, form, f"cost/{name}")

    def money(phase: str) -> Number:
        found = [e["usd"] for e in calls if e["phase"] == phase]
        return number(f"usd/{phase}", sum(found) if found else None, ".3f")

    states = Counter(str(t.state) for t in trials)
    rows: list[tuple[str, Line, Line]] = [
        ("trainings", (number("trainings", len(trials), ",d"),), _limit(budget, "trials")),
        *((f"… {s}", (number(s, states[s], ",d"),), ("–",)) for s in TrialState if states[s]),
        ("CPU seconds of trials", (number("cpu", _sum(on_cpu), ",.0f"),), ("–",)),
        (
            "GPU hours of trials",
            (number("gpu_hours", view.gpu_seconds / 3600 or None, ",.3f"),),
            _limit(budget, "gpu_hours"),
        ),
        (
            "wall hours",
            (number("wall_hours", view.elapsed_seconds() / 3600, ",.2f"),),
            _limit(budget, "hours"),
        ),
        ("USD settled", (money("settled"),), _limit(budget, "usd")),
        ("USD reserved, not settled", (money("reserved"),), ("–",)),
    ]
    for name in ("input_tokens", "output_tokens", "cache_write_tokens", "cache_read_tokens"):
        found = [e[name] for e in calls if e.get(name) is not None]
        rows.append((name.replace("_", " "), (number(name, _sum(found), ",d"),), ("–",)))
    return Section("Cost", (Table(("what", "used", "of"), tuple(((n,), *rest) for n, *rest in rows)),))


def _sum(values: list) -> float | int | None:
    return sum(values) if values else None


def _limit(budget: Event, name: str) -> Line:
    return (f"{budget[name]:,g}",) if budget.get(name) is not None else ("–",)


def reproduce(view: StudyView) -> Section:
    o, study = view.opened, view.opened["study"]
    corpus, machine = o["corpus"], o["machine"]
    dirty = " with uncommitted changes" if o.get("dirty") else ""
    lines: list[Line] = [
        ("Repository commit ", Code(str(o.get("commit"))), dirty),
        ("Trainer sha256 ", Code(o["trainer_sha256"])),
        ("Space sha256 ", Code(o["space_sha256"])),
        *((line,) for line in starting_point(view)),
        ("Judge ", Code(o["judge_id"])),
        (
            f"Corpus {corpus['name']}: {corpus['num_documents']:,} documents, {corpus['num_bytes']:,} bytes, sha256 ",
            Code(corpus["sha256"]),
        ),
        ("Versions: ", ", ".join(f"{k} {v}" for k, v in o["versions"].items() if v)),
        ("Machine: ", ", ".join(f"{k} {v}" for k, v in machine.items() if v)),
        ("Recompute every number here: ", Code(f"harness audit {study}")),
        *(("Take over the change: ", Code(f"harness accept {study} {c}")) for c in view.incumbents[1:]),
    ]
    return Section("How to reproduce", (Bullets(tuple(lines)),))


def every_trial(view: StudyView) -> Section:
    """The base that all other numbers stand on."""
    rows = []
    for t in view.trials.values():
        f = t.finished

        state = str(t.failure) if t.state == TrialState.FAIL else t.state.lower()
        seconds = Number(f.get("train_seconds"), ",.1f", f"seconds/{t.id}", (t.id,))
        arm = view.candidates[t.candidate].arm
        rows.append(
            (
                (Code(t.id),),
                (f"{arm} {view.candidates[t.candidate].name}".strip(),),
                (t.purpose,),
                (state,),
                (score(t, "val"),),
                (score(t, "audit"),),
                (seconds,),
            )
        )
    columns = ("trial", "arm", "purpose", "state", "val bpb", "audit bpb", "train s")
    note = (
        "A trial's id is candidate-rung-seed. A placebo's runs count as runs of the incumbent it stands for."
    )
    return Section("Every trial", (Prose((note,)), Table(columns, tuple(rows))), folded=True)
