"""Ray Tune as the dispatcher: asynchronous over CPUs, GPUs and machines.

Tune only dispatches. Its searcher asks the study for the next trial when a slot is free and tells it the
outcome; one actor per slot is reused and keeps its fork server warm. The ledger is the memory: Tune's own
folders are scratch and a resumed night starts a new Tuner. Importing this module imports Ray.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Read by Ray when it is imported or started: no usage statistics, no files or tables of Tune's own, no
# trial created before there is a free slot for it, and signals are ours.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AIR_NEW_OUTPUT="0",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1",
    TUNE_DISABLE_SIGINT_HANDLER="1",
    TUNE_MAX_PENDING_TRIALS_PG="1",
    TUNE_GLOBAL_CHECKPOINT_S="3600",
)

import ray
from ray import tune
from ray.tune.search import Searcher

from harness.dispatch import IDLE_SECONDS, Finished, Source
from harness.errors import ClusterLost, UserError
from harness.guard import below, restart, running
from harness.space import Rung
from harness.trial import TrialRunner, TrialSpec

OBJECT_STORE_BYTES = 150 << 20
WATCH_SECONDS = 1.0
STUCK_SECONDS = 10.0
CONNECT_SECONDS = 5.0


def run_ray(
    source: Source, rungs: list[Rung], scratch: Path, *, address: str | None, workers: int | None
) -> None:
    """Runs the source to its end; `scratch` is a folder that every node sees.

    Raises UserError when no cluster can be had or none of its nodes fits a trial, ClusterLost when the
    head that was started here dies.
    """
    local = {"num_cpus": workers, "include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
    if address:
        _check_address(address)
    try:
        ray.init(
            address=address or "local",
            log_to_driver=False,
            logging_level=logging.ERROR,
            **({} if address else local),
        )
    except Exception as error:
        where = f"--ray-address {address}" if address else "Ray on this machine"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{where}: cannot be used: {first}") from None
    try:
        source.slots = [_slots(rung) for rung in rungs]
        searcher = StudySearcher(source)
        tuner = tune.Tuner(
            tune.with_resources(Slot, _resources),
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=-1, reuse_actors=True, metric="ok", mode="max"
            ),
            run_config=tune.RunConfig(
                storage_path=str(scratch.resolve()),
                name="night",
                verbose=0,
                failure_config=tune.FailureConfig(max_failures=0),
            ),
        )
        with _head_watched():
            tuner.fit()
            if searcher.error is None and not searcher.finished:
                raise ClusterLost("Ray Tune ended before the night did")
    except ClusterLost:
        raise  # there is nothing left to shut down
    except BaseException:
        ray.shutdown()
        raise
    else:
        ray.shutdown()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if searcher.error is not None:
        raise searcher.error


def _slots(rung: Rung) -> int:
    """Trials of the rung that fit beside each other, node by node: a trial does not span nodes."""
    nodes = [n["Resources"] for n in ray.nodes() if n["Alive"]]
    slots = sum(_fits(node, rung) for node in nodes)
    if slots < 1:
        have = "; ".join(f"{n.get('CPU', 0):g} CPUs and {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise UserError(
            f"a trial at depth {rung.depth} needs {rung.cpus:g} CPUs and {rung.gpus:g} GPUs on one node, Ray has "
            f"{have}; lower them in [[rungs]] or add a machine"
        )
    return slots


def _fits(node: dict[str, float], rung: Rung) -> int:
    by_gpu = node.get("GPU", 0) / rung.gpus if rung.gpus else float("inf")
    return int(min(node.get("CPU", 0) / rung.cpus, by_gpu))


def _check_address(address: str) -> None:
    """Ray waits minutes for a cluster that is not there; a plain connection knows at once."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "//" in address:
        return  # "auto", or a form that Ray understands itself
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or "no answer"
        raise UserError(
            f"--ray-address {address}: {reason}; start the cluster with `ray start --head`"
        ) from None


def _resources(config: dict) -> tune.PlacementGroupFactory:
    return tune.PlacementGroupFactory([{"CPU": config["spec"]["cpus"], "GPU": config["spec"]["gpus"]}])


@contextmanager
def _head_watched() -> Iterator[None]:
    """Raises ClusterLost here once a process of the head that this driver started has died.

    Ray's driver would wait for a dead raylet for ever, and abort a minute after its control store died.
    """
    heads = [p for p in below(os.getpid(), running(), set()) if _is_head(p[0])]
    main, over = threading.get_ident(), threading.Event()

    def lost(number: int, frame: object) -> None:
        raise ClusterLost("Ray's head died")

    def watch() -> None:
        while not over.wait(WATCH_SECONDS):
            if not set(heads) <= running().keys():
                signal.pthread_kill(main, signal.SIGUSR1)
                if not over.wait(
                    STUCK_SECONDS
                ):  # in a call of Ray's that waits for the dead and hears no signal
                    restart("--resume")
                return

    before = signal.signal(signal.SIGUSR1, lost)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGUSR1, before)


def _is_head(pid: int) -> bool:
    try:
        program = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    except OSError:
        return False
    return program.rsplit(b"/", 1)[-1] in (b"raylet", b"gcs_server")


class StudySearcher(Searcher):
    """Tune's side of the bridge: `suggest` asks the study, `on_trial_complete` tells it."""

    def __init__(self, source: Source):
        super().__init__(metric="ok", mode="max")
        self._source = source
        self._specs: dict[str, TrialSpec] = {}
        self.finished = False
        self.error: BaseException | None = None  # ours, not Tune's to log and swallow

    def suggest(self, trial_id: str) -> dict | str | None:
        try:
            spec = None if self.error else self._source.next_task()
        except Finished:
            self.finished = True
            return Searcher.FINISHED
        except Exception as error:
            self.error = error
        if self.error is not None:
            return Searcher.FINISHED
        if spec is None:
            time.sleep(IDLE_SECONDS)  # Tune's loop spins while there is nothing to start
            return None
        self._specs[trial_id] = spec
        return {"spec": spec.as_dict()}

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        spec = self._specs.pop(trial_id, None)
        if spec is None or self.error is not None:
            return
        try:
            if error or not result or "outcome" not in result:
                self._source.lost(spec, "its worker died")
            else:
                self._source.on_result(spec, json.loads(result["outcome"]))
        except Exception as failure:
            self.error = failure

    def save(self, checkpoint_path: str) -> None:
        """Nothing: see the module's text."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see the module's text."""

    def __reduce__(self) -> tuple:  # Tune pickles its searcher for a restore that we never make
        return (Searcher, ("ok", "max"))


class Slot(tune.Trainable):
    """One worker's slot; reused from trial to trial. A failing trial is a result, never an exception."""

    def setup(self, config: dict) -> None:
        self._runner = TrialRunner()

    def step(self) -> dict:
        raw: dict[str, Any] = self.config["spec"]
        outcome = self._runner.run(TrialSpec(**{**raw, "splits": tuple(raw["splits"])}))
        return {"ok": 1.0, "outcome": json.dumps(outcome), "done": True}  # Tune flattens nested values

    def reset_config(self, new_config: dict) -> bool:
        return True

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial's folder is its own."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing: see save_checkpoint."""

    def cleanup(self) -> None:
        self._runner.close()
