"""An experiment from its file to its report: what is done once, measured alike, and told from the JSON alone."""

import json
import math
import os
import shutil
import signal
import sys
from importlib.metadata import version

import pytest
import torch
import yaml

from condition_files import features, styled, write_conditions
from conftest import draw_pairs, uniform_log_snr
from powersteer import PowersteerError
from powersteer.adapters.load import load_network
from powersteer.apps import cli
from powersteer.apps.experiments import compare
from powersteer.apps.experiments import metrics as compare_metrics
from powersteer.apps.experiments import report as compare_report
from powersteer.apps.experiments.compare import ExperimentConfig
from powersteer.apps.experiments.metrics import INFORMATION_DRAWS
from powersteer.apps.experiments.plots import Plots
from powersteer.apps.experiments.report import write_report
from powersteer.apps.experiments.results import Figure, Results
from powersteer.backbones.load import load_base
from powersteer.core.config import build_config, load_config
from powersteer.data.encode import encode_pairs
from powersteer.data.pairs import Pairs
from powersteer.denoising.heldout import HeldOut
from powersteer.denoising.objective import objective_of
from powersteer.evaluation.features import weights_sha256
from powersteer.evaluation.information import denoiser_errors, measure_information
from powersteer.training import loop


def values_of(folder, base_dir):
    return {
        "name": "tiny",
        "data_dir": folder / "data",
        "output_dir": folder / "runs",
        "results_dir": folder / "results",
        "methods": {"lite": {"network": "lite", "weights": "uniform"}, "t2i": {"network": "t2i-adapter"}},
        "train": {
            "pretrained_model_name_or_path": str(base_dir),
            "max_train_steps": 3,
            "validation_steps": 3,
            "train_batch_size": 4,
            "lr_warmup_steps": 0,
            "ema_decay": None,
            "num_validation_images": 0,
            "mixed_precision": "no",
        },
        "reference": "lite",
        "pairs": [8],
        "seeds": [0, 1],
        "tuning": {"learning_rates": [1e-9, 3e-3], "pairs": 8, "max_train_steps": 3},
        "pictures": 2,
        "grid_rows": 2,
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory, base_dir):
    folder = tmp_path_factory.mktemp("experiment")
    for split, count in (("train", 10), ("validation", 4), ("test", 6)):
        draw_pairs(folder / "data" / split, count, seed=count)
    experiment = build_config(values_of(folder, base_dir), ExperimentConfig)
    with uniform_log_snr():
        assert not compare.compare(experiment)
    return experiment


def result(experiment, name):
    return json.loads((experiment.results_dir / f"{name}.json").read_text())


def test_every_run_has_its_figures_and_where_they_come_from(done):
    names = {file.stem for file in done.results_dir.glob("*.json")}
    runs = {f"run-{method}-8-{seed}" for method in ("lite", "t2i") for seed in (0, 1)}
    assert names == {*runs, "prior", "tuning-lite", "tuning-t2i"}
    run, prior = result(done, "run-lite-8-1"), result(done, "prior")["test"]["denoising"]["loss"]
    assert run["updates"] == 3 and run["learning_rate"] == 3e-3 and [row["step"] for row in run["curve"]] == [0, 3]
    assert run["test_pairs"] == 6 and set(run["data"]) == {"train", "validation", "test"}
    assert run["versions"]["torch"] == torch.__version__ and run["versions"]["powersteer"] == version("powersteer")
    assert run["hardware"] and run["memory_estimated"] > 0 and run["memory_used"] > 0 and len(run["weights"]) == 64
    network = load_network(done.output_dir / "runs" / "lite-8-1")
    assert run["trained_parameters"] == sum(p.numel() for p in network.parameters() if p.requires_grad)
    # The figures are those of the kept weights on the test split.
    pipe = load_base(str(done.train["pretrained_model_name_or_path"]))
    test = encode_pairs(pipe, Pairs(done.data_dir / "test", (32, 32)), done.output_dir / "cache")
    held_out, found = HeldOut(pipe, test), run["test"]["denoising"]
    assert held_out.losses(None).mean().item() == pytest.approx(prior, rel=1e-6)
    assert held_out.losses(network).mean().item() == pytest.approx(found["loss"], rel=1e-5)
    assert found["reduction"] == pytest.approx(1 - found["loss"] / prior) and 0 <= run["test"]["lines"]["f1"] <= 1
    assert found["gain"] == pytest.approx(prior - found["loss"], abs=1e-6)
    assert run["base"]["unet"] == weights_sha256(pipe.unet) and len(run["base"]["vae"]) == 64
    objective = objective_of(pipe.scheduler)
    with uniform_log_snr():
        wanted = measure_information(denoiser_errors(pipe, network, test), objective, 6, draws=INFORMATION_DRAWS)
    assert run["test"]["information"]["nats"] == pytest.approx(wanted.steered.mean, rel=1e-4)
    assert result(done, "prior")["test"]["information"] == {"nats": 0}


