"""The callback under a real Trainer."""

import csv
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning_run
import pytest
import torch
import torch.distributions as D
from cases import GRID, pair
from kinds import value_of
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from lightning_run import SIZES, Fixed, WithResumableLoader, loader, record_of, resumable_fit, trainer
from processes import as_launched, free_port
from torch.utils._pytree import tree_map
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from torchmetrics import MetricCollection, MinMaxMetric
from torchmetrics.regression import KLDivergence as TorchmetricsKL

from klmetric import KLDivergence, KLDivergenceEstimate, KLDivergenceSummary, kl_divergence
from klmetric.lightning import KLDivergenceCallback
from klmetric.lightning.loaders import loaders_of
from klmetric.lightning.running import Running

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:GPU available")

EXACT = {size: kl_divergence(*pair(size, 5, seed=size)) for size in (*SIZES, 3)}


def close(value, size):
    torch.testing.assert_close(torch.as_tensor(value), EXACT[size], rtol=0, atol=0)


def evaluation_of(tree, mode="sequential"):
    """A trainer that tests dataloaders in a structure of this shape."""
    tree = tree_map(lambda leaf: loader(3) if leaf == 0 else leaf, tree)
    return SimpleNamespace(test_loop=SimpleNamespace(_combined_loader=CombinedLoader(tree, mode)))


class Drifting(Fixed):
    """Predictions that get worse with every epoch but the third."""

    sharpness = (1.0, 1.2, 0.5, 1.4, 1.6)

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        p, _ = batch
        distance = self.sharpness[self.current_epoch]
        return {"p": p, "q": (p.log() + distance * torch.arange(5)).softmax(-1)}

    def exact(self, epoch):
        p = pair(SIZES[0], 5, seed=SIZES[0])[0]
        return kl_divergence(p, (p.log() + self.sharpness[epoch] * torch.arange(5)).softmax(-1)).item()


class AnyLength(Fixed):
    allow_zero_length_dataloader_with_multiple_devices = True


