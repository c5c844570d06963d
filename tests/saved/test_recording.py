"""Hidden states and a head, as `klmetric record` saves them, read as the logits of the model."""

import json
import math
import shutil

import language_models
import numpy as np
import pytest
import torch
from command import record, report_of, run
from safetensors.torch import load_file, save_file
from transformers import (
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PhiConfig,
)

from klmetric.arithmetic import projection
from klmetric.command import measure
from klmetric.saved.array import Choice
from klmetric.saved.open import open_saved

SIZES = language_models.SIZES
# What is special about how logits are made of the last hidden states.
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama_tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gemma2_softcap": Gemma2Config(**SIZES, final_logit_softcapping=5.0),
    "gpt2_norm_with_a_bias": GPT2Config(
        vocab_size=language_models.CLASSES, n_positions=language_models.POSITIONS, n_embd=48, n_layer=2, n_head=4
    ),
    "phi_head_with_a_bias": PhiConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}),
    "opt_projected": OPTConfig(
        vocab_size=language_models.CLASSES,
        hidden_size=48,
        word_embed_proj_dim=24,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=language_models.POSITIONS,
    ),
    "granite_divided": GraniteConfig(**SIZES, logits_scaling=0.5),
    "cohere_multiplied": CohereConfig(**SIZES, logit_scale=0.5),
}


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A text, a small model, and what it predicts: as it is, in int8, and in bfloat16."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "text.txt").write_text(language_models.text()[:15_000], encoding="utf-8")
    language_models.save(folder / "model", language_models.trained())
    for name, options in (("full", ()), ("int8", ("--quantize", "int8")), ("bf16", ("--dtype", "bfloat16"))):
        record(folder / "model", folder / "text.txt", folder / name, *options)
    return folder


def tokens_of(folder):
    return load_file(folder / "tokens.safetensors")["tokens"]