def test_the_sweep_is_on_the_validation_split_and_recorded(done):
    tuning = result(done, "tuning-t2i")
    assert tuning["learning_rates"] == [1e-9, 3e-3] and tuning["pairs"] == 8 and tuning["seed"] == 1000
    lowest = tuning["losses"].index(min(tuning["losses"]))
    assert tuning["losses"][0] != tuning["losses"][1] and tuning["chosen"] == tuning["learning_rates"][lowest]
    assert not list((done.output_dir / "tuning").glob("t2i/*"))  # what was only for the sweep is gone
    assert not list((done.output_dir / "runs").glob("*/checkpoint-*"))


def test_a_sweep_goes_on_past_its_end_until_the_lowest_loss_is_within():
    def tried(given, loss_of):
        losses = {}
        while (rate := compare.next_rate(losses, given)) is not None:
            losses[rate] = loss_of(rate)
        return sorted(losses)

    given = (1e-4, 3e-4, 1e-3)
    assert tried(given, lambda rate: abs(math.log(rate / 3e-4))) == list(given)
    assert tried(given, lambda rate: abs(math.log(rate / 4e-3))) == [*given, 3e-3, 1e-2]
    assert tried(given, lambda rate: abs(math.log(rate / 5e-5))) == [1e-5, 3e-5, *given]
    assert len(tried(given, lambda rate: -rate)) == 3 + compare.PAST_AN_END  # there is an end to it
    assert tried((1e-4, 1e-3), lambda rate: -rate) == [1e-4, 1e-3]


