"""What the night found: confirmed changes with their evidence, promising ones, those still open."""

from __future__ import annotations

from harness.records import Candidate, Status
from harness.report.document import (
    LONGEST_CELL,
    Bullets,
    Chip,
    Code,
    Figure,
    Line,
    Number,
    Paired,
    Prose,
    Section,
    Table,
    Winner,
    compact,
    join,
    plain,
)
from harness.report.quantities import (
    called,
    changes,
    cited,
    claim,
    interval,
    mean,
    starting_point,
    verdict_name,
    whole_gain,
)
from harness.space import canonical
from harness.view import StudyView

PROMISING_Z = 1.0  # a candidate that was dropped above this z is more likely a missed win than a loss


def outcome(view: StudyView, running: bool) -> Line:
    """The answer in one sentence."""
    keeps = view.incumbents[1:]
    start, end = mean(view, view.baseline, 0), mean(view, view.incumbents[-1], 0)
    if not keeps:
        so_far = "Nothing is confirmed yet" if running else "Nothing was confirmed"
        return (so_far, ": the baseline stands at val ", start, " bpb.")
    if len(keeps) == 1:
        last = claim(view.candidates[keeps[0]], -1)
        gain: Line = ("audited gain ", *interval(last.delta, last.low, last.high), " bpb over ", last.n)
        return ("1 change confirmed: val ", start, " → ", end, " bpb, ", *gain, " fresh runs.")
    count = Number(len(keeps), "d", "keeps")
    if view.incumbent == view.baseline:  # a comparison: no keep took its place
        each = ((*called(view.candidates[c]), " ", claim(view.candidates[c], -1).delta) for c in keeps)
        stands = (" changes confirmed, each against the baseline at val ", start, " bpb: audited gains ")
        return (count, *stands, *join(each, ", "), " bpb.")
    head: Line = (count, " changes confirmed, each against the one before: val ", start, " → ")
    whole = whole_gain(view)
    if whole:
        return (*head, end, " bpb, audited gain of the whole ", *whole[:-1], " bpb.")
    steps = join([(claim(view.candidates[c], -1).delta,) for c in keeps], ", ")
    return (*head, end, " bpb, audited gains step by step ", *steps, " bpb.")


def confirmed(view: StudyView) -> Section:
    keeps = [view.candidates[c] for c in view.incumbents[1:]]
    if not keeps:
        return Section("Confirmed", (Prose(("No candidate passed its audit.",)),))
    blocks = [_card(view, c) for c in keeps]
    if len(keeps) > 1 and view.incumbent != view.baseline:
        blocks.append(_chain(view))
    note = (
        "Gain is bits per byte taken off, positive is better. Each gain below comes from the audit alone: fresh "
        "seeds and a split that no earlier look has read."
    )
    return Section("Confirmed", (Prose((note,)), *blocks))


def _card(view: StudyView, c: Candidate) -> Section:
    audit = claim(c, -1)
    event = c.last
    lines: list[Line] = [
        ("Changes against the baseline: ", *changes(view, c, view.baseline)),
        ("Audited gain: ", *interval(audit.delta, audit.low, audit.high), " bpb, z ", audit.z, ", ", audit.n),
        ("Proposed by ", Code(c.arm), ": ", plain(c.proposed.get("hypothesis") or "no hypothesis")),
        *_promotions(view, c),
        _review(view, c),
        _price(view, c),
    ]
    rival = view.space.decision.against
    lines[1] += (" runs against ", audit.m, f" of the {rival} ", Code(event["against"]))
    if event["against"] != view.baseline:
        lines.insert(1, ("Against its incumbent: ", *changes(view, c, event["against"])))
    blocks = [Bullets(tuple(lines)), _looks(c)]
    gains = _paired_gains(view, c)
    if gains:
        data = Paired(gains, audit.delta, audit.low, audit.high)
        alt = f"Audit of {c.id}: gain over the {rival} seed by seed, with the estimate and its interval"
        blocks.append(Figure(f"audit-{c.id}", alt, data))
    return Section(f"{c.name} {c.id}".strip(), tuple(blocks))


