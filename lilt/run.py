"""One whole run: build, measure, train, measure again, and say what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from lilt import checkpoint, distributed
from lilt.build import build_model, build_pairs, build_splits, build_teacher_of, read_split, settled
from lilt.config import TrainConfig
from lilt.data import Sample
from lilt.evaluate import Finished, Setting, Task, evaluate, evaluate_retrieval, flat
from lilt.evaluate.embed import distinct
from lilt.evaluate.folder import data_of, open_run
from lilt.model import TwoTower
from lilt.policies import check_alive, fates, summary
from lilt.train import Outcome, RunLog, Trainer, read_metrics
from lilt.train.agree import check_agreement
from lilt.train.bill import Bill, write_bill
from lilt.train.check import check
from lilt.train.engine import gathered, make_accelerator
from lilt.train.folder import CONFIG, check_folder, given_back, new_folder, open_folder
from lilt.train.meter import Meter
from lilt.train.objectives import parse_objective
from lilt.train.reuse import check_reuse


@dataclass(frozen=True)
class Report:
    """What a run did: counts of values, recalls on the test split before and after (None: no such split)."""

    trained: int
    total: int
    before: dict[str, Any] | None
    after: dict[str, Any] | None
    references: dict[str, float]
    outcome: Outcome
    adapter_bytes: int
    folder: Path
    bill: Bill | None  # of a finished run


def align(config: TrainConfig, console: Console, watch: Callable[[Trainer], None] = lambda trainer: None) -> Report:
    """Train as configured and write the run folder; Ctrl-C saves the state and returns an unfinished report.

    watch is shown the trainer before its first step.
    """
    check(config)
    config = settled(config)
    accelerator = make_accelerator(config.precision)
    distributed.use_all_cores()
    began = Meter()
    named = config.output
    config = replace(config, output=named or new_folder(config))
    folder = Path(config.output or "")
    mark = check_folder(config, folder)
    with began("starting"), given_back(folder, ours=not named):
        core = build_model(config).to(accelerator.device)
        if not config.resume:
            began_with = checkpoint.begin_from(core, config, config.init) if config.init else None
            for tower in (core.vision, core.text):
                check_alive(tower)
        splits = build_splits(config)
        dataset, collate = build_pairs(config, core, splits.train)
        splits = replace(splits, train=[])  # the pairs have all of it that is needed
        check_agreement(config, core, dataset)
        teacher = build_teacher_of(config, core, parse_objective(config.distill).needs)
        if teacher is not None:
            teacher.to(accelerator.device)
        check_reuse(config, core, teacher, dataset)
    open_folder(config, folder, mark)
    with RunLog(folder, console) as log:
        _announce(log, config, core, len(dataset), dataset.cut)
        if config.init and not config.resume:
            log.metrics({"step": 0, "split": "init", "run": config.init, "adapter_sha256": began_with})
        look = partial(measure, max_tokens=config.eval_tokens, workers=config.workers)
        with began("evaluation"):
            before = _before(config, core, splits.test, log, look)
        trainer = Trainer(
            core,
            dataset,
            collate,
            config,
            accelerator,
            log,
            validate=(lambda model: flat(look(model, splits.val, log, "validation"))) if splits.val else None,
            save=lambda model, values: _save(model, config, folder, values),
            teacher=teacher,
        )
        watch(trainer)
        trainer.meter.include(began)
        outcome = trainer.run()
        after = bill = None
        if outcome.finished:
            checkpoint.restore(core, folder)
            with outcome.meter("evaluation"), gathered(accelerator, core):
                after = look(core, splits.test, log, "test") if splits.test else None
            bill = write_bill(outcome.meter, accelerator.device, config.price)
            _finish(config, core, folder, log, outcome, after, bill)
    adapter = folder / checkpoint.ADAPTER
    return Report(
        sum(p.numel() for p in core.trained().values()),
        sum(p.numel() for p in core.parameters()),
        before,
        after,
        splits.references,
        outcome,
        adapter.stat().st_size if adapter.exists() else 0,
        folder,
        bill,
    )


def _announce(log: RunLog, config: TrainConfig, core: TwoTower, pairs: int, cut: int) -> None:
    trained = sum(p.numel() for p in core.trained().values())
    total = sum(p.numel() for p in core.parameters())
    for side, tower in (("vision", core.vision), ("text", core.text)):
        counts = summary(fates(tower)) or {("frozen", "nothing is trained"): 0}
        rules = "; ".join(f"{rule} {count:,} ({why})" for (rule, why), count in counts.items())
        log.say(f"{side} {tower.spec}: {rules}")
    log.say(f"{trained:,} of {total:,} values are trained, projection and scale included")
    log.say(f"{pairs:,} training pairs, {distributed.world_size()} process(es), output {config.output}")
    if cut:
        log.say(f"{cut:,} captions are longer than the context and were cut")


def measure(
    core: TwoTower,
    samples: list[Sample],
    log: RunLog,
    name: str,
    *,
    max_tokens: int | None,
    workers: int,
    batch_size: int = 128,
) -> dict[str, Any]:
    """Return the recalls of a model on samples, with a bar of that name."""
    options: dict[str, Any] = {"max_tokens": max_tokens, "workers": workers, "batch_size": batch_size}
    captions = len(distinct(samples))
    with _bar(log, name, len(samples)) as advance, _bar(log, f"{name}: captions", captions) as advance_texts:
        return evaluate_retrieval(core, samples, advance=advance, advance_texts=advance_texts, **options)


def _before(
    config: TrainConfig, core: TwoTower, test: list[Sample], log: RunLog, look: Callable[..., dict[str, Any]]
) -> dict[str, Any] | None:
    """Return the recalls of the untrained model, measured once in the life of a run."""
    if not test:
        return None
    if config.resume:
        known = [r for r in read_metrics(log.folder) if r.get("split") == "test" and r.get("step") == 0]
        if known:
            return dict(known[0]["result"])
    result = look(core, test, log, "test before training")
    log.metrics({"step": 0, "split": "test", "result": result})
    return result


def _save(core: TwoTower, config: TrainConfig, folder: Path, values: dict[str, float]) -> None:
    checkpoint.save(core, config, folder, {f"val/{name}": value for name, value in values.items()})


def _finish(
    config: TrainConfig,
    core: TwoTower,
    folder: Path,
    log: RunLog,
    outcome: Outcome,
    after: dict[str, Any] | None,
    bill: Bill,
) -> None:
    """Write the test recalls into the checkpoint and the log."""
    if distributed.is_main() or distributed.shards(core):  # each has a share of what is saved
        metrics = checkpoint.read_contract(folder)["metrics"] if distributed.is_main() else {}
        metrics |= {f"test/{name}": value for name, value in flat(after or {})}
        checkpoint.save(core, config, folder, metrics)
    log.metrics(
        {
            "step": outcome.place.step,
            "split": "test",
            "result": after,
            "best_step": outcome.place.best_step,
            "seconds": round(outcome.meter.total, 2),
            "seconds_by_part": {part: round(spent, 2) for part, spent in outcome.meter.seconds.items()},
            **bill.record(),
            "pairs_per_second": round(outcome.pairs_per_second, 2),
            "peak_bytes": outcome.peak_bytes,
        }
    )


def evaluate_folder(
    run: str, data: str | None, image_root: str | None, split: str, console: Console, **options: Any
) -> dict[str, Any]:
    """Load a checkpoint or a baseline and return its recalls on a split, by default of the data it was trained on.

    Under "of" stands what was measured, and on what.
    """
    model = open_run(run)
    data, image_root = data_of(Path(run) / CONFIG, data, image_root)
    if not data:
        raise ValueError(f"{run} does not say which data it was trained on; name a manifest with --data")
    samples = read_split(data, split, image_root)
    with RunLog(Path(run), console) as log:
        result = measure(model.core, samples, log, split, max_tokens=model.config.eval_tokens, **options)
    trained = sum(parameter.numel() for parameter in model.core.trained().values())
    of = {
        "model": run,
        "policy": model.config.policy_name if trained else None,  # None: taken as it is
        "trained": trained,
        "total": sum(parameter.numel() for parameter in model.core.parameters()),
        "adapter_bytes": checkpoint.adapter_bytes(run) if trained else 0,
        "data": data,
        "split": split,
    }
    return result | {"of": of}


def evaluate_tasks(run: str, wanted: Mapping[str, Task], setting: Setting, console: Console) -> Iterator[Finished]:
    """Load a checkpoint and do tasks on it, each given with its spec; an error in one does not end the others."""
    model = open_run(run)
    data, root = data_of(Path(run) / CONFIG, setting.data, setting.image_root)
    with RunLog(Path(run), console) as log:
        yield from evaluate(model, wanted, replace(setting, data=data, image_root=root, bar=partial(_bar, log)))


@contextmanager
def _bar(log: RunLog, name: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar while something is done; it moves as if all ranks were as far as this one."""
    bar = log.bar(name, total)
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count * distributed.world_size()
        log.move(bar, done)

    try:
        yield advance
    finally:
        log.close(bar)