def test_a_sweep_that_was_stopped_goes_on_where_it_was(done, tmp_path, monkeypatch):
    whole = result(done, "tuning-lite")
    experiment = done.model_copy(update={"results_dir": tmp_path, "output_dir": tmp_path / "runs"})
    half = {**whole, "learning_rates": whole["learning_rates"][:1], "losses": whole["losses"][:1]}
    (tmp_path / "tuning-lite.json").write_text(json.dumps(half))
    train, rates = compare.train, []
    monkeypatch.setattr(compare, "train", lambda config: rates.append(config.learning_rate) or train(config))
    chosen = compare._Comparison(experiment).tuned("lite")
    found = json.loads((tmp_path / "tuning-lite.json").read_text())
    assert rates == whole["learning_rates"][1:] and found["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    assert chosen == whole["chosen"]


def test_a_rate_that_diverges_is_the_worst(done, tmp_path, monkeypatch):
    tuning = done.tuning.model_copy(update={"learning_rates": (1e-3, 3e-3, 1e30)})
    experiment = done.model_copy(update={"results_dir": tmp_path, "output_dir": tmp_path / "runs", "tuning": tuning})
    assert compare._Comparison(experiment).tuned("lite") in (1e-3, 3e-3)
    found = json.loads((tmp_path / "tuning-lite.json").read_text())
    assert found["losses"][found["learning_rates"].index(1e30)] is None
    assert all(0 < loss < 10 for loss in found["losses"] if loss is not None)
    monkeypatch.setattr(compare, "train", lambda config: pytest.fail("trained again"))
    assert compare._Comparison(experiment).tuned("lite") == found["chosen"]


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(done, monkeypatch):
    def trained(_):
        raise AssertionError("trained again")

    monkeypatch.setattr(compare, "train", trained)
    assert not compare.compare(done)
    changed = done.model_copy(update={"train": {**done.train, "max_train_steps": 4}})
    with pytest.raises(PowersteerError, match=r"run-lite-8-0.json was made with other settings|prior.json was made"):
        compare.compare(changed)
    more = done.model_copy(update={"seeds": (0, 1, 2)})
    with pytest.raises(AssertionError, match="trained again"):
        compare.compare(more)


def test_an_interrupted_run_is_gone_on_with(done, monkeypatch, tmp_path):
    other = smaller(done, tmp_path).model_copy(update={"grid_rows": 0})
    real, calls = compare.train, []

    def interrupted_at_the_third(config):
        calls.append(config.output_dir)
        found = real(config)
        return compare.replace(found, interrupted=True) if len(calls) == 3 else found

    monkeypatch.setattr(compare, "train", interrupted_at_the_third)
    assert compare.compare(other)
    assert {file.name for file in other.results_dir.iterdir()} == {"tuning-lite.json", "prior.json"}
    assert not compare.compare(other)
    assert calls[3] == calls[2] and len(calls) == 4  # the same folder again, whose checkpoints it goes on from
    wanted, found = result(done, "run-lite-8-0"), result(other, "run-lite-8-0")
    assert wanted["test"]["denoising"] == found["test"]["denoising"] and wanted["weights"] == found["weights"]


def smaller(done, folder):
    """One method, one seed, elsewhere."""
    places = {"results_dir": folder / "results", "output_dir": folder / "runs"}
    one = {"methods": {"lite": done.methods["lite"]}, "seeds": (0,), "metrics": ("denoising",)}
    return done.model_copy(update=places | one)


def test_a_signal_in_the_last_update_of_a_run_stops_the_experiment(done, monkeypatch, tmp_path):
    other = smaller(done, tmp_path)
    real, calls = loop.squared_errors, []

    def interrupting(*args, **kwargs):
        calls.append(torch.is_grad_enabled())
        if sum(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)  # in the third, last update of the sweep's first run
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "squared_errors", interrupting)
    assert compare.compare(other) and sum(calls) == 3
    assert not other.results_dir.exists() and not (other.output_dir / "tuning" / "lite" / "0.003").exists()
    assert not compare.compare(other) and sum(calls) == 3 * 3  # the first run is not done again
    for name in ("tuning-lite", "run-lite-8-0"):
        timeless = [{k: v for k, v in result(one, name).items() if k in ("losses", "weights")} for one in (done, other)]
        assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    "moment",
    ["an update"]
    + [
        pytest.param(moment, marks=pytest.mark.slow)
        for moment in ("a result's writing", "the removal of checkpoints", "the grid")
    ],
)
def test_a_kill_loses_nothing_but_what_was_under_way(done, monkeypatch, tmp_path, moment):
    other = smaller(done, tmp_path)
    module, name = {
        "an update": (loop, "squared_errors"),
        "a result's writing": (compare.Path, "replace"),
        "the removal of checkpoints": (compare.shutil, "rmtree"),
        "the grid": (compare, "save_grid"),
    }[moment]
    if moment == "an update":
        other = other.model_copy(update={"train": {**other.train, "snr_gamma": 5.0, "checkpointing_steps": 1}})
        done = other.model_copy(update={"results_dir": tmp_path / "whole", "output_dir": tmp_path / "whole-runs"})
        assert not compare.compare(done)
    real, kills, trained = getattr(module, name), [], []
    ours = {"a result's writing": "run-lite-8-0.partial", "the removal of checkpoints": "checkpoint-3"}.get(moment)

    def killed(*args, **kwargs):
        kills.append(ours is None or (ours == getattr(args[0], "name", None) and "tuning" not in str(args[0])))
        if sum(kills) == (8 if moment == "an update" else 1):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, killed)
    with pytest.raises(KeyboardInterrupt):
        compare.compare(other)
    monkeypatch.setattr(module, name, real)
    real_train = compare.train
    monkeypatch.setattr(compare, "train", lambda config: trained.append(config.output_dir.name) or real_train(config))
    assert not compare.compare(other)
    unfinished = moment in ("an update", "a result's writing")
    assert trained == ["lite-8-0"] * unfinished  # the sweep is kept, and so is a run whose result is there
    assert result(other, "run-lite-8-0")["weights"] == result(done, "run-lite-8-0")["weights"]
    assert result(other, "run-lite-8-0")["test"]["denoising"] == result(done, "run-lite-8-0")["test"]["denoising"]
    assert not list(other.output_dir.rglob("checkpoint-*")) and (other.results_dir / "tiny-grid-8.png").exists()