def kl_of(p, q):
    """In float64 numpy, straight from the definition."""
    p, q = (x.double().numpy() for x in (p, q))
    log_p, log_q = (x - np.logaddexp.reduce(x, -1, keepdims=True) for x in (p, q))
    return (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_the_logits_of_the_model(name, here, tmp_path):
    model = language_models.save(tmp_path / "model", language_models.untrained(CONFIGS[name]))
    record(model, here / "text.txt", tmp_path / "out", "--windows", 20)
    about = json.loads((tmp_path / "out" / "klmetric-record.json").read_text())
    saved = open_saved(tmp_path / "out", Choice())
    wanted = language_models.logits(model, tokens_of(tmp_path / "out"))
    assert about["rows"] == "hidden"
    assert saved.shape == wanted.shape == (20, language_models.POSITIONS - 1, language_models.CLASSES)
    assert saved.input_format == "logits"
    assert saved.dtype == torch.float32
    found = saved.read(0, saved.rows)
    # Float32 has 24 bits: of the largest term of the sum, some of them, and the model rounds each step of its own.
    head = load_file(tmp_path / "out" / "head.safetensors")
    hidden = torch.cat([load_file(file)["hidden"] for file in sorted((tmp_path / "out").glob("hidden-*"))])
    terms = hidden.abs().double().flatten(0, 1) @ head["weight"].abs().double().T * about["scale"]
    assert ((found - wanted.flatten(0, 1)).abs() <= 2**-21 * terms + 2**-22 * wanted.abs().flatten(0, 1)).all()
    assert wanted.abs().max() > 2, "so small that no softcap or scale would show"


@pytest.mark.parametrize(
    ("name", "key", "value", "without"),
    [
        ("gemma2_softcap", "softcap", 5.0, None),
        ("granite_divided", "scale", 2.0, 1.0),
        ("cohere_multiplied", "scale", 0.5, 1.0),
    ],
)
def test_a_model_has_what_it_is_for(here, tmp_path, name, key, value, without):
    """Without it, the logits would be others."""
    model = language_models.save(tmp_path / "model", language_models.untrained(CONFIGS[name]))
    record(model, here / "text.txt", tmp_path / "out", "--windows", 2)
    place = tmp_path / "out" / "klmetric-record.json"
    about = json.loads(place.read_text())
    assert about[key] == value
    right = open_saved(tmp_path / "out", Choice()).read(0, 100)
    place.write_text(json.dumps({**about, key: without}))
    assert kl_of(right, open_saved(tmp_path / "out", Choice()).read(0, 100)).mean() > 0.01


def test_half_precision_is_multiplied_in_float32(here):
    """The logits that transformers rounds to bfloat16, before it does."""
    hidden = torch.cat([load_file(file)["hidden"] for file in sorted((here / "bf16").glob("hidden-*"))])
    head = load_file(here / "bf16" / "head.safetensors")["weight"]
    saved = open_saved(here / "bf16", Choice())
    found = saved.read(0, saved.rows)
    assert hidden.dtype == torch.bfloat16
    assert torch.equal(head, head.bfloat16().float())
    exact = hidden.double().flatten(0, 1) @ head.double().T
    assert (found - exact).abs().max() <= 2**-20 * exact.abs().max()
    rounded = language_models.logits(here / "model", tokens_of(here / "bf16"), torch.bfloat16).flatten(0, 1)
    assert rounded.dtype == torch.bfloat16
    assert ((found - rounded.float()).abs() <= 2**-8 * found.abs() + 2**-7).all()


def test_the_report_is_of_the_logits(here):
    p, int8, bf16 = (
        language_models.logits(here / "model", tokens_of(here / "full"), **options)
        for options in ({}, {"is_int8": True}, {"dtype": torch.bfloat16})
    )
    report = report_of(here / "full", here / "int8", here / "bf16", formats=None)
    models = {model["name"]: model for model in report["models"]}
    assert report["samples"] == len(p)
    assert models["int8"]["count"] == p.shape[0] * p.shape[1]
    exact = kl_of(p, int8)
    assert models["int8"]["mean"] == pytest.approx(exact.mean(), rel=1e-5)
    assert models["int8"]["max"] == pytest.approx(exact.max(), rel=1e-4)
    agreement = (p.argmax(-1) == int8.argmax(-1)).double().mean().item()
    assert models["int8"]["agreement"] == pytest.approx(agreement, abs=1e-12)
    # transformers has rounded these logits to bfloat16, which adds to it.
    assert 0 < models["bf16"]["mean"] < kl_of(p, bf16.float()).mean() < exact.mean()


def test_equal_models_are_equal(here, tmp_path):
    record(here / "model", here / "text.txt", tmp_path / "again")
    model = report_of(here / "full", tmp_path / "again", formats=None)["models"][0]
    assert (model["mean"], model["max"], model["agreement"]) == (0, 0, 1)
    assert "same_arrays" not in model
    assert report_of(here / "full", here / "full", formats=None)["models"][0]["same_arrays"] == 1


@pytest.mark.parametrize("is_reference", [True, False])
def test_beside_a_file_of_logits(here, tmp_path, is_reference):
    exact = language_models.logits(here / "model", tokens_of(here / "full"))
    np.save(tmp_path / "logits.npy", exact.numpy())
    pair = (tmp_path / "logits.npy", here / "int8") if is_reference else (here / "int8", tmp_path / "logits.npy")
    int8 = language_models.logits(here / "model", tokens_of(here / "full"), is_int8=True)
    wanted = kl_of(exact, int8) if is_reference else kl_of(int8, exact)
    assert report_of(*pair)["models"][0]["mean"] == pytest.approx(wanted.mean(), rel=1e-5)
    assert "--input-format must say what the files hold" in run(*pair, code=2, formats=None).stderr


def test_beside_log_probabilities(here, tmp_path):
    """The format that is asked for is of the file that does not know its own."""
    exact = language_models.logits(here / "model", tokens_of(here / "full"))
    np.save(tmp_path / "log_probs.npy", exact.double().log_softmax(-1).numpy())
    model = report_of(here / "full", tmp_path / "log_probs.npy", formats="log_probs")["models"][0]
    assert model["mean"] < 1e-11


def test_recorded_logits(here, tmp_path):
    record(here / "model", here / "text.txt", tmp_path / "logits", "--logits")
    assert not (tmp_path / "logits" / "head.safetensors").exists()
    saved = open_saved(tmp_path / "logits", Choice())
    wanted = language_models.logits(here / "model", tokens_of(here / "full"))
    assert torch.equal(saved.read(0, saved.rows), wanted.flatten(0, 1))
    assert saved.tokens.tolist() == tokens_of(here / "full").flatten().tolist()
    assert report_of(here / "full", tmp_path / "logits", formats=None)["models"][0]["mean"] < 1e-11


def test_what_knows_its_format_is_not_doubted(here, tmp_path):
    """Logits of any kind, even such as add up to 1."""
    record(here / "model", here / "text.txt", tmp_path / "logits", "--logits", "--windows", 2)
    shard = tmp_path / "logits" / "logits-00001-of-00001.safetensors"
    save_file({"logits": load_file(shard)["logits"].softmax(-1)}, shard)
    report_of(tmp_path / "logits", tmp_path / "logits", formats=None)


def test_heads_of_different_sizes(here, tmp_path):
    """A vocabulary that is padded is cut to the other one, if that is asked for."""
    padded = language_models.untrained(CONFIGS["llama"])
    padded.load_state_dict(language_models.trained().state_dict())
    padded.resize_token_embeddings(language_models.CLASSES + 8)
    record(language_models.save(tmp_path / "model", padded), here / "text.txt", tmp_path / "padded")
    error = run(here / "full", tmp_path / "padded", code=2, formats=None).stderr.replace("\n", " ")
    assert "Both must have the same classes." in error
    assert f"If the last 8 are padding, say --classes {language_models.CLASSES}." in error
    model = report_of(here / "full", tmp_path / "padded", "--classes", language_models.CLASSES, formats=None)
    assert model["models"][0]["mean"] < 1e-11


def test_other_tokens(here, tmp_path):
    text = (here / "text.txt").read_text()
    other = tmp_path / "other.txt"
    other.write_text(text[:6000] + "!" + text[6000:])
    record(here / "model", other, tmp_path / "other", "--windows", 50)
    record(here / "model", here / "text.txt", tmp_path / "same", "--windows", 50)
    error = run(tmp_path / "same", tmp_path / "other", code=2, formats=None).stderr.replace("\n", " ")
    ours, theirs = (tokens_of(tmp_path / name).flatten() for name in ("same", "other"))
    first = (ours != theirs).nonzero()[0].item()
    assert f"Both must be of the same tokens. Got {ours[first]} in {tmp_path / 'same'}" in error
    assert f"as token {first}. Were they made from the same text?" in error
    error = run(here / "full", tmp_path / "same", code=2, formats=None).stderr.replace("\n", " ")
    assert "Both must have the same rows." in error
    assert "Are they of the same data?" in error


@pytest.mark.parametrize("missing", ["tokens.safetensors", "head.safetensors", "hidden-00002-of-*"])
def test_not_whole(here, tmp_path, missing):
    folder = shutil.copytree(here / "int8", tmp_path / "int8")
    file = next(folder.glob(missing))
    file.unlink()
    error = run(here / "full", folder, code=2, formats=None).stderr.replace("\n", " ")
    assert f"A recording must be whole. Got {folder} without {file.name}." in error
    assert "The same command goes on from there." in error


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ('{"schema": 2}', "A recording must be of schema 1. Got 2 in"),
        ('{"schema": 1}', "cannot be read as klmetric-record.json: 'rows'. Is it whole, and of that kind?"),
        ("{", "cannot be read as klmetric-record.json: Expecting property name"),
    ],
    ids=["of_another_time", "keys_missing", "no_json"],
)
def test_no_recording(here, tmp_path, content, text):
    folder = shutil.copytree(here / "int8", tmp_path / "int8")
    (folder / "klmetric-record.json").write_text(content)
    assert text in run(here / "full", folder, code=2, formats=None).stderr.replace("\n", " ")


