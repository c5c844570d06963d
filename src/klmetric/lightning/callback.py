"""`KLDivergenceCallback`: logs the divergence at the end of every epoch."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.regression import KLDivergence as TorchmetricsKL

from klmetric.estimate import KLDivergenceEstimate
from klmetric.lightning import history
from klmetric.lightning.framework import PREFIXES, STEPS, Callback, LightningModule, Stage, Trainer
from klmetric.lightning.loaders import loaders_of, loop_of
from klmetric.lightning.logging import Reduced, names_in_use, show_in_columns
from klmetric.lightning.outputs import take
from klmetric.lightning.running import Running, metrics_of
from klmetric.metric import KLDivergence
from klmetric.options import check_choice
from klmetric.summary import KLDivergenceSummary

_OF_MANY_VALUES = (KLDivergenceEstimate, KLDivergenceSummary)


class KLDivergenceCallback(Callback):
    """Log the KL divergence of every epoch, the same number for every number of processes.

    At the end of each epoch of each stage it logs `train_kl`, `val_kl` or `test_kl`, where `EarlyStopping`,
    `ModelCheckpoint` and the loggers find it in the same epoch. The sanity check logs nothing, but it finds a wrong key
    before the training.

    Of several dataloaders for validation or test, each has a value of its own: `val_kl/dataloader_idx_0` and so on
    where they are a list; where they are a dict its keys name them, even a single one: `{"clean": ..., "noisy": ...}`
    gives `val_kl/clean` and `val_kl/noisy`, and a dict or list within it `val_kl/noisy/low`, `val_kl/noisy/0`.

    A batch for which the step returns nothing is left out. An epoch without any other batch gives NaN, with a warning.

    Args:
        metric: what to measure, a `Metric` or `MetricCollection` whose `update` takes p, q and weight. The callback
            works on copies of it, one for each stage and dataloader. None for `KLDivergence()`: probabilities. Where
            `compute` gives a dict, each key is logged as `{name}_{key}`: with `KLDivergenceSummary()` there are
            `val_kl_mean`, `val_kl_p99` and so on (the progress bar shows the mean). For `KLDivergenceEstimate()`, p and
            q give the log-probabilities of the drawn tokens.
        p: the reference: a key into the dict that the step returns, or a callable (outputs, batch) that gives a tensor,
            a `torch.distributions.Distribution`, a `klmetric.Head` or a `klmetric.TopK`. (For `ddp_spawn` a function of
            a module: lambdas cannot be sent to its processes.) A callable is asked even where the validation or test
            step returned nothing, with outputs None, as the batch may be all that it needs; it may return None then to
            leave the batch out.
        q: the approximation, like `p`.
        weight: like `p`, one weight per sample or row; None for 1.
        targets: like `p`, the class that came true in each row (the next token), for a metric that takes them: a row
            whose target is its `ignore_index` does not count, and `KLDivergenceSummary(perplexity=True)` measures how
            well both predict the others.
        stages: any of "train", "validate" and "test".
        name: of the logged value; {stage} becomes train, val or test. Nothing else may be logged by that name: two
            callbacks in one Trainer need two names.
        prog_bar: whether the progress bar shows it.
        drop_padding: leave out the samples that `DistributedSampler` repeats so that all processes get equally many
            (`klmetric.distributed.real_samples`). It needs a first axis of samples in `p` and `q`.

    Attributes:
        history: one dict for each epoch end, with the stage, the epoch, the number of steps taken and every value
            that was logged. It is saved in the checkpoint and continues from there; so does the training epoch in the
            middle of which a checkpoint is made, with what all processes have counted until then. (The workers of
            `ddp_spawn` and `ddp_notebook` end with the training, and their callbacks with them: there, read the history
            from the checkpoint or the logger.)

    Raises:
        TypeError: for a metric, a step or an output of the wrong kind.
        ValueError: for an unknown stage, a metric of `reduction="none"`, a name that something else is logged by, a key
            that the step does not return (naming those that it does), a batch that cannot be matched with its samples.

    Examples:
        >>> from klmetric import KLDivergence
        >>> from klmetric.lightning import KLDivergenceCallback
        >>> kl = KLDivergenceCallback(KLDivergence(input_format="logits"), p="teacher", q="student")
        >>> # In the module: def validation_step(...): return {"teacher": teacher_logits, "student": student_logits}
        >>> # trainer = Trainer(callbacks=[kl, EarlyStopping(monitor="val_kl")])
    """

    def __init__(
        self,
        metric: Metric | MetricCollection | None = None,
        *,
        p: str | Callable[[Any, Any], Any] = "p",
        q: str | Callable[[Any, Any], Any] = "q",
        weight: str | Callable[[Any, Any], Any] | None = None,
        targets: str | Callable[[Any, Any], Any] | None = None,
        stages: Sequence[Stage] = ("validate", "test"),
        name: str = "{stage}_kl",
        prog_bar: bool = True,
        drop_padding: bool = True,
    ) -> None:
        metric = KLDivergence() if metric is None else metric
        if not isinstance(metric, (Metric, MetricCollection)):
            hint = f" Did you mean {metric.__name__}()?" if isinstance(metric, type) else ""
            raise TypeError(f"`metric` must be a torchmetrics Metric or MetricCollection. Got {metric!r}.{hint}")
        for one in metrics_of(metric):
            if isinstance(one, (KLDivergence, TorchmetricsKL)) and one.reduction in (None, "none"):
                raise ValueError(
                    f"`metric` must compute scalars, to be logged. Got {type(one).__name__} with reduction="
                    f'{one.reduction!r}, a value for each row. Use reduction="mean", or KLDivergenceSummary for how the'
                    " rows are spread."
                )
        for key, source in (("p", p), ("q", q), ("weight", weight), ("targets", targets)):
            if not (isinstance(source, str) or callable(source) or (key not in ("p", "q") and source is None)):
                raise TypeError(f"`{key}` must be a key (str) or a callable (outputs, batch). Got {source!r}.")
        if isinstance(stages, str):
            raise TypeError(f"`stages` must be a sequence of names. Got {stages!r}. Write ({stages!r},).")
        if not stages:
            raise ValueError(f"`stages` must have at least one of {tuple(PREFIXES)}. Got {stages!r}.")
        for stage in stages:
            check_choice("stages", stage, tuple(PREFIXES))
        try:
            names = {stage: name.format(stage=PREFIXES[stage]) for stage in stages}
        except (KeyError, IndexError) as error:
            raise ValueError(f"`name` must have no other field than {{stage}}. Got {name!r}.") from error
        if "train" in stages and len(set(names.values())) < len(stages):
            raise ValueError(f"`name` must tell the stages apart. Got {name!r} for {stages}. Put {{stage}} into it.")
        if reserved := set(names.values()) & set(history.FIELDS):
            raise ValueError(f"`name` must be none of {history.FIELDS}, which the history has. Got {reserved.pop()!r}.")
        self.metric = metric
        self.p, self.q, self.weight, self.targets = p, q, weight, targets
        self.stages = tuple(stages)
        self.name = name
        self._names = names
        self.prog_bar = prog_bar
        self.drop_padding = drop_padding
        self.history: list[dict[str, Any]] = []
        self._running: dict[str, list[Running]] = {}
        self._saved: dict[str, Any] | None = None  # totals of an epoch that a checkpoint has interrupted
        self._is_evaluating = False

    @property
    def state_key(self) -> str:
        """Tells apart two of these callbacks in one checkpoint."""
        return self._generate_state_key(name=self.name, stages=self.stages)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what a run before this one has left unfinished."""
        self._running, self._saved = {}, None
        self._is_evaluating = stage != "fit"
        self._check_alone(trainer)
        if trainer.world_size > 1 and not all(one.sync_on_compute for one in metrics_of(self.metric)):
            warnings.warn(
                "The metric has sync_on_compute=False: every process logs the value of its own samples alone, which"
                " depends on the number of processes. Leave sync_on_compute out for that of all of them.",
                stacklevel=2,
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take any state again."""
        self._is_evaluating = False

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the history, and the totals of a training epoch that has not ended: those of all processes."""
        # Not in a `state_dict`: where two callbacks have one, and one name, Lightning speaks up before `setup` can.
        state: dict[str, Any] = {"history": [dict(record) for record in self.history]}
        # A checkpoint on an exception is made by the process that has it: the others do not come to the gathering.
        alone = trainer.interrupted and trainer.world_size > 1
        running = self._running.get("train", [])
        if running and not alone and (trainer.world_size == 1 or all(one.can_continue for one in running)):
            state["running"] = {"epoch": trainer.current_epoch, "states": [one.state() for one in running]}
        checkpoint["callbacks"][self.state_key] = state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the history of a checkpoint, and the training epoch in the middle of which it was made."""
        if self._is_evaluating and self.history:  # `trainer.test(ckpt_path="best")` is a part of the same history
            return
        self.history = [dict(record) for record in state_dict["history"]]
        self._saved = state_dict.get("running")

    def plot(self, ax: Any = None, names: Sequence[str] | None = None) -> Any:
        """Draw the values of the history, over the epochs (over the steps where an epoch has several values).

        Args:
            ax: a matplotlib axis to draw on; None for a new figure.
            names: of the values to draw; None for all, but of a summary only the divergences.

        Returns:
            The figure and the axis.

        Raises:
            RuntimeError: if nothing was logged yet.
            ValueError: for a name of which nothing was logged.
            ModuleNotFoundError: without matplotlib.
        """
        if not self.history:
            raise RuntimeError(
                f"There must be a logged value to draw. Got none: no epoch of the stages {self.stages} has ended yet."
                " Did the Trainer run one of them, with this callback, in this process? (Under ddp_spawn and"
                " ddp_notebook the history ends with the processes: read it from a checkpoint or from the logger.)"
            )
        logged = history.names(self.history)
        if names is None:
            names = [key for key in logged if self._is_divergence(key)]
        if unknown := [name for name in names if name not in logged]:
            raise ValueError(f"`names` must be of logged values. Got {unknown[0]!r}; there are {logged}.")
        return history.draw(self.history, names, ax)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from nothing."""
        self._saved = None
        self._start("train", trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Go on in the middle of an epoch, where a checkpoint was made: Lightning does not start that again."""
        if "train" not in self._running:
            self._start("train", trainer, pl_module, batch_idx)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from nothing."""
        self._start("validate", trainer, pl_module)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from nothing."""
        self._start("test", trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch."""
        self.on_train_batch_start(trainer, pl_module, batch, batch_idx)  # of a batch that is None it was not called
        # Lightning makes {} of nothing, and has skipped the batch then, unless the module optimises by hand.
        is_skipped = not outputs and pl_module.automatic_optimization
        self._update("train", outputs or None, batch, batch_idx, 0, is_skipped)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        self._update("validate", outputs, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the batch."""
        self._update("test", outputs, batch, batch_idx, dataloader_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._finish("train", trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._finish("validate", trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log."""
        self._finish("test", trainer, pl_module)

    def _is_divergence(self, key: str) -> bool:
        """Whether a logged value is none of the shares, counts and places of a summary or an estimate."""
        if not any(isinstance(one, _OF_MANY_VALUES) for one in self.metric.modules()):
            return True
        names = "|".join(map(re.escape, self._names.values()))
        others = (
            r"agreement.*|count|infinite|invalid|top\d+_(sample|position)|(total_variation|perplexity|delta_p).*"
            r"|ess|mismatch|tokens|sequences|tail_mass.*"
        )
        # Between the two stands what a collection calls the metric, and behind them the name of the dataloader.
        return not re.match(rf"({names})_([^/]*_)?({others})(/|$)", key)

    def _check_alone(self, trainer: Trainer) -> None:
        """Refuse another callback of the same name; the keys of dicts are known when they are logged."""
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        is_twice = callbacks.count(self) > 1  # each batch would count twice
        for other in callbacks:
            if not isinstance(other, KLDivergenceCallback) or (other is self and not is_twice):
                continue
            for mine, theirs in product(self.stages, other.stages):
                if self._names[mine] == other._names[theirs] and (mine == theirs or "train" in (mine, theirs)):
                    raise ValueError(
                        f"Each KLDivergenceCallback of a Trainer needs names of its own. Got {self._names[mine]!r} of"
                        f" {self._described} and of {other._described}. Give one of them a `name`, such as"
                        ' name="{stage}_kl_2".'
                    )

    @property
    def _described(self) -> str:
        return f"KLDivergenceCallback({type(self.metric).__name__}, stages={self.stages}, name={self.name!r})"

    def _start(self, stage: Stage, trainer: Trainer, pl_module: LightningModule, first: int = 0) -> None:
        if stage not in self.stages:
            return
        # One for every dataloader, even if this process gets no batch of it: the others wait for its totals.
        self._running[stage] = [
            Running(self.metric, pl_module.device, loader, self.drop_padding, suffix, first)
            for suffix, loader in loaders_of(stage, trainer).items()
        ]
        if stage == "train":
            saved, self._saved = self._saved, None
            # Made after the last step of an epoch, it is of one that Lightning does not go back to. Else, one process
            # takes the totals of all of them, whatever their number is now.
            states = saved["states"] if saved and saved["epoch"] == trainer.current_epoch else None
            if trainer.is_global_zero and (states or first):
                self._continue(states)

    def _continue(self, states: list[Any] | None) -> None:
        running = self._running["train"]
        if states and len(states) == len(running) and all(map(Running.fits, running, states)):
            for one, its_states in zip(running, states, strict=True):
                one.load(its_states)
        else:
            warnings.warn(
                "The checkpoint has no totals of this metric, with these options, for the epoch in whose middle it was"
                " made (wrappers keep none, nor do metrics on several processes whose states do not merge): its value"
                " is of the rest of the epoch.",
                stacklevel=3,
            )

    def _update(
        self,
        stage: Stage,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
        is_skipped: bool = False,
    ) -> None:
        if stage not in self.stages:
            return
        running = self._running[stage][dataloader_idx]
        if is_skipped:
            running.skip()
            return
        sources = {"p": self.p, "q": self.q, "weight": self.weight, "targets": self.targets}
        inputs = {key: take(key, x, outputs, batch, stage) for key, x in sources.items() if x is not None}
        if outputs is None and any(one is None for one in inputs.values()):
            running.skip()
        else:
            running.update(inputs["p"], inputs["q"], inputs.get("weight"), batch_idx, inputs.get("targets"))

    def _finish(self, stage: Stage, trainer: Trainer, pl_module: LightningModule) -> None:
        if stage not in self.stages:
            return
        if stage not in self._running:  # resumed at the very end of an epoch
            if not (stage == "train" and self._saved):
                return
            self._start(stage, trainer, pl_module)
        running = self._running.pop(stage)
        values = [self._values(stage, one) for one in running]
        if trainer.sanity_checking:
            return
        name = self._names[stage]
        has_mean = isinstance(self.metric, _OF_MANY_VALUES)
        record: dict[str, Any] = {"stage": stage, "epoch": trainer.current_epoch, "step": trainer.global_step}
        taken = names_in_use(trainer)
        for key, value in [item for one in values for item in one.items()]:
            if key in taken:
                raise ValueError(
                    f"Nothing else may be logged by the name of a value of KLDivergenceCallback. Got {key!r}, which the"
                    f" module or another callback logs, too. Give {self._described} another `name`, such as"
                    ' name="{stage}_kl_2".'
                )
            pl_module.log(
                key,
                Reduced(value),
                # Of a summary the mean: all of it would fill the screen.
                prog_bar=self.prog_bar and (not has_mean or key.startswith(f"{name}_mean")),
                on_step=False,
                on_epoch=True,
                add_dataloader_idx=False,  # by Lightning it is known during a batch only
                metric_attribute=key,
                batch_size=1,
            )
            record[key] = value.item()
        if len(running) > 1:
            show_in_columns(loop_of(stage, trainer), [one.batches > 0 for one in running], values)
        self.history.append(record)

    def _values(self, stage: Stage, running: Running) -> dict[str, Tensor]:
        """What one dataloader gives, by the names that it is logged by."""
        name, result = self._names[stage], running.compute()
        values = {f"{name}_{key}": x for key, x in result.items()} if isinstance(result, Mapping) else {name: result}
        values = {key + running.suffix: value for key, value in values.items()}
        for key, value in values.items():
            if value.numel() != 1:
                raise ValueError(
                    f"The metric must compute scalars to be logged. Got shape {tuple(value.shape)} for {key!r}."
                    ' Use reduction="mean".'
                )
        lost = [key for key, value in values.items() if value.isnan()]
        if lost and running.batches == running.skipped:
            reason = f"`{STEPS[stage]}` returned nothing for each of them" if running.batches else "there was none"
            warnings.warn(f"No batch was measured: {reason}. So {lost[0]!r} is NaN.", stacklevel=2)
        return values