@pytest.mark.slow
def test_a_blind_twin_takes_the_rate_and_what_it_gains_is_taken_off(done, tmp_path):
    pytest.importorskip("matplotlib")
    methods = {
        **done.methods,
        **{f"{name}-blind": {**keys, "ablation": "blind"} for name, keys in done.methods.items()},
    }
    twins = {"methods": methods, "rates_of": {"lite-blind": "lite", "t2i-blind": "t2i"}, "grid_rows": 0}
    experiment = done.model_copy(update={**twins, "results_dir": tmp_path / "results"})
    shutil.copytree(done.results_dir, experiment.results_dir)
    assert not compare.compare(experiment)
    assert not list(experiment.results_dir.glob("tuning-*-blind.json"))
    for method in ("lite", "t2i"):
        assert experiment.sighted(f"{method}-blind") == method and experiment.sighted(method) is None
        run = result(experiment, f"run-{method}-blind-8-0")
        assert run["learning_rate"] == result(done, f"tuning-{method}")["chosen"]
        assert run["test"]["denoising"]["control"] == 0  # whose condition it is given makes no difference
        assert run["test"]["information"]["control"] == 0

    def brought(method, seed):
        seeing, blind = (result(experiment, f"run-{name}-8-{seed}") for name in (method, f"{method}-blind"))
        return seeing["test"]["information"]["nats"] - blind["test"]["information"]["nats"]

    text = write_report(experiment, tmp_path / "results.md").read_text()
    table = text[text.index("## What of it the condition brings") :]
    assert f"\n| lite | {Figure.of([brought('lite', seed) for seed in (0, 1)]).difference()} |" in table
    above = Figure.of([brought("lite", seed) - brought("t2i", seed) for seed in (0, 1)])
    assert f"\n| lite above t2i | {above.difference()} |" in table
    assert "lite-blind takes the rate of lite" in text


