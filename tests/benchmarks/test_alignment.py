"""The comparison of ways of aligning: its arithmetic, and all of its commands on the smallest run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from accord.config import resolve_path
from accord.errors import ConfigError
from accord.evaluation.plan import is_reserved
from accord.prompts import load_grammar
from accord.recipe import load_recipe
from benchmarks.alignment import RECIPE, app
from benchmarks.alignment_results import (
    BASE,
    Measured,
    Result,
    measure_models,
    name_of,
    read_results,
    render,
    rows_of,
)
from tests.conftest import ROOT


def result(seed: int, *costs: tuple[int, float]) -> dict[str, Any]:
    checkpoints = [{"model": f"m{n}", "samples": n, "cpu_s": s} for n, s in costs]
    return {"arm": "rival", "seed": seed, "configuration": "c", "checkpoints": checkpoints}


def test_gains_are_paired_by_seed_and_divided_by_what_each_run_cost() -> None:
    runs = [
        Result(**result(1, (1000, 60.0), (2000, 120.0))),
        Result(**result(2, (1000, 120.0), (2000, 240.0))),
    ]
    bases, successes = {1: 0.40, 2: 0.50}, {1: (0.50, 0.60), 2: (0.50, 0.70)}
    measured = {
        run.seed: {BASE: Measured(2.0, bases[run.seed], 100)}
        | {name_of(run, n): Measured(1.5, successes[run.seed][n], 100) for n in range(2)}
        for run in runs
    }
    rows = rows_of(runs, measured)
    assert [row["gain"] for row in rows] == pytest.approx([10, 20, 0, 20])
    lines = render(rows).splitlines()
    assert len(lines) == 2 + 1 + 2
    base, early, late = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert base[5].startswith("45.0 (")
    assert early[3:5] == ["1,000", "1.50"]
    assert early[6].startswith("+5.0 (−58.5 to +68.5")  # 5 ± 12.706 · 7.07 / √2
    assert late[6] == "+20.0 (+20.0 to +20.0)"
    assert late[7] == "+10.0 (+10.0 to +10.0)"
    assert late[8].startswith("+7.5 (")  # 20 points in 2 minutes, and in 4


def test_results_name_their_models_beside_them_and_come_once(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result(1, (10, 2.0))))
    assert read_results([path])[0].checkpoints[0].model == tmp_path / "m10"
    with pytest.raises(ConfigError, match="given already"):
        read_results([path, path])
    path.write_text(json.dumps(result(1, (10, 2.0)) | {"sampels": 3}))
    with pytest.raises(ConfigError, match="sampels"):
        read_results([path])


@pytest.mark.parametrize("tuning", [True, False])
def test_models_are_measured_on_prompts_of_their_own_kind(tmp_path: Path, tuning: bool) -> None:
    torch.set_num_threads(1)
    few = "{prompts: {seen: {colour: 2}}, images_per_prompt: 2}"
    recipe = load_recipe(
        RECIPE,
        [
            f"evaluate.choice={few}",
            f"evaluate.test={few}",
            "evaluate.guidance_scales=[2.0]",
            "evaluate.sampler.precision=float32",
        ],
    )
    base = resolve_path(recipe.model)
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (broken / "manifest.json").unlink()
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: torch.zeros_like(value) for name, value in load_file(weights).items()}, weights)
    found = measure_models(recipe, {BASE: base, "broken": broken}, tmp_path, tuning=tuning)
    assert found["broken"].success == 0
    assert found[BASE].success > 0
    assert found[BASE].images == 4
    drawn = pd.concat(pd.read_parquet(path) for path in (tmp_path / "work").glob("*.parquet"))
    grammar = load_grammar(recipe.grammar)
    assert {is_reserved(grammar.parse(text)) for text in drawn["prompt"]} == {not tuning}


def test_our_side_runs_and_says_what_it_cost(tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = ["--recipe", str(ROOT / "recipes" / "sandbox" / "smoke.yaml")]
    for change in ("feedback.serve=false", "ray.local=true", "control=false", 'tracking.uri=""'):
        common += ["--set", change]
    common += ["--set", "finetune.pretraining_threshold=0"]
    runner = CliRunner()
    for _ in range(2):  # the second finds all done
        done = runner.invoke(app, ["ours", "--seed", "3", "--run-dir", str(run), *common])
        assert done.exit_code == 0, done.output
    found = read_results([run / "result.json"])[0]
    costs = json.loads((run / "costs.json").read_text())
    assert found.checkpoints[0].samples == 72
    assert (found.checkpoints[0].model / "unet").is_dir()
    assert found.checkpoints[0].cpu_s == pytest.approx(sum(costs.values()), abs=1.0)
    assert costs["collect"] > 0.1

    out = tmp_path / "out"
    done = runner.invoke(app, ["export", str(run), "--out", str(out), "--threshold", "0"])
    assert done.exit_code == 0, done.output
    lines = {
        name: (out / name / "metadata.jsonl").read_text().splitlines() for name in ("both", "pretraining")
    }
    assert len(lines["pretraining"]) == 32
    row = json.loads(lines["both"][0])
    assert (out / "both" / row["file_name"]).is_file()
    assert row["text"] in (out / "prompts.txt").read_text().splitlines()

    rival = 'echo \'{"samples": 1, "cpu_s": 100.0, "wall_s": 100.0}\''
    options = ["--steps", "1", "--repeats", "1", "--rival", rival]
    done = runner.invoke(app, ["speed", str(run), *options, *common])
    assert done.exit_code == 0, done.output
    assert "| accord |" in done.output