class TestLogging:
    def test_fit_validate_test(self, tmp_path):
        callback = KLDivergenceCallback(stages=("train", "validate", "test"))
        run = trainer(tmp_path, callbacks=[callback], num_sanity_val_steps=2)
        run.fit(Fixed(), loader(SIZES[0]), loader(SIZES[1]))
        close(run.callback_metrics["train_kl"], SIZES[0])
        close(run.callback_metrics["val_kl"], SIZES[1])
        close(run.validate(Fixed(), loader(3), verbose=False)[0]["val_kl"], 3)
        close(run.test(Fixed(), loader(SIZES[1]), verbose=False)[0]["test_kl"], SIZES[1])
        stages = [(record["stage"], record["epoch"], record["step"]) for record in callback.history]
        assert stages == [
            ("validate", 0, 4),
            ("train", 0, 4),
            ("validate", 1, 8),
            ("train", 1, 8),
            ("validate", 2, 8),
            ("test", 2, 8),
        ]

    def test_default_stages(self, tmp_path):
        run = trainer(tmp_path, callbacks=[KLDivergenceCallback()], max_epochs=1)
        run.fit(Fixed(), loader(SIZES[0]), loader(SIZES[1]))
        assert set(run.callback_metrics) == {"val_kl"}

    def test_the_first_classes(self, tmp_path):
        callback = KLDivergenceCallback(KLDivergence(classes=3))
        trainer(tmp_path, callbacks=[callback]).validate(Fixed(), loader(SIZES[0]), verbose=False)
        p, q = pair(SIZES[0], 5, seed=SIZES[0])
        assert callback.history[0]["val_kl"] == kl_divergence(p[:, :3], q[:, :3]).item()

    def test_one_value_of_a_summary(self, tmp_path):
        callback = KLDivergenceCallback(KLDivergenceSummary()["p90"])
        run = trainer(tmp_path, callbacks=[callback])
        run.validate(Fixed(), loader(SIZES[0]), verbose=False)
        values = value_of("summary", *pair(SIZES[0], 5, seed=SIZES[0]))
        assert run.callback_metrics == {"val_kl": values["p90"]}

    @pytest.mark.filterwarnings("ignore:`log_p` and `log_q` should be logarithms")
    def test_an_estimate(self, tmp_path):
        callback = KLDivergenceCallback(KLDivergenceEstimate())
        run = trainer(tmp_path, callbacks=[callback])
        with pytest.warns(UserWarning, match="in which all values are from 0 to 1"):
            run.validate(Fixed(), loader(SIZES[0]), verbose=False)
        values = value_of("token", *pair(SIZES[0], 5, seed=SIZES[0]))  # for log-probabilities any numbers pass
        assert run.callback_metrics == {f"val_kl_{name}": value.float() for name, value in values.items()}
        assert set(run.progress_bar_metrics) == {"val_kl_mean"}
        import matplotlib

        matplotlib.use("agg")
        drawn = {line.get_label() for line in callback.plot()[1].lines}
        matplotlib.pyplot.close("all")
        assert drawn == {f"val_kl_{name}" for name in ("mean", "stderr", "low", "high")}

    def test_sanity_check_is_silent(self, tmp_path):
        callback = KLDivergenceCallback()
        run = trainer(tmp_path, callbacks=[callback], max_epochs=0, num_sanity_val_steps=2)
        run.fit(Fixed(), loader(SIZES[0]), loader(SIZES[1]))
        assert callback.history == []
        assert run.callback_metrics == {}

    def test_sanity_check_finds_a_wrong_key(self, tmp_path):
        run = trainer(tmp_path, callbacks=[KLDivergenceCallback(q="student")], num_sanity_val_steps=1)
        with pytest.raises(ValueError, match="`q='student'` must be a key of what `validation_step` returns"):
            run.fit(Fixed(), loader(SIZES[0]), loader(SIZES[1]))
        assert run.global_step == 0

    @pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
    def test_several_dataloaders(self, tmp_path, capsys):
        callback = KLDivergenceCallback()
        run = trainer(tmp_path, callbacks=[callback], max_epochs=1)
        run.fit(Fixed(), loader(3), [loader(size) for size in SIZES])
        for index, size in enumerate(SIZES):
            close(run.callback_metrics[f"val_kl/dataloader_idx_{index}"], size)
        assert "val_kl" not in run.callback_metrics
        run.test(Fixed(), [loader(size) for size in SIZES])
        for index, size in enumerate(SIZES):
            close(run.callback_metrics[f"test_kl/dataloader_idx_{index}"], size)
        # Lightning's table has a column for each.
        shown = re.search(r"test_kl\W+([\d.]+)\W+([\d.]+)", capsys.readouterr().out)
        assert [float(value) for value in shown.groups()] == [EXACT[size].item() for size in SIZES]
        empty = DataLoader([])
        with pytest.warns(UserWarning, match="No batch was measured: there was none. So 'test_kl/dataloader_idx_1' is"):
            run.test(AnyLength(), [loader(3), empty, loader(SIZES[0])])
        close(run.callback_metrics["test_kl/dataloader_idx_2"], SIZES[0])
        assert run.callback_metrics["test_kl/dataloader_idx_1"].isnan()
        shown = re.search(r"test_kl\W+([\d.]+)\W+([\d.]+)", capsys.readouterr().out)
        assert [float(value) for value in shown.groups()] == [EXACT[size].item() for size in (3, SIZES[0])]

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_a_dict_of_dataloaders_names_the_values(self, tmp_path):
        def callbacks():
            best = ModelCheckpoint(tmp_path, monitor="val_kl/clean", filename="best", save_last=True)
            return [KLDivergenceCallback(), EarlyStopping("val_kl/noisy", patience=9), best]

        loaders = {"clean": loader(SIZES[0]), "noisy": loader(SIZES[1])}
        histories = []
        for epochs, ckpt_path in ((2, None), (3, tmp_path / "last.ckpt")):
            run = trainer(tmp_path, callbacks=callbacks(), enable_checkpointing=True, max_epochs=epochs)
            run.fit(Fixed(), loader(3), loaders, ckpt_path=ckpt_path)
            assert set(run.callback_metrics) == {"val_kl/clean", "val_kl/noisy"}
            close(run.callback_metrics["val_kl/clean"], SIZES[0])
            close(run.checkpoint_callback.best_model_score, SIZES[0])
            close(run.early_stopping_callback.best_score, SIZES[1])
            histories.append(run.callbacks[0].history)
        assert [len(history) for history in histories] == [2, 3]
        assert histories[1][:2] == histories[0]
        assert histories[1][2].keys() == {"stage", "epoch", "step", "val_kl/clean", "val_kl/noisy"}
        # One alone keeps its name, so that what monitors it goes on.
        run.validate(Fixed(), {"clean": loader(SIZES[0])}, verbose=False)
        assert set(run.callback_metrics) == {"val_kl/clean"}
        import matplotlib

        matplotlib.use("agg")
        callback = KLDivergenceCallback(KLDivergenceSummary(), name="{stage}/kl")
        trainer(tmp_path, callbacks=[callback]).validate(Fixed(), {"word_count": loader(3)}, verbose=False)
        drawn = [line.get_label() for line in callback.plot()[1].lines]
        matplotlib.pyplot.close("all")
        assert "val/kl_mean/word_count" in drawn
        assert "val/kl_count/word_count" not in drawn

    @pytest.mark.parametrize(
        ("tree", "suffixes"),
        [
            (0, [""]),
            ([0], [""]),
            ([0, 0], ["/dataloader_idx_0", "/dataloader_idx_1"]),
            ([0, [0, 0]], ["/dataloader_idx_0", "/dataloader_idx_1", "/dataloader_idx_2"]),
            ({"a": 0}, ["/a"]),
            ({"b": {"x": 0, "y": 0}, "a": [0, 0]}, ["/b/x", "/b/y", "/a/0", "/a/1"]),
            ([{"a": 0}, 0], ["/0/a", "/dataloader_idx_1"]),
            ({3: 0, "ä ö/{stage}": 0, "": 0}, ["/3", "/ä ö/{stage}", "/"]),
        ],
        ids=["one", "list of one", "list", "nested list", "dict of one", "nested", "mixed", "odd"],
    )
    def test_names_of_dataloaders(self, tree, suffixes):
        assert list(loaders_of("test", evaluation_of(tree))) == suffixes

    @pytest.mark.parametrize("tree", [{"a": {"b": 0}, "a/b": 0}, {1: 0, "1": 0}])
    def test_names_of_dataloaders_that_collide(self, tree):
        with pytest.raises(ValueError, match=r"and must differ. Got more than one '(a/b|1)'. Rename one of the keys."):
            loaders_of("test", evaluation_of(tree))

    def test_reloaded_dataloaders(self, tmp_path):
        class Reloads(Fixed):
            def train_dataloader(self):
                return loader((7, 5)[self.current_epoch])

            def val_dataloader(self):
                return {"a": loader((5, 3)[self.current_epoch]), "b": loader((3, 7)[self.current_epoch])}

        callback = KLDivergenceCallback(stages=("train", "validate"))
        trainer(tmp_path, callbacks=[callback], reload_dataloaders_every_n_epochs=1).fit(Reloads())
        for record, values in zip(
            callback.history,
            ({"val_kl/a": 5, "val_kl/b": 3}, {"train_kl": 7}, {"val_kl/a": 3, "val_kl/b": 7}, {"train_kl": 5}),
            strict=True,
        ):
            for key, size in values.items():
                close(record[key], size)

    def test_validation_within_an_epoch(self, tmp_path):
        callback = KLDivergenceCallback(stages=("train", "validate"))
        run = trainer(tmp_path, callbacks=[callback], max_epochs=1, val_check_interval=2)
        run.fit(Fixed(), loader(SIZES[0]), loader(SIZES[1]))
        assert [record["step"] for record in callback.history] == [2, 4, 4]
        for record in callback.history[:2]:
            close(record["val_kl"], SIZES[1])
        close(callback.history[2]["train_kl"], SIZES[0])

    def test_check_val_every_n_epoch(self, tmp_path):
        callback = KLDivergenceCallback()
        run = trainer(tmp_path, callbacks=[callback], max_epochs=4, check_val_every_n_epoch=2)
        run.fit(Fixed(), loader(SIZES[0]), loader(SIZES[1]))
        assert [record["epoch"] for record in callback.history] == [1, 3]

    def test_limit_val_batches(self, tmp_path):
        run = trainer(tmp_path, callbacks=[KLDivergenceCallback()], max_epochs=1, limit_val_batches=2)
        run.fit(Fixed(), loader(3), loader(SIZES[0]))
        p, q = pair(SIZES[0], 5, seed=SIZES[0])
        torch.testing.assert_close(run.callback_metrics["val_kl"], kl_divergence(p[:4], q[:4]), rtol=0, atol=0)

    def test_no_validation(self, tmp_path):
        callback = KLDivergenceCallback()
        run = trainer(tmp_path, callbacks=[callback], max_epochs=1, limit_val_batches=0)
        run.fit(Fixed(), loader(3), loader(SIZES[0]))
        assert callback.history == []

    def test_loggers_see_every_epoch(self, tmp_path):
        loggers = [CSVLogger(tmp_path, name="csv", version=""), TensorBoardLogger(tmp_path, name="tb", version="")]
        model = Drifting()
        run = trainer(tmp_path, callbacks=[KLDivergenceCallback()], logger=loggers, max_epochs=5, log_every_n_steps=1)
        run.fit(model, loader(3), loader(SIZES[0]))
        with (tmp_path / "csv" / "metrics.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["val_kl"]]
        assert [int(row["epoch"]) for row in rows] == list(range(5))
        for epoch, row in enumerate(rows):
            assert float(row["val_kl"]) == pytest.approx(model.exact(epoch), rel=1e-6)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tb")).Reload()
        assert [event.value for event in events.Scalars("val_kl")] == pytest.approx(
            [model.exact(epoch) for epoch in range(5)], rel=1e-6
        )

    def test_progress_bar(self, tmp_path, capsys):
        run = trainer(tmp_path, callbacks=[KLDivergenceCallback()], enable_progress_bar=True, max_epochs=1)
        run.fit(Fixed(), loader(3), loader(SIZES[0]))
        assert re.search(rf"val_kl[:=] ?{EXACT[SIZES[0]].item():.3f}", "".join(capsys.readouterr()))


class TestMonitoring:
    def test_early_stopping_and_checkpoint_see_the_value_of_this_epoch(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, monitor="val_kl", filename="{epoch}-{val_kl:.4f}", save_top_k=1)
        model = Drifting()
        # The callbacks that monitor stand before the one that logs.
        callbacks = [EarlyStopping("val_kl", patience=1), checkpoint, KLDivergenceCallback()]
        run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=5)
        run.fit(model, loader(3), loader(SIZES[0]))
        # Worse in epoch 1 (patience is 1), so it ends there.
        assert run.current_epoch == 2
        assert Path(checkpoint.best_model_path).name == f"epoch=0-val_kl={model.exact(0):.4f}.ckpt"

    def test_monitoring_the_training(self, tmp_path):
        callbacks = [
            EarlyStopping("train_kl", patience=1, check_on_train_epoch_end=True),
            KLDivergenceCallback(stages=["train"]),
        ]
        run = trainer(tmp_path, callbacks=callbacks, max_epochs=9)
        run.fit(Fixed(), loader(SIZES[0]), loader(3))
        assert run.current_epoch == 2  # it never changes

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_history_survives_a_checkpoint(self, tmp_path):
        model = Drifting()
        callback = KLDivergenceCallback()
        run = trainer(
            tmp_path,
            callbacks=[callback, ModelCheckpoint(tmp_path, save_last=True)],
            enable_checkpointing=True,
            max_epochs=3,
        )
        run.fit(model, loader(3), loader(SIZES[0]))
        by_hand = KLDivergenceCallback()
        by_hand.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][by_hand.state_key])
        assert by_hand.history == callback.history
        resumed = KLDivergenceCallback()
        callbacks = [resumed, ModelCheckpoint(tmp_path, save_last=True)]
        run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True, max_epochs=5)
        run.fit(model, loader(3), loader(SIZES[0]), ckpt_path=tmp_path / "last.ckpt")
        assert resumed.history[:3] == callback.history
        assert [record["epoch"] for record in resumed.history] == list(range(5))
        assert [record["val_kl"] for record in resumed.history] == pytest.approx(
            [model.exact(epoch) for epoch in range(5)], rel=1e-6
        )

    def test_two_callbacks_in_one_trainer(self, tmp_path):
        callbacks = [
            KLDivergenceCallback(),
            KLDivergenceCallback(KLDivergence(direction="reverse"), name="{stage}_reverse"),
            ModelCheckpoint(tmp_path, save_last=True),
        ]
        run = trainer(tmp_path, callbacks=callbacks, enable_checkpointing=True)
        run.fit(Fixed(), loader(3), loader(SIZES[0]))
        assert set(run.callback_metrics) == {"val_kl", "val_reverse"}
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
        assert sum("KLDivergenceCallback" in key for key in saved) == 2

    def test_plot(self, tmp_path):
        callback = KLDivergenceCallback(stages=("train", "validate"))
        run = trainer(tmp_path, callbacks=[callback])
        run.fit(Fixed(), loader(3), loader(SIZES[0]))
        import matplotlib

        matplotlib.use("agg")
        figure, axis = callback.plot()
        assert [line.get_label() for line in axis.lines] == ["val_kl", "train_kl"]
        assert axis.get_xlabel() == "epoch"
        assert list(axis.lines[0].get_xdata()) == [0, 1]
        assert callback.plot(axis) == (figure, axis)
        matplotlib.pyplot.close(figure)

    @pytest.mark.parametrize("step", [2, 3, 4, 6])
    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_resume_within_an_epoch(self, tmp_path, step):
        metrics = {"bits": KLDivergence(base=2), "theirs": TorchmetricsKL(), "all": KLDivergenceSummary()}
        history = resumable_fit(tmp_path, MetricCollection(metrics))
        close(history[1]["train_kl_mean"], SIZES[0])
        resumed = resumable_fit(tmp_path, MetricCollection(metrics), tmp_path / f"step={step}.ckpt")
        # What Lightning has not run after the last step of an epoch, it does not run any more.
        assert resumed == (history[2:] if step == 4 else history)

    @pytest.mark.parametrize("step", range(1, 9))
    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_resume_where_validation_does_not_follow_the_epochs(self, tmp_path, step):
        options = {"check_val_every_n_epoch": None, "val_check_interval": 3}
        metric = KLDivergence(reduction="sum")  # an epoch that counts twice has the same mean
        history = resumable_fit(tmp_path, metric, **options)
        resumed = resumable_fit(tmp_path, metric, ckpt_path=tmp_path / f"step={step}.ckpt", **options)
        assert all(record in history for record in resumed)
        assert step == 8 or resumed[-1] == history[-1]

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_one_process_continues_any_states(self, tmp_path):
        class Averaged(TorchmetricsKL):
            def __init__(self):
                super().__init__()
                self.add_state("mean", torch.tensor(0.0), dist_reduce_fx="mean")

        history = resumable_fit(tmp_path, Averaged())
        assert resumable_fit(tmp_path, Averaged(), tmp_path / "step=2.ckpt") == history

    @pytest.mark.parametrize(
        "metric",
        [
            KLDivergence(direction="reverse"),
            KLDivergence(temperature=2.0),
            TorchmetricsKL(),
            MetricCollection({"a": KLDivergence(), "b": TorchmetricsKL()}),
            MinMaxMetric(KLDivergence()),
        ],
        ids=["reverse", "temperature", "theirs", "collection", "wrapper"],
    )
    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_totals_of_another_metric_are_not_continued(self, tmp_path, metric):
        resumable_fit(tmp_path, metric.clone() if isinstance(metric, MinMaxMetric) else KLDivergence())
        with pytest.warns(UserWarning, match="The checkpoint has no totals of this metric, with these options"):
            resumable_fit(tmp_path, metric, tmp_path / "step=2.ckpt")

    @pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Be aware that when using `ckpt_path`")
    def test_the_same_callback_after_a_fit_that_raised(self, tmp_path):
        history = resumable_fit(tmp_path)

        class Raises(WithResumableLoader):
            def training_step(self, batch, batch_idx):
                if batch_idx == 3:
                    raise RuntimeError("out of memory")
                return super().training_step(batch, batch_idx)

        callback = KLDivergenceCallback(stages=("train", "validate"))
        options = {"callbacks": [callback], "use_distributed_sampler": False}
        with pytest.raises(RuntimeError, match="out of memory"):
            trainer(tmp_path, **options).fit(Raises(), val_dataloaders=loader(3))
        trainer(tmp_path, **options).fit(
            WithResumableLoader(), val_dataloaders=loader(3), ckpt_path=tmp_path / "step=2.ckpt"
        )
        assert callback.history == history

    @pytest.mark.filterwarnings("ignore:Checkpoint directory")
    def test_an_evaluation_of_a_checkpoint_keeps_the_history(self, tmp_path):
        callback = KLDivergenceCallback()
        best = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
        run = trainer(tmp_path, callbacks=[callback, best], enable_checkpointing=True)
        run.fit(Fixed(), loader(SIZES[0]), loader(3))
        before = list(callback.history)
        run.test(Fixed(), loader(3), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
        assert callback.history[:-1] == before
        assert callback.history[-1]["stage"] == "test"

    def test_no_process_gathers_alone_on_an_exception(self):
        callback = KLDivergenceCallback(stages=("train",))
        callback._running["train"] = [None]
        run = SimpleNamespace(interrupted=True, world_size=2)
        checkpoint = {"callbacks": {}}
        callback.on_save_checkpoint(run, Fixed(), checkpoint)  # there is nothing to gather: it does not try
        assert checkpoint["callbacks"] == {callback.state_key: {"history": []}}

    @pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*mid-epoch.*", "ignore:You're resuming")
    def test_resume_within_an_epoch_with_a_loader_that_starts_over(self, tmp_path):
        def callbacks():
            every = ModelCheckpoint(tmp_path, every_n_train_steps=1, save_top_k=-1, filename="{step}")
            return [KLDivergenceCallback(stages=("train",)), every]

        options = {"enable_checkpointing": True, "max_epochs": 1}
        trainer(tmp_path, callbacks=callbacks(), **options).fit(Fixed(), loader(SIZES[0]), loader(3))
        run = trainer(tmp_path, callbacks=callbacks(), **options)
        run.fit(Fixed(), loader(SIZES[0]), loader(3), ckpt_path=tmp_path / "step=1.ckpt")
        p, q = (torch.cat([x[:2], x[:6]]) for x in pair(SIZES[0], 5, seed=SIZES[0]))  # as Lightning goes on
        torch.testing.assert_close(run.callback_metrics["train_kl"], kl_divergence(p, q), rtol=0, atol=0)


class TestSources:
    def test_callables_weights_and_other_keys(self, tmp_path):
        callback = KLDivergenceCallback(
            p=lambda outputs, batch: batch[0],
            q="q",
            weight=lambda outputs, batch: (torch.arange(len(batch[0])) == 0).float(),
        )
        run = trainer(tmp_path, callbacks=[callback])
        run.validate(Fixed(), loader(SIZES[0]), verbose=False)
        p, q = pair(SIZES[0], 5, seed=SIZES[0])
        torch.testing.assert_close(run.callback_metrics["val_kl"], kl_divergence(p[::2], q[::2]), rtol=0, atol=0)

    def test_targets(self, tmp_path):
        def labels(outputs, batch):
            return torch.where(torch.arange(len(batch[0])) == 1, -100, 2)

        callback = KLDivergenceCallback(KLDivergenceSummary(perplexity=True), targets=labels)
        run = trainer(tmp_path, callbacks=[callback])
        run.validate(Fixed(), loader(SIZES[0]), verbose=False)
        p, q = (x[::2] for x in pair(SIZES[0], 5, seed=SIZES[0]))
        torch.testing.assert_close(run.callback_metrics["val_kl_mean"], kl_divergence(p, q), rtol=0, atol=0)
        perplexity = p[:, 2].double().log().mean().neg().exp().float()
        torch.testing.assert_close(run.callback_metrics["val_kl_perplexity_reference"], perplexity)
        drawn = {line.get_label() for line in callback.plot()[1].lines}
        assert "val_kl_p99" in drawn
        assert not any("perplexity" in name or "delta_p" in name for name in drawn)

    def test_distributions(self, tmp_path):
        callback = KLDivergenceCallback(
            p=lambda outputs, batch: D.Categorical(probs=batch[0]),
            q=lambda outputs, batch: D.Categorical(probs=batch[1]),
        )
        run = trainer(tmp_path, callbacks=[callback])
        run.validate(Fixed(), loader(SIZES[0]), verbose=False)
        close(run.callback_metrics["val_kl"], SIZES[0])

    def test_distributions_of_half_precision(self, tmp_path):
        def normal(loc):
            return lambda outputs, batch: D.Normal(torch.full((len(batch[0]),), loc).half(), torch.ones(1).half())

        run = trainer(tmp_path, callbacks=[KLDivergenceCallback(p=normal(300.0), q=normal(0.0))])
        run.validate(Fixed(), loader(SIZES[0]), verbose=False)
        assert run.callback_metrics["val_kl"] == 45_000

    def test_a_collection_is_logged_key_by_key(self, tmp_path):
        metrics = {"mean": KLDivergence(), "bits": KLDivergence(base=2), "theirs": TorchmetricsKL()}
        run = trainer(tmp_path, callbacks=[KLDivergenceCallback(MetricCollection(metrics))])
        run.validate(Fixed(), [loader(size) for size in SIZES], verbose=False)
        close(run.callback_metrics["val_kl_mean/dataloader_idx_0"], SIZES[0])
        close(run.callback_metrics["val_kl_mean/dataloader_idx_1"], SIZES[1])
        assert len(run.callback_metrics) == 6

    def test_a_summary(self, tmp_path):
        monitor = EarlyStopping(monitor="val_kl_p99", patience=1)
        callback = KLDivergenceCallback(KLDivergenceSummary(top=1))
        run = trainer(tmp_path, callbacks=[callback, monitor], max_epochs=4)
        run.fit(Fixed(), loader(3), loader(SIZES[0]))
        assert len(callback.history) == 2, "it stops where p99 gets no better"
        metric = KLDivergenceSummary(top=1)
        metric.update(*pair(SIZES[0], 5, seed=SIZES[0]))
        expected = {f"val_kl_{key}": value.item() for key, value in metric.compute().items()}
        assert {key: value for key, value in callback.history[0].items() if key in expected} == expected
        assert {key: value.item() for key, value in run.callback_metrics.items()} == pytest.approx(expected)
        assert set(run.progress_bar_metrics) == {"val_kl_mean"}
        import matplotlib

        matplotlib.use("agg")
        axis = callback.plot()[1]
        drawn = {line.get_label() for line in axis.lines}
        assert drawn == {
            f"val_kl_{key}" for key in ("mean", "stderr", "max", "p50", "p90", "p95", "p99", "p99_9", "top1")
        }
        axis = callback.plot(names=["val_kl_agreement"])[1]
        assert [line.get_label() for line in axis.lines] == ["val_kl_agreement"]
        with pytest.raises(
            ValueError, match=r"`names` must be of logged values. Got 'val_kl'; there are \['val_kl_mean'"
        ):
            callback.plot(names=["val_kl"])
        matplotlib.pyplot.close("all")

    def test_a_skipped_evaluation_step(self, tmp_path):
        class Skips(Fixed):
            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                return None if batch_idx == 1 else {"p": batch[0], "q": batch[1], "ones": torch.ones(len(batch[0]))}

            test_step = validation_step

        def of_the_outputs(outputs, batch):
            return None if outputs is None else outputs["q"]

        of_the_batch = {"p": lambda outputs, batch: batch[0], "q": lambda outputs, batch: batch[1]}
        callbacks = [
            KLDivergenceCallback(),
            KLDivergenceCallback(**of_the_batch | {"q": of_the_outputs}, name="{stage}_asked"),
            KLDivergenceCallback(**of_the_batch, weight="ones", name="{stage}_weighted"),
            KLDivergenceCallback(**of_the_batch, name="{stage}_all"),
        ]
        run = trainer(tmp_path, callbacks=callbacks)
        p, q = pair(SIZES[0], 5, seed=SIZES[0])
        kept = torch.tensor([0, 1, 4, 5, 6])
        expected = kl_divergence(p[kept], q[kept])
        for stage, prefix in ((run.validate, "val"), (run.test, "test")):
            stage(Skips(), loader(SIZES[0]), verbose=False)
            for name in ("kl", "asked", "weighted"):
                torch.testing.assert_close(run.callback_metrics[f"{prefix}_{name}"], expected, rtol=0, atol=0)
            close(run.callback_metrics[f"{prefix}_all"], SIZES[0])

    def test_a_step_that_never_returns(self, tmp_path):
        class Forgets(Fixed):
            def validation_step(self, batch, batch_idx):
                pass

        callback = KLDivergenceCallback()
        run = trainer(tmp_path, callbacks=[callback], num_sanity_val_steps=1, max_epochs=1)
        text = "No batch was measured: `validation_step` returned nothing for each of them. So 'val_kl' is NaN."
        with pytest.warns(UserWarning, match=text) as warned:
            run.fit(Forgets(), loader(3), loader(3))
        assert sum(text in str(one.message) for one in warned) == 2, "before the training, too"
        assert run.callback_metrics["val_kl"].isnan()
        assert len(callback.history) == 1

    @pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
    def test_a_skipped_training_step(self, tmp_path):
        class Skips(Fixed):
            def training_step(self, batch, batch_idx):
                return None if batch_idx == 0 else super().training_step(batch, batch_idx)

        run = trainer(tmp_path, callbacks=[KLDivergenceCallback(stages=["train"])], max_epochs=1)
        run.fit(Skips(), loader(SIZES[0]), loader(3))
        p, q = pair(SIZES[0], 5, seed=SIZES[0])
        torch.testing.assert_close(run.callback_metrics["train_kl"], kl_divergence(p[2:], q[2:]), rtol=0, atol=0)

        class SkipsByHand(Skips):
            automatic_optimization = False

        run.fit_loop.epoch_progress.reset()
        run.fit(SkipsByHand(), loader(SIZES[0]), loader(3))
        torch.testing.assert_close(run.callback_metrics["train_kl"], kl_divergence(p[2:], q[2:]), rtol=0, atol=0)


class TestMetricOfTheUser:
    def test_what_it_has_seen_before_does_not_count(self, tmp_path):
        metric = KLDivergence()
        metric.update(*pair(3, 5, seed=9))
        run = trainer(tmp_path, callbacks=[KLDivergenceCallback(metric)])
        run.validate(Fixed(), loader(SIZES[0]), verbose=False)
        close(run.callback_metrics["val_kl"], SIZES[0])

    def test_manual_optimisation(self, tmp_path):
        class Manual(Fixed):
            def __init__(self):
                super().__init__()
                self.automatic_optimization = False

            def training_step(self, batch, batch_idx):
                return None

        first, second = (lambda outputs, batch, i=i: batch[i] for i in (0, 1))
        callback = KLDivergenceCallback(p=first, q=second, stages=["train"])
        run = trainer(tmp_path, callbacks=[callback], max_epochs=1)
        run.fit(Manual(), loader(SIZES[0]), loader(3))
        close(run.callback_metrics["train_kl"], SIZES[0])


class TestErrors:
    def run(self, tmp_path, callback, returns, stage="validate"):
        class Step(Fixed):
            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                return returns(batch)

        getattr(trainer(tmp_path, callbacks=[callback]), stage)(Step(), loader(SIZES[0]), verbose=False)

    def raises(self, tmp_path, kind, text, returns, **options):
        callback = KLDivergenceCallback(**options)
        with pytest.raises(kind, match=re.escape(text)):
            self.run(tmp_path, callback, returns)
        assert callback.history == []
        # Nothing of the failed epoch is left for the next.
        run = trainer(tmp_path, callbacks=[callback])
        callback.p, callback.q, callback.weight = "p", "q", None
        run.validate(Fixed(), loader(SIZES[0]), verbose=False)
        close(run.callback_metrics["val_kl"], SIZES[0])

    def test_two_callbacks_of_one_name(self, tmp_path):
        first = KLDivergenceCallback()
        for second, name in (
            (first, "val_kl"),
            (KLDivergenceCallback(KLDivergence(direction="reverse")), "val_kl"),
            (KLDivergenceCallback(KLDivergenceSummary(), stages=("test",)), "test_kl"),
            (KLDivergenceCallback(stages=("train",), name="val_kl"), "val_kl"),
        ):
            text = (
                f"Each KLDivergenceCallback of a Trainer needs names of its own. Got {name!r} of KLDivergenceCallback("
                f"KLDivergence, stages=('validate', 'test'), name='{{stage}}_kl') and of {second._described}. Give one"
                ' of them a `name`, such as name="{stage}_kl_2".'
            )
            with pytest.raises(ValueError, match=re.escape(text)):
                trainer(tmp_path, callbacks=[first, second]).fit(Fixed(), loader(3), loader(3))
        others = [KLDivergenceCallback(stages=(stage,), name="kl") for stage in ("validate", "test")]
        trainer(tmp_path, callbacks=[first, *others]).validate(Fixed(), loader(3), verbose=False)

    def test_a_name_that_something_else_is_logged_by(self, tmp_path):
        class Logs(Fixed):
            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                self.log(self.name, batch[0].sum())
                return super().validation_step(batch, batch_idx)

        summary, mean = KLDivergenceCallback(KLDivergenceSummary()), KLDivergenceCallback(name="{stage}_kl_mean")
        one, several = loader(3), [loader(3), loader(3)]
        for callbacks, logged, loaders, name in (
            ([summary, mean], "loss", one, "val_kl_mean"),
            ([KLDivergenceCallback()], "val_kl", one, "val_kl"),
            ([KLDivergenceCallback()], "val_kl", several, "val_kl/dataloader_idx_0"),
        ):
            model = Logs()
            model.name = logged
            run = trainer(tmp_path, callbacks=callbacks)
            text = f"Nothing else may be logged by the name of a value of KLDivergenceCallback. Got {name!r}, which the"
            with pytest.raises(ValueError, match=re.escape(text)):
                run.validate(model, loaders, verbose=False)
            model.name = "loss"
            run.callbacks.remove(callbacks[-1])
            run.validate(model, loaders, verbose=False)

    def test_a_metric_that_is_not_brought_together(self):
        run = SimpleNamespace(world_size=2, callbacks=[])
        metric = MetricCollection({"a": KLDivergence(), "b": KLDivergence(sync_on_compute=False)})
        with pytest.warns(UserWarning, match="The metric has sync_on_compute=False: every process logs the value of"):
            KLDivergenceCallback(metric).setup(run, None, "fit")
        KLDivergenceCallback().setup(run, None, "fit")

    def test_step_returns_a_loss(self, tmp_path):
        text = "is a key into the dict that `validation_step` returns. Got Tensor."
        self.raises(tmp_path, TypeError, text, lambda batch: torch.tensor(1.0))

    def test_step_lacks_the_key(self, tmp_path):
        text = (
            "`q='student'` must be a key of what `validation_step` returns. Got the keys ['p', 'q']. Return 'student'"
            " from the step as well, or name another key."
        )
        self.raises(tmp_path, ValueError, text, lambda b: {"p": b[0], "q": b[1]}, q="student")

    def test_bad_rows_and_shapes(self, tmp_path):
        text = "`q` must have the shape of `p`. Got p (2, 5) and q (2, 4)."
        self.raises(tmp_path, ValueError, text, lambda b: {"p": b[0], "q": b[1][:, :4]})

    def test_result_is_no_scalar(self, tmp_path):
        class OfRows(TorchmetricsKL):
            def compute(self):
                return torch.zeros(7)

        callback = KLDivergenceCallback(OfRows())
        text = "The metric must compute scalars to be logged. Got shape (7,) for 'val_kl'."
        with pytest.raises(ValueError, match=re.escape(text)):
            trainer(tmp_path, callbacks=[callback]).validate(Fixed(), loader(SIZES[0]), verbose=False)

    def test_stage_never_ran(self, tmp_path):
        callback = KLDivergenceCallback(stages=("test",))
        run = trainer(tmp_path, callbacks=[callback], max_epochs=1)
        run.fit(Fixed(), loader(3), loader(SIZES[0]))
        text = "There must be a logged value to draw. Got none: no epoch of the stages ('test',) has ended yet."
        with pytest.raises(RuntimeError, match=re.escape(text) + r" .*\(Under ddp_spawn and ddp_notebook the history"):
            callback.plot()

    @pytest.mark.parametrize(
        ("options", "kind", "text"),
        [
            ({"metric": KLDivergence}, TypeError, "Did you mean KLDivergence()?"),
            ({"metric": "kl"}, TypeError, "`metric` must be a torchmetrics Metric or MetricCollection. Got 'kl'."),
            (
                {"metric": KLDivergence(reduction="none")},
                ValueError,
                "`metric` must compute scalars, to be logged. Got KLDivergence with reduction='none', a value for each"
                ' row. Use reduction="mean", or KLDivergenceSummary for how the rows are spread.',
            ),
            (
                {"metric": MetricCollection({"a": KLDivergence(), "b": KLDivergence(reduction=None)})},
                ValueError,
                "Got KLDivergence with reduction='none', a value for each row.",
            ),
            ({"metric": TorchmetricsKL(reduction=None)}, ValueError, "Got KLDivergence with reduction=None, a value"),
            ({"p": 0}, TypeError, "`p` must be a key (str) or a callable (outputs, batch). Got 0."),
            ({"q": None}, TypeError, "`q` must be a key (str) or a callable (outputs, batch). Got None."),
            ({"targets": 1}, TypeError, "`targets` must be a key (str) or a callable (outputs, batch). Got 1."),
            ({"weight": 1.0}, TypeError, "`weight` must be a key (str) or a callable (outputs, batch). Got 1.0."),
            (
                {"stages": ("val",)},
                ValueError,
                "`stages` must be one of 'train', 'validate', 'test'. Got 'val'. Did you mean 'validate'?",
            ),
            ({"stages": ()}, ValueError, "`stages` must have at least one of ('train', 'validate', 'test'). Got ()."),
            ({"stages": "train"}, TypeError, "`stages` must be a sequence of names. Got 'train'. Write ('train',)."),
            (
                {"name": "epoch"},
                ValueError,
                "`name` must be none of ('stage', 'epoch', 'step'), which the history has. Got 'epoch'.",
            ),
            ({"name": "{step}_kl"}, ValueError, "`name` must have no other field than {stage}. Got '{step}_kl'."),
            (
                {"name": "kl", "stages": ("train", "validate")},
                ValueError,
                "`name` must tell the stages apart. Got 'kl' for ('train', 'validate'). Put {stage} into it.",
            ),
        ],
    )
    def test_arguments(self, options, kind, text):
        with pytest.raises(kind, match=re.escape(text)):
            KLDivergenceCallback(**options)


CLI = """
import warnings
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch import LightningDataModule
from lightning_run import Fixed, loader

class Data(LightningDataModule):
    def train_dataloader(self): return loader(3)
    def val_dataloader(self): return loader(7)

warnings.filterwarnings("ignore", module="lightning")
cli = LightningCLI(Fixed, Data, save_config_callback=None)
print("val_kl", cli.trainer.callback_metrics["val_kl"].item())
"""
CONFIG = """
trainer:
  max_epochs: 1
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_checkpointing: false
  callbacks:
    - class_path: klmetric.lightning.KLDivergenceCallback
      init_args:
        metric:
          class_path: klmetric.KLDivergence
          init_args: {input_format: [probs, probs], base: 2, eps: 1.0e-9, sync_on_compute: true}
        p: p
        q: q
        stages: [train, validate]
        name: "{stage}_kl"
"""


def script(*arguments, tmp_path):
    path = os.pathsep.join(filter(None, (str(Path(lightning_run.__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_lightning_cli(tmp_path):
    (tmp_path / "main.py").write_text(CLI)
    (tmp_path / "config.yaml").write_text(CONFIG)
    out = script("main.py", "fit", "--config", "config.yaml", tmp_path=tmp_path)
    value = float(re.search(r"val_kl (\S+)", out)[1])
    assert value == pytest.approx(kl_divergence(*pair(7, 5, seed=7), base=2).item(), rel=1e-6)


def test_trainer_of_pytorch_lightning(tmp_path):
    pytorch_lightning = pytest.importorskip("pytorch_lightning", minversion="2.6")

    class Other(pytorch_lightning.LightningModule):
        validation_step = Fixed.validation_step

    callback = KLDivergenceCallback()
    run = pytorch_lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=[callback]
    )
    run.validate(Other(), loader(SIZES[0]), verbose=False)
    close(run.callback_metrics["val_kl"], SIZES[0])
    close(callback.history[0]["val_kl"], SIZES[0])


def agrees(record, devices, only_fitted=False):
    logged = record["logged"]
    close(logged["train_kl"], SIZES[0])
    for index, (count, _) in enumerate(GRID):
        assert logged[f"val_kl/dataloader_idx_{index}"] == kl_divergence(*pair(count, 5, seed=count)).item()
        for key, value in value_of("summary", *pair(count, 5, seed=count)).items():
            if not key.startswith("top"):
                assert logged[f"val_summary_{key}/dataloader_idx_{index}"] == value.item()
    if not only_fitted:
        close(logged["val_kl"], SIZES[0])
        close(logged["test_kl"], SIZES[0])
        # Of each process the first batch of two.
        p, q = (x[2 * devices :] for x in pair(SIZES[0], 5, seed=SIZES[0]))
        skips = kl_divergence(p, q).item() if len(p) else math.nan
        torch.testing.assert_close(logged["val_kl/skips"], skips, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_launched_by_lightning(tmp_path, strategy):
    script(Path(lightning_run.__file__), strategy, 2, tmp_path / "out.json", tmp_path=tmp_path)
    record = json.loads((tmp_path / "out.json").read_text())
    agrees(record, 2, only_fitted=strategy == "ddp_spawn")
    # The workers of ddp_spawn take their histories with them.
    assert len(record["history"]) == (5 if strategy == "ddp" else 0)


def ddp_in_processes(rank, size, root):
    with as_launched(rank, size):
        record = record_of(root, "ddp", size)
        if size == 2:
            history = resumable_fit(root, strategy="ddp", devices=2)
            resumed = resumable_fit(root, ckpt_path=root / "step=3.ckpt", strategy="ddp", devices=2)
            assert resumed == history
    return record


@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_same_value_for_every_number_of_processes(tmp_path, group, devices):
    for record in group(devices)(ddp_in_processes, tmp_path):
        agrees(record, devices)
        assert len(record["history"]) == 5


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 3, 4])
def test_same_value_in_processes_that_are_sent_their_work(tmp_path, monkeypatch, devices):
    """As ddp_spawn does it, but from a process that has imported what they need."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))  # which Lightning sets, and leaves
    record = record_of(tmp_path, DDPStrategy(start_method="forkserver"), devices)
    agrees(record, devices)
    assert record["history"] == []


class TestPadding:
    """What one of two processes sees of seven samples."""

    def running(self, batch_size=3):
        data = loader(7).dataset
        sampler = DistributedSampler(data, num_replicas=2, rank=1, shuffle=False)
        # Without a batch size the sampler makes the batches.
        sampler = BatchSampler(sampler, 3, drop_last=False) if batch_size is None else sampler
        loader_of_one = DataLoader(data, batch_size=batch_size, sampler=sampler)
        return Running(KLDivergence(), torch.device("cpu"), loader_of_one, True)

    def test_flattened_tokens_are_refused(self):
        text = (
            "`drop_padding` needs one entry of `p` and `q` per sample, on the first axis: the samples that"
            " DistributedSampler repeats are left out. Got shape (12, 5) for a batch of 3 samples. Return (samples,"
            " positions, classes) from the step. (With drop_padding=False the value would depend on the number of"
            " processes.)"
        )
        with pytest.raises(ValueError, match=re.escape(text)):
            self.running().update(*pair(12, 5), None, 0)

    def test_a_batch_of_several_dataloaders(self):
        data = loader(7).dataset
        padded = DataLoader(data, sampler=DistributedSampler(data, num_replicas=2, rank=1))
        assert loaders_of("test", evaluation_of([padded, 0]))["/dataloader_idx_0"] is padded
        with pytest.warns(UserWarning, match="A batch combines several dataloaders, so the samples that"):
            assert loaders_of("test", evaluation_of({"a": padded, "b": 0}, "max_size")) == {"": None}

    def test_a_skipped_batch_counts_as_seen(self):
        for batches in ({"batch_size": 3}, {"batch_size": None}):
            running = self.running(**batches)
            running.skip()
            running.update(*pair(1, 5), None, 1)  # which is a sample once more
            assert running.compute().isnan()
            assert (running.batches, running.skipped) == (2, 1)
        running.batch_size = None
        text = "`drop_padding` counts the samples, so a batch that is left out must have a known size. Got a step that"
        with pytest.raises(ValueError, match=re.escape(text)):
            running.skip()

    def test_left_out_of_tensors_distributions_and_weights(self):
        p, q = pair(1, 5)
        for arguments in (
            (p, q, None),
            (p, q, torch.ones(1)),
            (p, q, torch.ones(())),
            (D.Categorical(probs=p), D.Categorical(probs=q), None),
            (D.Categorical(probs=p), D.Categorical(probs=q), torch.ones(1)),
        ):
            running = self.running()
            running.update(*pair(3, 5), None, 0, torch.zeros(3, dtype=torch.int64))
            # The fourth sample of rank 1 is the first of the data once more.
            running.update(*arguments, 1, torch.zeros(1, dtype=torch.int64))
            torch.testing.assert_close(running.compute(), kl_divergence(*pair(3, 5)), rtol=0, atol=0)