def test_a_given_rate_needs_no_sweep(done, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rate = result(done, "tuning-lite")["chosen"]
    lite = {"methods": {"lite": {**done.methods["lite"], "learning_rate": str(rate)}}}
    experiment = done.model_copy(update={**lite, "results_dir": tmp_path / "results", "grid_rows": 0})
    experiment.results_dir.mkdir()
    for seed in (0, 1):  # a swept experiment's runs are those of one that gives the rate
        shutil.copy(done.results_dir / f"run-lite-8-{seed}.json", experiment.results_dir)
    monkeypatch.setattr(compare, "train", lambda config: pytest.fail(f"trained {config.output_dir}"))
    assert not compare.compare(experiment)
    assert not (experiment.results_dir / "tuning-lite.json").exists()
    text = write_report(experiment, tmp_path / "results.md").read_text()
    assert "The rates of lite were given." in text and "The sweep" not in text
    wrong = done.model_copy(update={"methods": {"lite": {**done.methods["lite"], "learning_rate": -1}}})
    with pytest.raises(PowersteerError, match="learning_rate"):
        compare.compare(wrong)


def test_methods_see_the_same_pairs_side_by_side(done, tmp_path):
    assert (done.results_dir / "tiny-grid-8.png").exists()
    from PIL import Image

    assert Image.open(done.results_dir / "tiny-grid-8.png").size == (5 * 130 - 2, 18 + 2 * 130 - 2)
    shutil.copytree(done.results_dir, tmp_path / "results", ignore=shutil.ignore_patterns("*.png"))
    shutil.copytree(done.output_dir / "runs" / "t2i-8-0", tmp_path / "output" / "runs" / "t2i-8-0")
    places = {"results_dir": tmp_path / "results", "output_dir": tmp_path / "output"}
    assert not compare.compare(done.model_copy(update=places))  # lite's network is gone
    assert Image.open(tmp_path / "results" / "tiny-grid-8.png").size == (4 * 130 - 2, 18 + 2 * 130 - 2)


def test_the_report_is_made_of_the_json_alone(done, tmp_path):
    pytest.importorskip("matplotlib")
    moved = done.model_copy(update={"output_dir": tmp_path / "nowhere", "data_dir": tmp_path / "nothing"})
    text = write_report(moved, tmp_path / "docs" / "results.md").read_text()
    assert "from 4 of 4 runs" in text and "over up to 2 seeds, no error where there is one; 6 test pairs" in text
    losses = [result(done, f"run-lite-8-{seed}")["test"]["denoising"]["loss"] for seed in (0, 1)]
    wanted = Figure(sum(losses) / 2, abs(losses[0] - losses[1]) / 2).shown()  # two values: s/√2 is half their distance
    rows = text[text.index("## 8 pairs") : text.index("## How far")].splitlines()[2:-1]
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in table] == ["method", "---", "prior", "lite", "t2i"]
    assert table[3][table[0].index("Denoising loss ↓")] == wanted
    assert table[2][table[0].index("Denoising loss ↓")] == f"{result(done, 'prior')['test']['denoising']['loss']:.3g}"
    gains = [
        [100 * result(done, f"run-{method}-8-{seed}")["test"]["denoising"]["reduction"] for seed in (0, 1)]
        for method in ("lite", "t2i")
    ]
    first, second = (lite - t2i for lite, t2i in zip(*gains, strict=True))
    mean, error = (first + second) / 2, abs(first - second) / 2
    shown = ("+" if mean > 0 else "") + Figure(mean, error).shown(1, " %")
    shown = f"**{shown}**" if abs(mean) > 2 * error else shown
    table = text[text.index("## How far lite lies above the others") :]
    row = next(row for row in table.splitlines() if row.startswith("| t2i |"))
    assert f"| {shown} |" in row and "| lite |" not in table[: table.index("## What each took")]
    assert "0.003 (at the edge of the sweep)" in text and "The sweep: 1e-09, 0.003; 8 pairs" in text
    plots = {f"tiny-{name}.png" for name in ("methods", "curves", "trained-parameters", "seconds")}
    assert {file.name for file in (tmp_path / "docs" / "results").iterdir()} == plots
    assert all(f"(results/{name})" in text for name in plots)
    assert write_report(moved, tmp_path / "docs" / "results.md").read_text() == text and "## What came out" not in text
    found = moved.model_copy(update={"findings": "- **Lite** is best.\n- T2I is not.\n"})
    told = write_report(found, tmp_path / "docs" / "results.md").read_text()
    assert "## What came out\n\n- **Lite** is best.\n- T2I is not.\n\n## " in told
    assert told.replace("## What came out\n\n- **Lite** is best.\n- T2I is not.\n\n", "") == text