def _paired_gains(view: StudyView, c: Candidate) -> tuple[Number, ...]:
    """Of the last verdict: control minus candidate, for each seed that both have run."""
    e, split = c.last, c.last["split"]
    control = {t.seed: t for t in map(view.trials.get, e["control"]) if split in t.scores}
    runs = {t.seed: t for t in map(view.trials.get, e["trials"]) if split in t.scores}
    return tuple(
        Number(
            control[seed].scores[split] - run.scores[split],
            "+.4f",
            f"pair/{run.id}/{control[seed].id}/{split}",
            (run.id, control[seed].id),
        )
        for seed, run in runs.items()
        if seed in control
    )


def _looks(c: Candidate) -> Table:
    rows = []
    for i, e in enumerate(c.verdicts):
        shown = claim(c, i)
        rows.append(
            (
                (e["stage"],),
                (shown.n,),
                (e["split"],),
                (shown.delta, " ± ", shown.se),
                (shown.z,),
                (Chip(verdict_name(e)),),
                cited(e["trials"]),
                cited(e["control"]),
            )
        )
    columns = ("stage", "n", "split", "gain ± se, bpb", "z", "verdict", "trials", "control")
    return Table(columns, tuple(rows))


def _promotions(view: StudyView, c: Candidate) -> list[Line]:
    lines: list[Line] = []
    for i, e in enumerate(view.promoted):
        if e["candidate"] != c.id:
            continue
        head: Line = (f"At depth {e['depth']} (rung {e['rung']}): ",)
        if e["delta"] is None:
            lines.append((*head, "no result. ", plain(e["reason"])))
            continue
        trials = (*e["trials"], *e["control"])
        delta, low, high = (
            Number(e[name], "+.4f", f"promoted/{i}/{name}", trials) for name in ("delta", "low", "high")
        )
        runs = Number(e["n"], "d", f"promoted/{i}/n", trials)
        state = "" if e["complete"] else " (incomplete)"
        against = (
            f" paired runs, {e['split']} split, against ",
            Code(e["against"]),
            f"{state}: ",
            Chip(e["reason"]),
        )
        lines.append((*head, *interval(delta, low, high), " bpb, ", runs, *against))
    return lines or [("Promotion to a larger depth: not run",)]


def _review(view: StudyView, c: Candidate) -> Line:
    review = view.reviews.get(c.id)
    if not review:
        return ("Review: waiting; ", Code(f"harness accept {view.opened['study']} {c.id}"))
    why = plain(review.get("why") or "")
    by = plain(review.get("by") or "unknown")
    return ("Review: ", Chip(review["action"]), f" by {by}" + (f": {why}" if why else ""))


def _price(view: StudyView, c: Candidate) -> Line:
    seconds = sum(view.trials[t].seconds for t in c.trials)
    trainings = Number(len(c.trials), "d", f"price/{c.id}/trainings", tuple(c.trials))
    return (
        "Price: ",
        trainings,
        " trainings, ",
        Number(seconds, ",.0f", f"price/{c.id}/seconds", tuple(c.trials)),
        " s",
    )


def _chain(view: StudyView) -> Section:
    whole = whole_gain(view)
    gain: Line = ("Audited gain of the whole: not measured on shared seeds",)
    if whole:
        gain = ("Audited gain of the whole: ", *whole[:-1], " bpb, paired over ", whole[-1], " seeds")
    diff = changes(view, view.candidates[view.incumbent], view.baseline)
    return Section("The whole against the baseline", (Bullets((("Changes: ", *diff), gain)),))