def test_few_rows_at_once(here, monkeypatch):
    """As many logits as fit a block, whatever the rows; and a report that does not depend on that."""
    whole = report_of(here / "full", here / "int8", formats=None)
    monkeypatch.setattr(projection, "BLOCK", 2**17)
    read = []
    head = projection.Projection.__call__
    monkeypatch.setattr(projection.Projection, "__call__", lambda self, x: read.append(len(x)) or head(self, x))
    rows = open_saved(here / "full", Choice()).at_once
    assert rows == 2**17 // (4 * (language_models.CLASSES + 48))
    again = report_of(here / "full", here / "int8", formats=None)
    assert max(read) == rows
    assert sum(read) == 2 * whole["models"][0]["count"]
    assert again["models"][0]["mean"] == pytest.approx(whole["models"][0]["mean"], rel=1e-6)
    read.clear()
    report_of(here / "full", here / "int8", "--batch-rows", 7, formats=None)
    assert max(read) == 7


def test_all_threads_multiply_together(here, monkeypatch):
    """One block at a time, so that memory does not grow with the threads."""
    threads = []
    monkeypatch.setattr(measure.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(measure.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(projection, "BLOCK", 2**17)
    report_of(here / "full", here / "int8", formats=None)
    assert threads == [3]


def test_perplexity_is_that_of_the_tokens(here):
    """Each row predicts the next token of its window."""
    model = LlamaForCausalLM.from_pretrained(here / "model")
    with torch.inference_mode():
        losses = [model(window[None].long(), labels=window[None].long()).loss for window in tokens_of(here / "full")]
    perplexity = report_of(here / "full", here / "int8", formats=None)["models"][0]["perplexity"]
    assert math.log(perplexity["reference"]["value"]) == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