def test_more_pairs_have_tables_of_their_own_and_a_curve(done, tmp_path):
    pytest.importorskip("matplotlib")
    results = shutil.copytree(done.results_dir, tmp_path / "results-json")
    for seed in (0, 1):
        run = result(done, f"run-lite-8-{seed}") | {"pairs": 16}
        (results / f"run-lite-16-{seed}.json").write_text(json.dumps(run))
    more = done.model_copy(update={"pairs": [8, 16, "all"], "results_dir": results})
    text = write_report(more, tmp_path / "results.md").read_text()
    tables = text[text.index("## 8 pairs") : text.index("## How far")].split("## 16 pairs")
    assert "\n| t2i |" in tables[0] and "\n| t2i |" not in tables[1]  # what has not run is left out
    assert "## all pairs" not in text and "from 6 of 12 runs" in text
    assert next(row for row in tables[0].splitlines() if "| lite |" in row) in tables[1]
    assert (tmp_path / "results" / "tiny-pairs.png").exists()
    plots = Plots(more, Results.read(more))
    for figure in (plots.against_parameters("denoising.reduction"), plots.curves("step", "updates")):
        assert [axis.get_title() for axis in figure.axes] == ["8 pairs", "16 pairs"]
        legend = figure.axes[-1].get_legend()  # of every method, though t2i has no run beside it
        assert [text.get_text() for text in legend.get_texts()] == ["lite", "t2i"]


def test_a_mean_and_its_standard_error():
    figure = Figure.of([1.0, 2.0, 6.0])
    assert figure.mean == 3 and figure.error == pytest.approx(7**0.5 / 3**0.5)  # s² = (4 + 1 + 9) / 2
    assert figure.difference() == "+3.00 ± 1.53" and Figure(-1.0, 0.4).difference() == "**-1.00 ± 0.40**"
    assert figure.shown() == "3.00 ± 1.53" and Figure.of([0.25]).shown(100, " %") == "25 %"
    assert Figure.of([0.1, 0.1002]).shown() == "0.1001 ± 0.0001"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrics": ["denoising", "fid"]}, "there is no metric 'fid'; there are: information, denoising, lines"),
        ({"methods": {"a": {"output_dir": "x"}}}, "a: output_dir is the experiment's own"),
        ({"train": {"learning_rate": 1}}, "train: learning_rate is the experiment's own"),
        (
            {"methods": {"a": {"learning_rate": 1}, "b": {}}, "reference": "b", "rates_of": {"a": "b"}},
            "rates_of: a gives a learning rate itself: leave out one of both",
        ),
        ({"train": {"seed": 3}}, "train: seed is the experiment's own"),
        ({"pair": [3]}, "unknown key 'pair'; did you mean 'pairs'?"),
        ({"methods": {}}, "'methods'"),
        ({"tuning": {"learning_rates": []}}, "'tuning.learning_rates'"),
        ({"reference": "bps"}, "reference: there is no method 'bps'; there are: lite, t2i"),
        ({"rates_of": {"lite": "bps"}}, "rates_of: there is no method 'bps'; there are: lite, t2i"),
        ({"rates_of": {"lite": "t2i", "t2i": "t2i"}}, "rates_of: t2i takes the rate of another itself: name that one"),
    ],
)
def test_a_faulty_experiment_is_refused(tmp_path, change, message):
    with pytest.raises(PowersteerError) as fault:
        build_config({**values_of(tmp_path, "base"), **change}, ExperimentConfig)
    assert message in str(fault.value)


def test_faults_are_found_before_anything_is_trained(tmp_path, monkeypatch, done):
    with pytest.raises(PowersteerError, match="method lite: unknown key 'netwrok'; did you mean 'network'"):
        compare.compare(done.model_copy(update={"methods": {"lite": {"netwrok": "lite"}}}))
    with pytest.raises(PowersteerError, match="train is missing: data_dir must hold train, validation, test"):
        compare.compare(done.model_copy(update={"data_dir": tmp_path}))
    empty = done.model_copy(update={"results_dir": tmp_path})
    with pytest.raises(PowersteerError, match="holds no results yet: run without --report first"):
        Results.read(empty)
    (tmp_path / "run-x.json").write_text("[1]")
    with pytest.raises(PowersteerError, match=r"run-x.json is no result of powersteer compare"):
        Results.read(empty)
    monkeypatch.setattr(compare_report.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PowersteerError, match=r"pip install 'powersteer\[plots\]'"):
        write_report(done, tmp_path / "results.md")


