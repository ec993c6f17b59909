"""The training loop: on Accelerate, a function of the step number alone, stopped and resumed anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from lilt import distributed
from lilt.config import TrainConfig
from lilt.data import Batch, Batches, Collate, Pairs
from lilt.data.order import draw_seed
from lilt.data.store import DTYPES
from lilt.losses import build_loss
from lilt.model import Teacher, TwoTower
from lilt.train.blocks import treat_blocks
from lilt.train.distill import build_distiller
from lilt.train.engine import clip, gathered, prepare, spread
from lilt.train.feed import Feed, piece_rows
from lilt.train.guard import Guard
from lilt.train.kernels import quick_attention
from lilt.train.learner import Learner
from lilt.train.liveness import FirstSteps
from lilt.train.log import BAD_IMAGES, RunLog, peak_memory
from lilt.train.meter import Meter
from lilt.train.optim import make_optimizer, make_schedule
from lilt.train.place import Outcome, Place
from lilt.train.reuse import Reuse, find_fronts
from lilt.train.shelf import Shelf
from lilt.train.shrink import Shrink
from lilt.train.state import find_state, keep_frozen_weights_out, load_state, save_state
from lilt.train.step import Objective, Step, backward
from lilt.train.stop import Stop

SELECT_BY = "mean_recall"
Validate = Callable[[TwoTower], Iterable[tuple[str, float]]]
Save = Callable[[TwoTower, dict[str, float]], None]


class Trainer:
    """Trains a model on pairs. validate yields (name, value) on held-out data; save is called for each new best of
    their mean_recall, or at the end where nothing validates."""

    def __init__(
        self,
        core: TwoTower,
        dataset: Pairs,
        collate: Collate,
        config: TrainConfig,
        accelerator: Accelerator,
        log: RunLog,
        *,
        validate: Validate | None,
        save: Save,
        teacher: Teacher | None = None,
    ):
        self.core, self.dataset, self.config, self.log = core, dataset, config, log
        self.validate, self.save = validate, save
        self.accelerator = accelerator
        order = dataset.order(config.seed, config.shuffle_buffer, config.resample)
        ranks = {"rank": distributed.rank(), "world": distributed.world_size()}
        piece = piece_rows(config.batch_size // ranks["world"], config.micro_batch)
        self.batches = Batches(order, config.batch_size, piece=piece, **ranks)
        if self.batches.batch != config.batch_size:
            why = f"{len(order):,} pairs on {ranks['world']} process(es)"
            log.say(f"a step is of {self.batches.batch:,} pairs instead of {config.batch_size:,}: there are {why}")
        self.steps = config.max_steps or math.ceil(config.epochs * self.batches.steps_per_epoch)
        warmup = math.ceil(0.05 * self.steps) if config.warmup_steps is None else config.warmup_steps
        self.teacher = teacher
        fronts = find_fronts(core)
        self.learner = Learner(core, build_distiller(config, core, teacher, self.batches.batch, self.steps), fronts)
        self.learner.to(accelerator.device)
        spread(accelerator, self.learner)
        treat_blocks(core, config, accelerator)
        beside = [] if self.learner.distiller is None else list(self.learner.distiller.parameters())
        rates = config.lr, config.head_lr, config.weight_decay, config.beta2
        optimizer = make_optimizer(core, *rates, beside, config.optimizer)
        self.schedule = make_schedule(optimizer, self.steps, warmup, config.lr_floor)
        self.place, self.meter = Place(), Meter()
        self.objective = Objective(build_loss(config.loss), config.same, self.learner.distiller, config.distill_weight)
        keep_frozen_weights_out(accelerator, self.learner)
        rows = self.batches.ours, config.micro_batch
        self.model, self.optimizer = prepare(accelerator, self.learner, optimizer, *rows)
        self.stop = Stop()
        self.shrink = Shrink(accelerator, self.learner, self.place, config.micro_batch, log.say, self.stop)
        self.guard = Guard(config.max_bad_steps, dataset.paths)
        accelerator.register_for_checkpointing(self.schedule, self.place, self.meter, self.guard)
        if self.learner.distiller is not None and self.learner.distiller.bank is not None:
            accelerator.register_for_checkpointing(self.learner.distiller.bank)
        # dropout draws from the global generators: each rank its own stream, the same in every run of one seed
        torch.manual_seed(draw_seed(config.seed, distributed.rank(), 0))
        if config.resume:
            state, torn = find_state(log.folder)
            for other in torn:
                log.say(f"{other} is torn and was passed over")
            load_state(accelerator, state)
            log.rewind(self.place.step)
        self.batches.start = self.place.step
        # DeepSpeed has used the gradients up before anybody can look at them
        looked_at = accelerator.distributed_type == DistributedType.DEEPSPEED
        self.first_steps = FirstSteps(core, 2 if looked_at else self.place.step)
        kept = None if config.reuse_dtype is None else DTYPES[config.reuse_dtype]
        self.shelf = Shelf(log.folder, config.spill, kept)
        self.reuse = Reuse(config, core, fronts, teacher, accelerator, log, self.steps * self.batches.batch)
        self.collate = collate
        self.feed = Feed(dataset, collate, self.batches, config, accelerator, self.shelf)
        self.faults: list[tuple[str, str]] = []

    def run(self) -> Outcome:
        """Train until the last step, or until asked to stop; then the state is saved.

        Raises ValueError for a loss that is not finite, tensors that do not learn, or too many unreadable images.
        """
        with self.meter("data"), gathered(self.accelerator, self.core):
            self.reuse.start(self.dataset, self.collate)
            self.faults += self.dataset.faults
        count = 0
        every = max(1, round(self.config.eval_every * self.batches.steps_per_epoch))
        bar = self.log.bar("training", self.steps, self.place.step)
        batches = iter(self.feed) if self.place.step < self.steps else iter(())
        before = self._stepping()
        self.model.train()
        with self.stop, quick_attention(self.accelerator), self.shelf:
            while self.place.step < self.steps:
                with self.meter("data"):
                    batch = next(batches)
                with self.meter("steps"):
                    done = self._step(batch)
                self.faults += [fault for piece in batch for fault in piece.faults]
                del batch  # before the next one is gathered
                self.place.step += 1
                count += 1
                if news := self.shelf.news():
                    self.log.say(news)
                last = self.place.step == self.steps
                # what costs a wait for the device or for other ranks happens at log steps; on one CPU it is free
                keep = self.place.step % every == 0 or last
                due = self.place.step % self.config.log_every == 0 or keep
                asked = False
                alone = self.accelerator.device.type == "cpu" and distributed.world_size() == 1
                if due or alone or self.shrink.stopping:
                    with self.meter("steps"):
                        for line in self.guard.settle(self._kept()):
                            self.log.say(line)
                    asked = self._agree(self.stop.asked)
                    rate = self._rate(count, before)
                    self.log.move(bar, self.place.step, f"loss {done.loss.item():.3f}  {rate:.0f} pairs/s")
                if due:
                    self._record(done, rate)
                if keep or asked:
                    self._check_weights()
                if keep:
                    self._validate()
                if keep or asked:
                    with self.meter("saving"):
                        save_state(self.accelerator, self.log.folder, self.place.step, self.config.keep_states)
                if asked:
                    break
        self.log.close(bar)
        return Outcome(self.place, self.steps, self.meter, self._rate(count, before), peak_memory(), len(self.log.bad))

    def _stepping(self) -> float:
        return self.meter.seconds["data"] + self.meter.seconds["steps"]

    def _rate(self, done: int, before: float) -> float:
        """Return the pairs per second of the steps since a sitting began."""
        return self.batches.batch * done / max(self._stepping() - before, 1e-9)

    def _step(self, batch: list[Batch]) -> Step:
        def step(micro_batch: int | None, **how: Any) -> Step:
            parts = self.objective, batch, self.accelerator, micro_batch, self.teacher, self.learner.fronts
            return backward(self.model, *parts, keep=self.shelf.put, **how)

        done = self.shrink(self.batches.ours, step)
        images = torch.cat([piece.image_id for piece in batch])
        self.first_steps.look(self.optimizer)
        norm = clip(self.accelerator, self.learner.trained().values(), self.config.clip_norm)
        if self.accelerator.scaler is None:
            self.guard.step(self.optimizer, self.place.step + 1, norm, done.broken, images)
        else:  # the scaler leaves out steps of its own, and by them finds its factor
            self.optimizer.step()
            self.guard.note(self.place.step + 1, ~done.broken.any(), done.broken, images)
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.learner.clamp_()
        return done

    def _kept(self) -> str:
        return (
            f"The best checkpoint so far (step {self.place.best_step}) and the last state in {self.log.folder} are kept"
        )

    def _check_weights(self) -> None:
        """Keep broken weights out of what is saved: the loss of a step is from before its update."""
        trained = self.learner.trained().items()
        ours = [name for name, p in trained if not torch.isfinite(distributed.ours(p)).all()]
        if broken := [name for names in distributed.gather_objects(ours) for name in names]:
            raise ValueError(
                f"{broken[0]} is no longer finite at step {self.place.step}. {self._kept()}: start again with a lower "
                "--lr or --head_lr, or with --precision no"
            )

    def _agree(self, asked: bool) -> bool:
        """Exchange requests to stop and unreadable images with the other ranks."""
        everybody = distributed.gather_objects((asked, self.faults))
        self.faults = []
        bad = self.log.faults(fault for _, found in everybody for fault in found)
        total = len(self.dataset.paths)
        if bad > self.config.max_bad_share * total:
            raise ValueError(
                f"{bad} of {total} training images could not be read, more than max_bad_share="
                f"{self.config.max_bad_share} allows; they are listed in {self.log.folder / BAD_IMAGES}: mend or "
                "remove them, or raise --max_bad_share"
            )
        return any(asked for asked, _ in everybody)

    def _record(self, done: Step, rate: float) -> None:
        values = {name: distributed.mean(value).item() for name, value in {"loss": done.loss, **done.parts}.items()}
        self.log.metrics(
            {
                "step": self.place.step,
                "epoch": round(self.place.step / self.batches.steps_per_epoch, 4),
                **{name: value if math.isfinite(value) else None for name, value in values.items()},
                "scale": self.core.scale().item(),
                "lr": [group["lr"] for group in self.optimizer.param_groups],
                "pairs_per_second": round(rate, 2),
                "skipped_steps": self.guard.skipped,
            }
        )

    def _validate(self) -> None:
        """Validate, and save where it is the best so far; without validation the newest is the best."""
        with self.meter("evaluation"), gathered(self.accelerator, self.core):
            values = dict(self.validate(self.core)) if self.validate is not None else {}
        score = values.get(SELECT_BY, float(self.place.step))
        if values:
            self.log.metrics({"step": self.place.step, "split": "val", **values})
            self.log.say(f"step {self.place.step}/{self.steps}  validation {SELECT_BY} {score:.2f}")
        if score > self.place.best:
            self.place.best, self.place.best_step = score, self.place.step
            if distributed.is_main() or self.accelerator.is_fsdp2:  # each has a share of what is saved
                with self.meter("saving"):
                    self.save(self.core, {"step": float(self.place.step), **values})
        distributed.barrier()
        self.model.train()
