"""The callback with a teacher of which the likeliest classes are known."""

import pytest
import torch
from cases import logits
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MetricCollection

from klmetric import Head, KLDivergence, KLDivergenceSummary, TopK, kl_divergence, kl_divergence_bounds
from klmetric.lightning import KLDivergenceCallback

STUDENTS = {
    "in full": lambda student: student,
    "top-k": lambda student: TopK(*student.log_softmax(-1).topk(6), 20),
    "head": lambda student: Head(student, torch.eye(20)),
}


class Student(LightningModule):
    def __init__(self, make=STUDENTS["in full"]):
        super().__init__()
        self.make = make

    def validation_step(self, batch, batch_idx):
        values, indices, student = batch
        return {"p": TopK(values, indices, 20), "q": self.make(student)}


def validated(callback, module, tmp_path):
    """What is logged, and the teacher and the student of all batches."""
    (values, indices), student = logits(7, 3, 20).log_softmax(-1).topk(4), logits(7, 3, 20, seed=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    data = DataLoader(TensorDataset(values, indices, student), batch_size=2)
    (logged,) = trainer.validate(module, data, verbose=False)
    return logged, TopK(values, indices, 20), student


def test_it_logs_at_least_and_at_most(tmp_path):
    callback = KLDivergenceCallback(KLDivergenceSummary(input_format="logits", bounds=True))
    logged, teacher, student = validated(callback, Student(), tmp_path)
    bounds = kl_divergence_bounds(teacher, student, input_format="logits")
    for name, expected in bounds._asdict().items():
        torch.testing.assert_close(torch.tensor(logged[f"val_kl_{name}"]), expected, rtol=1e-5, atol=0)
    assert not [name for name in logged if "tail_mass" in name and callback._is_divergence(name)]


@pytest.mark.parametrize("student", STUDENTS)
def test_several_metrics_of_one_teacher(tmp_path, student):
    metrics = {"kl": KLDivergence(input_format="logits"), "all": KLDivergenceSummary(input_format="logits")}
    callback = KLDivergenceCallback(MetricCollection(metrics))
    logged, teacher, of_student = validated(callback, Student(STUDENTS[student]), tmp_path)
    expected = kl_divergence(teacher, STUDENTS[student](of_student), input_format="logits").item()
    assert logged["val_kl_kl"] == pytest.approx(expected, rel=1e-5)
    assert logged["val_kl_mean"] == logged["val_kl_kl"]