def test_the_command(done, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(done.model_dump(mode="json")))

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["powersteer", "compare", *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code or 0, capsys.readouterr()

    code, printed = run(file, "--report", "--out", tmp_path / "results.md")
    assert code == 0 and "results.md" in printed.out and (tmp_path / "results.md").exists()
    code, printed = run(file)
    assert code == 0 and "done; --report writes" in printed.out
    code, printed = run(tmp_path / "none.yaml")
    assert code == 2 and "none.yaml cannot be read: it does not exist" in printed.err


@pytest.mark.parametrize("name", ["few-shot", "ablations", "blind", "more-pairs", "known-style"])
def test_the_experiments_that_ship_are_sound(name, request):
    experiment = load_config(request.config.rootpath / "configs" / "experiments" / f"{name}.yaml", ExperimentConfig)
    assert len(experiment.seeds) >= 3 and experiment.name == name
    for method in experiment.methods:
        experiment.training(method, 40, 0, 1e-4, "runs")


@pytest.mark.parametrize("name", ["ablations", "blind"])
def test_they_share_the_runs_of_few_shot(name, request):
    folder = request.config.rootpath / "configs" / "experiments"
    few, other = (load_config(folder / f"{name}.yaml", ExperimentConfig) for name in ("few-shot", name))
    shared = set(few.methods) & set(other.methods)
    assert "controlnet-plain" in shared and few.results_dir == other.results_dir
    assert [few.metrics, few.test_pairs, few.pictures] == [other.metrics, other.test_pairs, other.pictures]
    assert few.tuning == other.tuning and set(other.pairs) <= set(few.pairs)
    for method in shared:
        assert few.training(method, 200, 0, 1e-4, "runs") == other.training(method, 200, 0, 1e-4, "runs")


@pytest.mark.parametrize("kind", ["style", "feature"])
def test_conditions_of_any_kind_are_compared(kind, tmp_path, base_dir, monkeypatch):
    """Colour with structure in four channels, and feature maps: pictures, metrics and grid."""
    given = {"style": {"channels": 4}, "feature": {"channels": 5, "range": None}}[kind]
    for split, count in (("train", 8), ("validation", 4), ("test", 4)):
        folder = draw_pairs(tmp_path / "data" / split, count, seed=count)
        make, suffix = (lambda i: styled(), ".png") if kind == "style" else (features, ".npy")
        write_conditions(folder, make, suffix)
    (tmp_path / "data" / "dataset.json").write_text(json.dumps({"conditioning": {"kind": kind, **given}}))
    values = values_of(tmp_path, base_dir)
    method = {"network": "lite", "weights": "uniform", "learning_rate": 3e-3}
    values |= {"methods": {"lite": method}, "seeds": [0], "metrics": ["information", "denoising", "fidelity"]}
    seen = []
    made = compare_metrics.steered_pictures
    monkeypatch.setattr(compare_metrics, "steered_pictures", lambda *a, **k: (seen.append(a[3]), made(*a, **k))[1])
    experiment = build_config(values, ExperimentConfig)
    assert not compare.compare(experiment)
    test = result(experiment, "run-lite-8-0")["test"]
    assert test["denoising"]["reduction"] and test["information"]["nats"]
    if kind == "style":
        assert 0 < test["fidelity"]["palette distance, ΔE"] < 200
        assert seen[0].shape[1:] == (4, 32, 32) and seen[0].max() <= 1
    else:
        assert test["fidelity"] == {}  # there is no measure of it
        assert torch.equal(seen[0][0], torch.from_numpy(features(0)))  # as they are in their files
    assert experiment.grid(8).exists()
    with pytest.raises(PowersteerError, match="the metric lines is of sketches, the conditions are of the kind"):
        compare.compare(build_config(values | {"metrics": ["lines"]}, ExperimentConfig))
