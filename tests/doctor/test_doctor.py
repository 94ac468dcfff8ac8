"""`accord doctor`: what it reckons is what really happens, and what is missing or too large is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from typer.testing import CliRunner

from accord import cli
from accord.diffusion.architectures import SD15, SDXL
from accord.diffusion.settings import FinetuneConfig
from accord.doctor import memory, simulate
from accord.doctor.memory import Model
from accord.doctor.simulate import Rows, build
from accord.doctor.sizes import find_model
from tests.conftest import ROOT
from tests.tiny import tiny_diffusion_directory, tiny_xl_directory

DEMO = ROOT / "recipes" / "sandbox" / "demo.yaml"
PAPER = ROOT / "recipes" / "sd15" / "paper.yaml"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_diffusion_directory(tmp_path_factory.mktemp("doctor"))


def doctor(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = CliRunner().invoke(cli.app, ["doctor", *arguments, "--json", "--teraflops", "1"])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, json.loads(result.stdout)


def test_published_sizes() -> None:
    """As the model cards state them."""
    assert simulate.parameters(SD15)["unet"] == 859_520_964
    assert simulate.parameters(SD15)["vae"] == 83_653_863
    assert simulate.parameters(SDXL)["unet"] == 2_567_463_684
    xl = Model.of(SDXL)
    assert (xl.default_size, Model.of(SD15).default_size) == ((1024, 1024), (512, 512))
    assert xl.weights(torch.float16) > sum(xl.parameters.values()) * 2, "the VAE stays in float32"


def test_work_without_data_is_the_work(tiny: Path) -> None:
    """The same floating point operations as of a real network; memory grows as the batch does."""
    architecture = find_model(str(tiny)).architecture
    assert architecture is not None
    cost = simulate.unet_forward(architecture, Rows(4, 64, 64), torch.float32, autocast=False)
    unet: Any = build(architecture, "unet")
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        simulate.predict(architecture, unet, Rows(4, 64, 64), torch.float32)
    assert cost.flops == counter.get_total_flops()
    assert isinstance(unet, UNet2DConditionModel)
    twice = simulate.unet_forward(architecture, Rows(8, 64, 64), torch.float32, autocast=False)
    assert 1.9 < twice.peak_bytes / cost.peak_bytes < 2.1
    assert 1.9 < twice.flops / cost.flops < 2.1


def test_what_training_holds(tiny: Path) -> None:
    """Gradients are as large as the weights; adapters, checkpointing and bfloat16 each save memory."""
    architecture = find_model(str(tiny)).architecture
    assert architecture is not None
    batch = Rows(8, 64, 64)

    def training(**changes: object) -> simulate.Training:
        return simulate.unet_training(architecture, batch, FinetuneConfig.model_validate(changes))

    full = training()
    weights = simulate.parameters(architecture)["unet"] * 4
    assert full.trained_bytes == weights
    assert full.frozen_bytes == 0
    forward = simulate.unet_forward(architecture, batch, torch.float32, autocast=False)
    assert full.cost.peak_bytes > 2 * forward.peak_bytes, "activations are kept"
    assert 2.5 < full.cost.flops / forward.flops < 3.2
    lora = training(parameters="lora", lora={"rank": 2})
    assert lora.trained_bytes < weights / 10
    assert lora.frozen_bytes == weights
    assert training(gradient_checkpointing=True).cost.peak_bytes < full.cost.peak_bytes
    assert training(precision="bfloat16").cost.peak_bytes < full.cost.peak_bytes


def test_a_learners_components(tiny: Path) -> None:
    architecture = find_model(str(tiny)).architecture
    assert architecture is not None
    model = Model.of(architecture)
    config = FinetuneConfig(batch_size=8, pretraining_batch_size=8, objective="diffusion_nft")
    need = memory.finetune(model, 1000, config, height=64, width=64, workers=2, held=77)
    weights = model.parameters["unet"] * 4
    assert need.parts["trained weights"] == need.parts["average"] == need.parts["weights"] == weights
    assert need.parts["optimizer"] == 2 * weights
    assert (need.parts["runtime"], need.parts["cached data"]) == (1000, 77)
    plain = config.model_copy(update={"objective": "reward_weighted_likelihood", "ema_decay": 0.0})
    less = memory.finetune(model, 1000, plain, height=64, width=64, workers=2, held=77)
    assert need.total - less.total == 2 * weights, "neither reference nor average"


@pytest.mark.parametrize("make", [tiny_diffusion_directory, tiny_xl_directory])
def test_a_directorys_configs_and_headers_are_read(make: Any, tmp_path: Path) -> None:
    directory = make(tmp_path)
    found = find_model(str(directory))
    assert found.problems == ()
    assert found.architecture is not None
    assert ("text_encoder_2" in found.architecture) == (make is tiny_xl_directory)
    (directory / "unet" / "old.ckpt").write_bytes(b"")
    shutil.copy(directory / "vae" / "config.json", directory / "unet" / "config.json.bak")
    config = json.loads((directory / "unet" / "config.json").read_text())
    (directory / "unet" / "config.json").write_text(json.dumps(config | {"layers_per_block": 2}))
    (directory / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    problems = "\n".join(find_model(str(directory)).problems)
    assert "old.ckpt is in a pickle format" in problems
    assert "not of one model" in problems
    assert "vae has no diffusion_pytorch_model.safetensors" in problems


def test_the_demo_fits(tmp_path: Path) -> None:
    status, report = doctor(str(DEMO), "--run-dir", str(tmp_path / "run"), "--memory", "8")
    assert status == 0, report
    assert report["fits"] is True
    assert report["problems"] == []
    assert {entry["stage"] for entry in report["memory"]} == {
        *("collect", "learn", "encode", "finetune", "serve")
    }
    assert all(entry["fits"] for entry in report["memory"])
    assert report["disk_total"] < 1e9
    assert {entry["stage"] for entry in report["times"]} > {"collect", "finetune", "evaluate"}
    assert "stated" in report["speed"]
    assert not (tmp_path / "run").exists(), "nothing was made"


def test_the_papers_recipe_without_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that is missing is listed at once; the published sizes tell whether a GPU would do."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACCORD_DATABASE_URL", raising=False)
    options = [
        "--architecture",
        "sd15",
        "--gpu-memory",
        "80",
        "--set",
        "feedback.url=env:ACCORD_DATABASE_URL",
    ]
    status, report = doctor(str(PAPER), *options)
    assert status == 1
    problems = "\n".join(report["problems"])
    for missing in (
        "model_index.json",
        "clip-vit-l-14",
        "laion-aesthetic",
        "coco-val2014",
        "ACCORD_DATABASE",
    ):
        assert missing in problems
    stages = {entry["stage"]: entry for entry in report["memory"]}
    finetune = stages["finetune"]
    assert finetune["place"] == "GPU"
    assert finetune["parts"]["optimizer"] == 2 * 859_520_964 * 4
    assert finetune["available"] == 80e9
    # 625,000 captions of 77 x 768 numbers, in bfloat16, are the largest thing there is: they lie on the disk.
    assert "cached data" not in finetune["parts"]
    assert report["disk"]["latents and texts"] > 625_000 * (77 * 768 * 2 + 4 * 64 * 64 * 4)
    for stage in ("encode", "finetune"):
        beside = stages[f"{stage}, beside the GPU"]
        assert beside["place"] == "host"
        assert beside["parts"].get("cached data", 0) < 2**30
        assert beside["total"] < 16e9
    assert any("are read from files while training" in note for note in report["notes"])


def test_too_little_memory_and_a_database_that_does_not_answer(tmp_path: Path) -> None:
    url = "postgresql+psycopg://user:secret-word@127.0.0.1:1/none"
    options = ["--run-dir", str(tmp_path), "--memory", "0.2", "--set", f"feedback.url={url}"]
    result = CliRunner().invoke(
        cli.app, ["doctor", str(DEMO), *options, "--teraflops", "1"], env={"COLUMNS": "300"}
    )
    assert result.exit_code == 1
    assert "does not answer" in result.output
    assert "secret-word" not in result.output
    assert result.output.count("too little") == 5, "of each stage"


def test_a_probe_tells_the_time(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.app, ["doctor", str(DEMO), "--run-dir", str(tmp_path), "--memory", "8"], env={"COLUMNS": "200"}
    )
    assert result.exit_code == 0, result.output
    assert "It fits" in result.output
    assert "measured: a step of this UNet" in result.output