def promising(view: StudyView) -> Section:
    """Candidates that were dropped or are open, and looked better than the incumbent when last looked at."""

    def last_look(c: Candidate) -> int | None:
        looks = [i for i, e in enumerate(c.verdicts) if e["stage"] == "look" and "z" in e]
        return looks[-1] if looks else None

    chosen = []
    for c in view.candidates.values():
        look = last_look(c)
        if c.placebo or look is None or c.status in (Status.KEPT, Status.NO_EFFECT):
            continue
        if c.verdicts[look]["z"] > PROMISING_Z:
            chosen.append((c, look))
    chosen.sort(key=lambda pair: -pair[0].verdicts[pair[1]]["z"])
    blocks = [_candidates_table(view, chosen)] if chosen else [Prose(("None.",))]
    waiting = [(*called(c), " by ", c.arm, f", {c.status}") for c in view.open.values() if not c.placebo]
    if waiting:
        blocks.append(Prose(("Undecided when the ledger ends: ", *join(waiting, "; "), ".")))
    note = f"Dropped or undecided with z above {PROMISING_Z:g} at the last look. Not evidence: likely missed wins."
    return Section("Only promising", (Prose((note,)), *blocks))


def _candidates_table(view: StudyView, chosen: list[tuple[Candidate, int]]) -> Table:
    rows = []
    for c, i in chosen:
        shown = claim(c, i)
        state = "failed audit" if c.last["stage"] == "audit" else str(c.status)
        rows.append(
            (
                called(c),
                changes(view, c, c.verdicts[i]["against"]),
                (shown.z,),
                (shown.delta, " ± ", shown.se),
                (shown.n,),
                (Chip(state),),
                (c.arm,),
                (plain(c.proposed.get("hypothesis") or "–", LONGEST_CELL),),
            )
        )
    columns = (
        "candidate",
        "changes to the incumbent",
        "z",
        "gain ± se, bpb",
        "n",
        "state",
        "arm",
        "hypothesis",
    )
    return Table(columns, tuple(rows))


def winners(view: StudyView) -> tuple[Winner, ...]:
    study = view.opened["study"]
    made = []
    for c in (view.candidates[i] for i in view.incumbents[1:]):
        e, audit = c.last, claim(c, -1)
        made.append(
            Winner(
                c.id,
                (
                    f"study {study}, candidate {c.id}, proposed by {c.arm} {c.name}".strip(),
                    f"audited gain {audit.delta} bpb over {e['against']} (95 % {audit.low} to {audit.high}), "
                    f"z {audit.z}, {audit.n} runs against {audit.m}",
                    f"trials {', '.join(compact(e['trials']))}; control {', '.join(compact(e['control']))}",
                    f"judge {view.opened['judge_id']}; trainer {c.proposed['trainer_sha256']}",
                    plain(c.proposed.get("hypothesis") or "no hypothesis"),
                    *starting_point(view),
                    "takes the place of [baseline] in a search space; each line is also a key=value of the trainer",
                ),
                tuple(c.settings.items()),
            )
        )
    return tuple(made)


def comparison(view: StudyView, other: StudyView) -> Section:
    """What two studies of one judge found, side by side. Confirmed changes are the same when code and settings are."""
    here, there = view.opened["study"], other.opened["study"]

    def keeps(v: StudyView) -> dict[tuple[str, str], Candidate]:
        kept = [v.candidates[c] for c in v.incumbents[1:]]
        return {(canonical(c.settings), c.proposed["trainer_sha256"]): c for c in kept}

    mine, theirs = keeps(view), keeps(other)
    rows = [
        ((name,), *((mean(v, which(v), 0),) for v in (view, other)))
        for name, which in (
            ("baseline, val bpb", lambda v: v.baseline),
            ("last incumbent, val bpb", lambda v: v.incumbent),
        )
    ]
    rows.append((("trainings",), *((Number(len(v.trials), ",d", "cost/trainings"),) for v in (view, other))))
    lines: list[Line] = []
    for title, owner, found in (
        (f"Confirmed in {here} alone", view, {k: c for k, c in mine.items() if k not in theirs}),
        (f"Confirmed in {there} alone", other, {k: c for k, c in theirs.items() if k not in mine}),
        ("Confirmed in both", view, {k: c for k, c in mine.items() if k in theirs}),
    ):
        listed = [(Code(c.id), " (", *changes(owner, c, owner.baseline), ")") for c in found.values()]
        lines.append((f"{title}: ", *(join(listed, "; ") or ("nothing",))))
    return Section(f"Against {there}", (Table(("", here, there), tuple(rows)), Bullets(tuple(lines))))
