"""The training loop: on Accelerate, a function of the step number alone, stopped and resumed anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.utils import get_total_norm

from lilt import distributed
from lilt.config import TrainConfig
from lilt.data import Batch, Batches, Collate, Pairs, make_loader
from lilt.data.order import draw_seed
from lilt.losses import build_loss
from lilt.model import Teacher, TwoTower
from lilt.towers.loading import fixed_seed
from lilt.train.distill import Distiller
from lilt.train.guard import Guard
from lilt.train.kernels import quick_attention
from lilt.train.liveness import FirstSteps
from lilt.train.log import BAD_IMAGES, RunLog, peak_memory
from lilt.train.meter import Meter
from lilt.train.objectives import parse_objective
from lilt.train.optim import make_optimizer, make_schedule
from lilt.train.place import Outcome, Place
from lilt.train.state import find_state, keep_frozen_weights_out, save_state
from lilt.train.step import Learner, Objective, Step, backward
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
        self.batches = Batches(order, config.batch_size, rank=distributed.rank(), world=distributed.world_size())
        self.steps = config.max_steps or math.ceil(config.epochs * self.batches.steps_per_epoch)
        warmup = math.ceil(0.05 * self.steps) if config.warmup_steps is None else config.warmup_steps
        self.teacher = teacher
        self.learner = Learner(core, None if teacher is None else self._distiller(teacher)).to(accelerator.device)
        beside = [] if self.learner.distiller is None else list(self.learner.distiller.parameters())
        optimizer = make_optimizer(core, config.lr, config.head_lr, config.weight_decay, config.beta2, beside)
        self.schedule = make_schedule(optimizer, self.steps, warmup, config.lr_floor)
        self.place, self.meter = Place(), Meter()
        self.objective = Objective(build_loss(config.loss), config.same, self.learner.distiller, config.distill_weight)
        keep_frozen_weights_out(accelerator, self.learner)
        self.model, self.optimizer = accelerator.prepare(self.learner, optimizer)
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
            accelerator.load_state(str(state))
            log.rewind(self.place.step)
        self.batches.start = self.place.step
        self.first_steps = FirstSteps(core, self.place.step)
        # the loader is ours: Accelerate's would repeat samples to even out batches, which are false negatives here
        self.loader = make_loader(
            dataset,
            config.workers,
            batch_sampler=self.batches,
            collate_fn=collate,
            pin_memory=accelerator.device.type == "cuda",
            # without its own generator a loader draws its base seed from the one that dropout uses
            generator=torch.Generator().manual_seed(config.seed),
        )
        self.faults = list(dataset.faults)

    def _distiller(self, teacher: Teacher) -> Distiller:
        """Return what the model meets its teacher with; its start is drawn from the seed."""
        config, rows = self.config, self.batches.batch
        with fixed_seed(config.seed):
            return Distiller(
                parse_objective(config.distill),
                self.core.projection.dim,
                teacher.dim,
                batch_size=rows,
                pairs=self.steps * rows,
                image_weight=config.distill_image,
                text_weight=config.distill_text,
            )

    def run(self) -> Outcome:
        """Train until the last step, or until asked to stop; then the state is saved.

        Raises ValueError for a loss that is not finite, tensors that do not learn, or too many unreadable images.
        """
        count = 0
        every = max(1, round(self.config.eval_every * self.batches.steps_per_epoch))
        bar = self.log.bar("training", self.steps, self.place.step)
        batches: Iterator[Batch] = iter(self.loader) if self.place.step < self.steps else iter(())
        before = self._stepping()
        self.model.train()
        with Stop() as stop, quick_attention(self.accelerator):
            while self.place.step < self.steps:
                with self.meter("data"):
                    batch = next(batches)
                with self.meter("steps"):
                    done = self._step(batch.to(self.accelerator.device))
                self.faults += batch.faults
                self.place.step += 1
                count += 1
                last = self.place.step == self.steps
                # what costs a wait for the device or for other ranks happens at log steps; on one CPU it is free
                keep = self.place.step % every == 0 or last
                due = self.place.step % self.config.log_every == 0 or keep
                asked = False
                if due or (self.accelerator.device.type == "cpu" and distributed.world_size() == 1):
                    with self.meter("steps"):
                        for line in self.guard.settle(self._kept()):
                            self.log.say(line)
                    asked = self._agree(stop.asked)
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

    def _step(self, batch: Batch) -> Step:
        done = backward(self.model, self.objective, batch, self.accelerator, self.config.micro_batch, self.teacher)
        self.first_steps.look(self.optimizer)
        norm = self._clip()
        if self.accelerator.scaler is None:
            self.guard.step(self.optimizer, self.place.step + 1, norm, done.broken, batch.image_id)
        else:  # the scaler leaves out steps of its own, and by them finds its factor
            self.optimizer.step()
            self.guard.note(self.place.step + 1, ~done.broken.any(), done.broken, batch.image_id)
        if not self.accelerator.optimizer_step_was_skipped:
            self.schedule.step()
        self.optimizer.zero_grad()
        self.learner.clamp_()
        return done

    def _clip(self) -> Tensor:
        """Return the norm of the gradient, after it was cut down if that is asked for."""
        trained = list(self.learner.trained().values())
        if self.config.clip_norm is not None:
            norm = self.accelerator.clip_grad_norm_(trained, self.config.clip_norm)
        else:
            norm = get_total_norm([p.grad for p in trained if p.grad is not None])
        # engines that clip on their own may say nothing
        return norm if isinstance(norm, Tensor) else torch.zeros((), device=self.accelerator.device)

    def _kept(self) -> str:
        return (
            f"The best checkpoint so far (step {self.place.best_step}) and the last state in {self.log.folder} are kept"
        )

    def _check_weights(self) -> None:
        """Keep broken weights out of what is saved: the loss of a step is from before its update."""
        for name, parameter in self.learner.trained().items():
            if not torch.isfinite(parameter).all():
                raise ValueError(
                    f"{name} is no longer finite at step {self.place.step}. {self._kept()}: start again with a lower "
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
        with self.meter("evaluation"):
            values = dict(self.validate(self.core)) if self.validate is not None else {}
        score = values.get(SELECT_BY, float(self.place.step))
        if values:
            self.log.metrics({"step": self.place.step, "split": "val", **values})
            self.log.say(f"step {self.place.step}/{self.steps}  validation {SELECT_BY} {score:.2f}")
        if score > self.place.best:
            self.place.best, self.place.best_step = score, self.place.step
            if distributed.is_main():
                with self.meter("saving"):
                    self.save(self.core, {"step": float(self.place.step), **values})
        distributed.barrier()
        self.model.train()
