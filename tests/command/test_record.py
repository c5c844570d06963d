"""`klmetric record`: what it writes, what it says, and what is left of an interruption."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import language_models
import pytest
import torch
from command import record, run
from safetensors.torch import load_file
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM

from klmetric.command import language_model
from klmetric.command import record as recording

SIZES, POSITIONS = language_models.SIZES, language_models.POSITIONS


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """Two models, a text, and a recording of it."""
    folder = tmp_path_factory.mktemp("record")
    (folder / "text.txt").write_text(language_models.text()[:15_000], encoding="utf-8")
    for k, name in enumerate(("model", "other")):
        model = language_models.untrained(LlamaConfig(**SIZES, tie_word_embeddings=False), seed=k)
        language_models.save(folder / name, model)
    record(folder / "model", folder / "text.txt", folder / "whole")
    return folder


def about(folder):
    return json.loads((folder / "klmetric-record.json").read_text())


def contents(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def said_of(*arguments, code=2):
    return record(*arguments, code=code).stderr.replace("\n", " ")


class TestWindows:
    def tokens(self, folder):
        return load_file(folder / "tokens.safetensors")["tokens"]

    def test_each_begins_as_the_tokenizer_says(self, here):
        text = (here / "text.txt").read_text()
        tokens = self.tokens(here / "whole")
        known = language_models.tokenizer()(text).input_ids
        assert known[0] == 0
        assert (tokens[:, 0] == 0).all()
        assert tokens[:, 1:].flatten().tolist() == known[1:][: tokens[:, 1:].numel()]
        assert len(tokens) == len(known[1:]) // (POSITIONS - 1)
        assert tokens.dtype == torch.int32

    def test_or_does_not(self, here, tmp_path):
        text = (here / "text.txt").read_text()
        shutil.copytree(here / "model", tmp_path / "model")
        language_models.tokenizer(begins=False).save_pretrained(tmp_path / "model")
        record(tmp_path / "model", here / "text.txt", tmp_path / "out")
        tokens = self.tokens(tmp_path / "out")
        known = language_models.tokenizer(begins=False)(text).input_ids
        assert known[0] != 0
        assert tokens.flatten().tolist() == known[: tokens.numel()]
        assert len(tokens) == len(known) // POSITIONS

    def test_what_is_left_of_the_text_is_said(self, here, tmp_path):
        known = len(language_models.tokenizer()((here / "text.txt").read_text()).input_ids) - 1
        printed = record(here / "model", here / "text.txt", tmp_path / "out", "--window", 50).stdout.replace("\n", " ")
        assert f"The last {known % 49} tokens of {here / 'text.txt'} fill no window, and are left out." in printed
        printed = record(here / "model", here / "text.txt", tmp_path / "few", "--window", 50, "--windows", 3).stdout
        assert "left out" not in printed
        assert f"{tmp_path / 'few'}: 3 windows of 50 tokens, 147 rows of 384 classes" in printed.replace("\n", " ")

    def test_the_end_of_lines_is_kept(self, here, tmp_path):
        (tmp_path / "text.txt").write_bytes(b"one\r\ntwo\n" * 60)
        record(here / "model", tmp_path / "text.txt", tmp_path / "out")
        tokens = self.tokens(tmp_path / "out")[0, 1:].tolist()
        assert language_models.tokenizer().decode(tokens).startswith("one\r\ntwo\n")

    def test_512_at_most(self, here, tmp_path):
        for positions, window in ((POSITIONS, POSITIONS), (1024, 512)):
            config = LlamaConfig(**{**SIZES, "max_position_embeddings": positions})
            model = language_models.save(tmp_path / f"{positions}", language_models.untrained(config))
            record(model, here / "text.txt", tmp_path / f"out-{positions}", "--windows", 1)
            assert about(tmp_path / f"out-{positions}")["window"] == window


class TestWhatIsSaid:
    def test_of_the_model_and_the_text(self, here):
        found = about(here / "whole")
        assert found["model"] == str(here / "model")
        assert found["quantize"] is None
        assert found["dtype"] == "float32"
        assert found["vocabulary"] == language_models.CLASSES
        assert found["versions"]["torch"] == torch.__version__
        assert len(found["weights"]) == len(found["text"]) == len(found["tokenizer"]) == 64

    def test_of_what_was_asked_for(self, here, tmp_path):
        record(here / "model", here / "text.txt", tmp_path / "int8", "--quantize", "int8", "--windows", 9)
        record(here / "model", here / "text.txt", tmp_path / "bf16", "--dtype", "bfloat16", "--windows", 9)
        full, int8, bf16 = about(here / "whole"), about(tmp_path / "int8"), about(tmp_path / "bf16")
        assert (int8["quantize"], int8["dtype"], int8["weights"]) == ("int8", "float32", full["weights"])
        assert (bf16["quantize"], bf16["dtype"]) == (None, "bfloat16")
        assert bf16["text"] == full["text"]
        head, of_int8 = (load_file(folder / "head.safetensors") for folder in (here / "whole", tmp_path / "int8"))
        assert torch.equal(head["weight"], of_int8["weight"]), "the head is not quantised"

    def test_a_checkpoint_in_half_precision_is_recorded_in_it(self, here, tmp_path):
        model = LlamaForCausalLM.from_pretrained(here / "model").bfloat16()
        language_models.save(tmp_path / "model", model)
        record(tmp_path / "model", here / "text.txt", tmp_path / "out", "--windows", 2)
        assert about(tmp_path / "out")["dtype"] == "bfloat16"
        record(tmp_path / "model", here / "text.txt", tmp_path / "int8", "--windows", 2, "--quantize", "int8")
        assert about(tmp_path / "int8")["dtype"] == "float32"

    def test_no_file_is_for_its_owner_alone(self, here):
        assert {file.stat().st_mode & 0o777 for file in (here / "whole").iterdir()} == {0o666 & ~umask()}

    @pytest.mark.parametrize("why", ["not_linear", "other_logits", "no_hidden_states"])
    def test_logits_where_hidden_states_would_not_do(self, here, tmp_path, monkeypatch, why):
        if why == "not_linear":
            monkeypatch.setattr(
                LlamaForCausalLM, "get_output_embeddings", lambda self: torch.nn.Sequential(self.lm_head)
            )
        elif why == "other_logits":  # a model of its own kind, that does something to them
            forward = LlamaForCausalLM.forward

            def louder(self, *args, **kwargs):
                out = forward(self, *args, **kwargs)
                out.logits = 1.01 * out.logits
                return out

            monkeypatch.setattr(LlamaForCausalLM, "forward", louder)
        else:
            monkeypatch.setattr(LlamaForCausalLM, "base_model_prefix", "")
        printed = record(here / "model", here / "text.txt", tmp_path / "out", "--windows", 2).stdout.replace("\n", " ")
        assert "This model's logits are not its hidden states times a linear head, so they are saved" in printed
        assert about(tmp_path / "out")["rows"] == "logits"
        wanted = language_models.logits(here / "model", load_file(tmp_path / "out" / "tokens.safetensors")["tokens"])
        assert torch.equal(load_file(tmp_path / "out" / "logits-00001-of-00001.safetensors")["logits"], wanted)


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


class TestGoingOn:
    def test_a_whole_one_is_left_alone(self, here):
        before = {file: file.stat().st_mtime_ns for file in (here / "whole").glob("*.safetensors")}
        printed = record(here / "model", here / "text.txt", here / "whole").stdout
        assert printed.startswith("It was whole before.\n")
        assert before == {file: file.stat().st_mtime_ns for file in (here / "whole").glob("*.safetensors")}

    @pytest.mark.parametrize("missing", ["*.safetensors", "head*", "tokens*", "hidden-00002*"])
    def test_what_is_missing_is_made_to_the_same_bits(self, here, tmp_path, missing):
        folder = shutil.copytree(here / "whole", tmp_path / "part")
        lost = list(folder.glob(missing))
        for file in lost:
            file.unlink()
        (folder / f".{lost[0].name}.tmp").write_bytes(b"half of it")
        printed = record(here / "model", here / "text.txt", folder).stdout
        there = {"*.safetensors": 0, "hidden-00002*": about(folder)["windows"] - 8}.get(missing)
        said = "It was whole before." if there is None else f"{there} windows were there before." * (there > 0)
        assert printed.startswith(said or f"{folder}: ")
        assert contents(folder) == contents(here / "whole")

    def test_under_another_name(self, here, tmp_path):
        """The weights say which model it is."""
        folder = shutil.copytree(here / "whole", tmp_path / "part")
        shutil.copytree(here / "model", tmp_path / "moved")
        assert record(tmp_path / "moved", here / "text.txt", folder).stdout.startswith("It was whole before.\n")

    @pytest.mark.parametrize(
        ("options", "key"),
        [
            (("--batch", 4), "batch 4"),
            (("--window", 32), "window 32"),
            (("--windows", 3), "windows 3"),
            (("--dtype", "bfloat16"), "dtype bfloat16"),
            (("--quantize", "int8"), "quantize int8"),
            (("--logits",), "rows logits"),
        ],
    )
    def test_nothing_is_mixed(self, here, options, key):
        before = contents(here / "whole")
        said = said_of(here / "model", here / "text.txt", here / "whole", *options)
        assert f"A recording must be gone on with as it was begun. Got {key}, and {here / 'whole'} has" in said
        assert "Name another --out, or remove that folder." in said
        assert contents(here / "whole") == before

    def test_other_weights(self, here):
        said = said_of(here / "other", here / "text.txt", here / "whole")
        assert "A recording must be gone on with as it was begun. Got weights" in said

    def test_another_text(self, here, tmp_path):
        (tmp_path / "text.txt").write_text((here / "text.txt").read_text() + " ")
        said = said_of(here / "model", tmp_path / "text.txt", here / "whole")
        assert "A recording must be gone on with as it was begun. Got text" in said


@pytest.fixture(scope="module")
def whole(here):
    """One of a longer text, one window at a time: long enough for a signal to come in between."""
    (here / "long.txt").write_text(language_models.text(), encoding="utf-8")
    record(here / "model", here / "long.txt", here / "one_by_one", "--batch", 1)
    return here / "one_by_one"


@pytest.mark.slow
class TestInterrupted:
    """Real processes, by real signals."""

    def begin(self, here, out, files):
        """A recording in a process of its own, in which so many files are there."""
        command = [sys.executable, "-m", "klmetric", "record", here / "model", "--text", here / "long.txt"]
        slowed = [*map(str, command), "--out", str(out), "--batch", "1"]
        process = subprocess.Popen(slowed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 300
        while len(list(out.glob("hidden-*"))) < files and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        return process

    def test_killed(self, here, whole, tmp_path):
        process = self.begin(here, tmp_path / "out", 3)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "it was done before"
        there = [file.name for file in (tmp_path / "out").glob("hidden-*")]
        assert 3 <= len(there) < len(list(whole.glob("hidden-*")))
        assert "A recording must be whole." in run(whole, tmp_path / "out", code=2, formats=None).stderr
        printed = record(here / "model", here / "long.txt", tmp_path / "out", "--batch", 1).stdout
        assert "windows were there before." in printed
        assert contents(tmp_path / "out") == contents(whole)
        assert record(here / "model", here / "long.txt", tmp_path / "out", "--batch", 1).stdout.startswith(
            "It was whole"
        )

    def test_ctrl_c(self, here, whole, tmp_path):
        process = self.begin(here, tmp_path / "out", 3)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
        there = len(list((tmp_path / "out").glob("hidden-*")))
        assert process.returncode == 130, said
        step, windows = about(tmp_path / "out")["windows_in_a_shard"], about(tmp_path / "out")["windows"]
        assert said == (
            f"Interrupted: {there * step} of {windows} windows are in {tmp_path / 'out'}. The same command goes on from"
            " there.\n"
        )
        record(here / "model", here / "long.txt", tmp_path / "out", "--batch", 1)
        assert contents(tmp_path / "out") == contents(whole)


class TestBadInput:
    def test_text(self, here, tmp_path):
        assert f"--text: {tmp_path}/none.txt does not exist" in said_of(
            here / "model", tmp_path / "none.txt", tmp_path / "out"
        )
        (tmp_path / "latin.txt").write_bytes(b"caf\xe9" * 100)
        said = said_of(here / "model", tmp_path / "latin.txt", tmp_path / "out")
        assert f"--text must be a file of text in UTF-8. Got {tmp_path / 'latin.txt'}: 'utf-8' codec can't" in said
        (tmp_path / "short.txt").write_text("Too short.")
        said = said_of(here / "model", tmp_path / "short.txt", tmp_path / "out")
        count = len(language_models.tokenizer()("Too short.").input_ids) - 1
        assert f"--text must fill a window of {POSITIONS} tokens. Got {count} in" in said
        assert "Name a longer text, or a smaller --window." in said
        assert not (tmp_path / "out").exists()

    def test_window(self, here, tmp_path):
        said = said_of(here / "model", here / "text.txt", tmp_path / "out", "--window", 65)
        assert f"--window must be no more than the model has positions. Got 65, and {here / 'model'} has 64." in said
        assert "Invalid value for '--window'" in said_of(here / "model", here / "text.txt", here / "o", "--window", 1)

    def test_model(self, here, tmp_path):
        said = said_of(tmp_path, here / "text.txt", tmp_path / "out")
        assert (
            f"MODEL must be a causal language model with a tokenizer, by its folder or its name. Got {tmp_path}" in said
        )
        assert "which transformers cannot load: " in said
        shutil.copytree(here / "model", tmp_path / "no_weights")
        (tmp_path / "no_weights" / "model.safetensors").unlink()
        assert "which transformers cannot load: " in said_of(tmp_path / "no_weights", here / "text.txt", tmp_path / "o")
        assert not (tmp_path / "o").exists()

    def test_out(self, here, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "other.txt").touch()
        (tmp_path / "file").touch()
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "klmetric-record.json").write_text("{")
        for name in ("full", "file", "broken"):
            said = said_of(here / "model", here / "text.txt", tmp_path / name)
            assert "--out must be a new folder, or one of `klmetric record`. Got" in said

    def test_a_new_out(self, here, tmp_path):
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / ".klmetric-record.json.tmp").write_text("{")
        for folder in (tmp_path / "new" / "folder", tmp_path / "begun"):
            record(here / "model", here / "text.txt", folder, "--windows", 1)
            names = ["head", "hidden-00001-of-00001", "klmetric-record", "tokens"]
            assert sorted(file.stem for file in folder.iterdir()) == names

    def test_quantize(self, here, tmp_path):
        out = tmp_path / "out"
        said = said_of(here / "model", here / "text.txt", out, "--quantize", "int8", "--dtype", "bfloat16")
        assert "--quantize computes in float32 beside int8. Got --dtype bfloat16. Leave it out." in said
        said = said_of(here / "model", here / "text.txt", out, "--quantize", "int8", "--device", "meta")
        assert "--quantize computes on the CPU. Got --device meta. Leave it out." in said
        config = GPT2Config(vocab_size=language_models.CLASSES, n_positions=POSITIONS, n_embd=48, n_layer=2, n_head=4)
        model = language_models.save(tmp_path / "gpt2", language_models.untrained(config))
        said = said_of(model, here / "text.txt", out, "--quantize", "int8")
        assert "--quantize int8 is for linear layers. Got a model that has none but its head." in said

    def test_device(self, here, tmp_path):
        for device in ("gpu", "cuda:99"):
            said = said_of(here / "model", here / "text.txt", tmp_path / "out", "--device", device)
            assert f"--device must be one that torch has here. Got {device}: " in said

    def test_no_room(self, here, tmp_path, monkeypatch):
        monkeypatch.setattr(recording, "disk_usage", lambda folder: shutil.disk_usage(folder)._replace(free=10**5))
        said = said_of(here / "model", here / "text.txt", tmp_path / "out")
        assert "--out must have room for 0.0 GiB. Got" in said
        assert "Take fewer --windows, or another folder." in said
        assert not (tmp_path / "out").exists()

    def test_a_disk_that_is_full_after_all(self, here, tmp_path, monkeypatch):
        def full(tensors, place):
            place.write_bytes(b"some")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(recording, "save_file", full)
        said = said_of(here / "model", here / "text.txt", tmp_path / "out")
        assert "A recording must go where it can be written. Got" in said
        assert "No space left on device. The same command goes on from there." in said
        assert [file.name for file in (tmp_path / "out").iterdir()] == ["klmetric-record.json"]


def test_scales_are_tried(here):
    """Of those that a configuration names, and their inverses, the one that makes the logits of the model."""
    model = LlamaForCausalLM.from_pretrained(here / "model")
    model.config.logits_scaling = 4.0  # which a Llama does not look at
    tokens = torch.arange(32).reshape(1, -1)
    assert language_model.head_of(model, tokens).scale == 1
