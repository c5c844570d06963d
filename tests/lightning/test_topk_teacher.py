"""The callback with a teacher of which the likeliest classes are known."""

import torch
from cases import logits
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from klmetric import KLDivergenceSummary, TopK, kl_divergence_bounds
from klmetric.lightning import KLDivergenceCallback


class Student(LightningModule):
    def validation_step(self, batch, batch_idx):
        values, indices, student = batch
        return {"p": TopK(values, indices, 20), "q": student}


def test_it_logs_at_least_and_at_most(tmp_path):
    (values, indices), student = logits(7, 3, 20).log_softmax(-1).topk(4), logits(7, 3, 20, seed=1)
    callback = KLDivergenceCallback(KLDivergenceSummary(input_format="logits", bounds=True))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path, **quiet)
    (logged,) = trainer.validate(
        Student(), DataLoader(TensorDataset(values, indices, student), batch_size=2), verbose=False
    )
    bounds = kl_divergence_bounds(TopK(values, indices, 20), student, input_format="logits")
    for name, expected in bounds._asdict().items():
        torch.testing.assert_close(torch.tensor(logged[f"val_kl_{name}"]), expected, rtol=1e-5, atol=0)
    assert not [name for name in logged if "tail_mass" in name and callback._is_divergence(name)]
