"""The training program end to end: it learns, it repeats itself bit for bit, it takes real text, and it fails in one sentence."""

import json
import math
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import save_file

import bcr
from bcr.model import load_pretrained
from bcr.runtime import resident
from bcr.runtime.config import compose
from bcr.runtime.outputs import RunFiles, make_room
from bcr.runtime.schema import TrainConfig
from bcr.train import prepare, train

SMALL = ["device=cpu", "bundles.per_step=3", "bundles.group=4", "bundles.budget=60", "sampling.row_block=8"]
GSM8K = Path(__file__).parents[3] / "shared" / "data" / "train" / "gsm8k.jsonl"


def run_training(output: Path, *overrides: str) -> list[dict]:
    train(prepare(compose("train", [f"output={output}", *SMALL, *overrides], TrainConfig)))
    return read(output / "metrics.jsonl")


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def program(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bcr.train", *arguments], capture_output=True, text=True, timeout=200, **options)


def test_training_shortens_answers_and_keeps_them_right(tmp_path):
    steps = run_training(tmp_path, "steps=14", "bundles.per_step=6", "bundles.group=8", "bundles.budget=120")
    first, last = steps[:2], steps[-2:]
    assert mean(last, "tokens_per_problem") < 0.9 * mean(first, "tokens_per_problem")
    assert mean(last, "accuracy") > mean(first, "accuracy") + 0.1
    assert max(step["dlogprob_max"] for step in steps) < 1e-3  # the sampler's log-probs are the learner's


def test_training_in_bfloat16_on_request(tmp_path):
    """Sampler and learner agree to bfloat16's rounding, and what is saved is what was trained."""
    steps = run_training(tmp_path, "steps=3", "model.dtype=bfloat16", "model.activation_checkpointing=true", "optimizer.lr=1e-5")
    assert all(step["updated"] == 1.0 and step["dlogprob_mean"] < 0.02 for step in steps)
    saved = tmp_path / "checkpoints" / "step-000003"
    assert json.loads((saved / "config.json").read_text())["dtype"] == "bfloat16"
    base = load_pretrained(Path(bcr.__file__).parent / "assets" / "arithmetic-base")
    moved = [(a - b).abs().max().item() for a, b in zip(load_pretrained(saved).parameters(), base.parameters(), strict=True)]
    assert 0 < max(moved) < 0.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_learner_takes_the_samplers_arithmetic_on_request(dtype, tmp_path):
    """The difference between the two is then none at all, also after updates; the learning is the same but for rounding."""
    runs = {
        invariant: run_training(tmp_path / invariant, "steps=2", f"model.dtype={dtype}", f"sampling.invariant={invariant}")
        for invariant in ("true", "null")
    }
    assert [step["dlogprob_max"] for step in runs["true"]] == [0.0, 0.0]
    assert max(step["dlogprob_max"] for step in runs["null"]) > 0
    assert all(step["dlogprob_tokens"] > 100 for step in runs["true"])
    exact, usual = runs["true"][0], runs["null"][0]
    assert exact["grad_norm"] == pytest.approx(usual["grad_norm"], rel=1e-3 if dtype == "float32" else 0.05)


def mean(steps: list[dict], name: str) -> float:
    return sum(step[name] for step in steps) / len(steps)


def test_the_same_seed_gives_the_same_run_byte_for_byte(tmp_path):
    for name in ("first", "second"):
        run_training(tmp_path / name, "steps=5")
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    checkpoints = [tmp_path / name / "checkpoints" / "step-000005" / "model.safetensors" for name in ("first", "second")]
    assert checkpoints[0].read_bytes() == checkpoints[1].read_bytes()
    other = run_training(tmp_path / "third", "steps=1", "seed=1")
    assert other[0] != read(tmp_path / "first" / "metrics.jsonl")[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["bundles.sizes=[1,2,4]", "advantage.scope=problem", "loss.aggregation=problem-mean"],
        ["loss.aggregation=seq-mean-token-sum-norm", "loss.horizon=60", "advantage.normalise_std=false"],
        ["loss.clip_high=0.28", "loss.aggregation=seq-mean-token-mean", "advantage.scope=problem", "advantage.discount=0.5"],
        ["loss.kind=cispo", "bundles.budget=null", "bundles.budget_per_problem=25"],
        ["loss.kind=gspo", "loss.clip_low=3e-4", "loss.clip_high=4e-4", "loss.aggregation=seq-mean-token-mean", "loss.kl_coef=0.01"],
        ["off_policy.updates=3", "off_policy.staleness=1", "loss.importance_cap=2", "loss.kl_coef=0.01"],
    ],
)
def test_every_form_of_credit_and_loss_runs(tmp_path, overrides):
    steps = run_training(tmp_path, "steps=2", *overrides)
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert steps[0]["updated"] == 1.0
    assert steps[0]["grad_norm"] > 0


def test_checkpoints_come_at_every_k_steps_and_at_the_end(tmp_path):
    run_training(tmp_path, "steps=3", "checkpoint_every=2", "logging.tensorboard=true")
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000002", "step-000003"]
    load_pretrained(tmp_path / "checkpoints" / "step-000003")
    assert any((tmp_path / "tensorboard").iterdir())
    timings = read(tmp_path / "timings.jsonl")
    assert len(timings) == 3
    phases = {"sampling", "grading", "exchanging", "resampling", "learning"}
    assert {f"seconds_{phase}" for phase in phases} <= set(timings[0])
    if resident.restart_peak():
        assert all(step[f"peak_mb_{phase}"] > 1 for step in timings for phase in phases)
    rollouts = read(tmp_path / "rollouts.jsonl")
    assert [record["kind"] for record in rollouts if record["step"] == 1] == ["best", "best", "worst", "worst"]
    assert all(sum(segment["tokens"] for segment in record["segments"]) == record["tokens"] for record in rollouts)


def test_real_word_problems_run_from_end_to_end(tmp_path):
    """A random model answers nothing: groups without signal are dropped and reported, and nothing breaks."""
    data = GSM8K
    if not data.exists():
        data = tmp_path / "problems.jsonl"
        rows = [
            {"problem": f"Ann has {n} apples and buys {n + 3} more. How many has she now?", "answer": str(2 * n + 3)} for n in range(60)
        ]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = run_training(tmp_path / "run", "steps=2", "model=random", "data=jsonl", f"data.path={data}", "bundles.budget=48")
    for step in steps:
        assert step["problems"] == 3 * 4 * 3
        shares = [step[name] for name in ("accuracy", "wrong", "unanswered", "unparsed", "timeout", "error")]
        assert math.isclose(sum(shares), 1.0)
        assert step["tokens_correct"] is None
        assert all(math.isfinite(value) for name, value in step.items() if name != "tokens_correct")
    assert steps[0]["without_signal"] == 1.0
    assert steps[0]["updated"] == 0.0
    assert read(tmp_path / "run" / "rollouts.jsonl")[0]["problems"][0]["verdict"] == "unanswered"


def jsonl(folder: Path, rows: list[dict]) -> Path:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


BAD_INPUT = [
    (["bundles.sizes=[0]"], "N = 0"),
    (["bundles.sizes=[]"], "bundles.sizes is empty"),
    (["bundles.budget=2"], "less than one token for each"),
    (["bundles.budget=null"], "exactly one of them"),
    (["bundles.group=1"], "bundles.group is 1"),
    (["bundles.budget=1100"], "the model's context is 1024"),
    (["steps=0"], "steps is 0"),
    (["device=cuda"], "torch finds no GPU"),
    (["model=folder", "model.path=no/such/folder"], "neither a folder nor a hub repository"),
    (["model.dtype=float16"], "model.dtype is 'float16'; it must be one of auto, float32, bfloat16"),
    (["loss.kind=ppo"], "loss.kind"),
    (["loss.aggregation=mean"], "loss.aggregation is 'mean'"),
    (["advantage.scope=token"], "advantage.scope is 'token'"),
    (["optimizer.lr=0"], "optimizer.lr is 0"),
    (["sampling.row_block=4"], "row_block is 4"),
    (["sampling.top_p=0.9"], "sampling.top_p is 0.9; training needs it off"),
    (["grading.workers=0"], "workers"),
    (["off_policy.updates=5"], "off_policy.updates is 5; it must divide bundles.per_step, which is 12"),
    (["off_policy.staleness=-1"], "off_policy.staleness is -1"),
    (["parallel.samplers=1"], "parallel.samplers is 1 and this is one process alone"),
    (["parallel.samplers=1", "off_policy.staleness=2"], "off_policy.staleness is 2; with parallel.samplers it is 1"),
    (["parallel.samplers=1", "bundles.resample_rounds=1"], "which parallel.samplers forbids"),
    (["loss.importance_cap=0"], "loss.importance_cap"),
    (["loss.kl_coef=-1"], "loss.kl_coef"),
    (["keep_checkpoints=0"], "keep_checkpoints is 0"),
    (["resume=sometimes"], "resume is 'sometimes'"),
    (["resume=auto", "overwrite=true"], "set one of them"),
    (["guards.max_skipped=0"], "guards.max_skipped is 0"),
    (["guards.collapse=1"], "guards.collapse is 1"),
    (["guards.mismatch_kl=0"], "guards.mismatch_kl is 0"),
    (["sampling.temperature=0"], "sampling.temperature is 0"),
    (["data=jsonl", "data.path=nowhere.jsonl"], "there is no such file"),
]


@pytest.mark.parametrize(("overrides", "phrase"), BAD_INPUT)
def test_bad_input_is_refused_before_any_work(tmp_path, overrides, phrase):
    output = tmp_path / "never"
    with pytest.raises(ValueError, match=r"^[^\n]+$") as refusal:
        prepare(compose("train", [f"output={output}", *overrides], TrainConfig))
    assert phrase in str(refusal.value)
    assert not output.exists()


def test_bad_data_files_name_the_row(tmp_path):
    rows = [{"problem": "1 + 1?", "answer": "2"} for _ in range(20)]
    del rows[16]["answer"]
    for content, phrase in ((rows, "row 17 lacks 'answer'"), ([], "holds no problems")):
        overrides = ["model=random", "data=jsonl", f"data.path={jsonl(tmp_path, content)}", f"output={tmp_path / 'never'}"]
        with pytest.raises(ValueError, match=phrase):
            prepare(compose("train", overrides, TrainConfig))


def test_a_folder_without_weights_is_refused(tmp_path):
    run_training(tmp_path / "run", "steps=1")
    folder = tmp_path / "run" / "checkpoints" / "step-000001"
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="there are no weights"):
        prepare(compose("train", ["model=folder", f"model.path={folder}", f"output={tmp_path / 'never'}"], TrainConfig))


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="wandb is not installed"):
        prepare(compose("train", ["logging.wandb=project", f"output={tmp_path}"], TrainConfig))


def test_a_resumed_run_is_the_same_run_at_weights_and_biases(tmp_path, monkeypatch):
    asked = []
    run = SimpleNamespace(finish=lambda: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: asked.append(options) or run))
    for output, done in (("one", 0), ("one", 3), ("other", 0)):
        config = compose("train", ["logging.wandb=project", f"output={tmp_path / output}"], TrainConfig)
        if not done:
            make_room(Path(config.output), overwrite=False)
        with RunFiles(config, steps_done=done):
            pass
    first, resumed, other = asked
    assert (first["project"], first["resume"]) == ("project", "allow")
    assert first["id"] == resumed["id"] != other["id"]
    make_room(tmp_path / "one", overwrite=True)
    assert list((tmp_path / "one").iterdir()) == [], "what replaces it is another run"


@pytest.mark.parametrize("override", ["bundles.N=3", "bundles.sizes=[0]", "output=/dev/null/run"])
def test_the_program_says_one_sentence_and_exits_with_2(tmp_path, override):
    refused = program(f"output={tmp_path / 'never'}", override, cwd=tmp_path)
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert len(refused.stderr.strip().splitlines()) == 1
    assert refused.stderr.startswith("bcr.train: ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """The limit on the size of a file stands for the disk: metrics still fit, the weights do not."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))

    stopped = program(f"output={tmp_path / 'full'}", *SMALL, "checkpoint_every=1", "steps=2", preexec_fn=limit)
    assert stopped.returncode == 1
    assert len(stopped.stderr.strip().splitlines()) == 1
    assert "model.safetensors" in stopped.stderr
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []

    saved = []

    def fills_up(state, file, metadata):
        if saved:
            raise OSError(28, "No space left on device", str(file))
        saved.append(file)
        save_file(state, file, metadata)

    monkeypatch.setattr("bcr.model.weights.save_file", fills_up)
    with pytest.raises(OSError, match="No space left"):
        run_training(tmp_path / "run", "checkpoint_every=1", "steps=2")
    assert sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()) == ["latest", "step-000001"]
    load_pretrained(tmp_path / "run" / "checkpoints" / "latest")
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 2


def test_an_earlier_run_is_replaced_only_when_told_to(tmp_path):
    run_training(tmp_path, "steps=2")
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="holds an earlier run"):
        run_training(tmp_path, "steps=1")
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    run_training(tmp_path, "steps=1", "overwrite=true")
    assert sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000001"]


def test_it_runs_under_torchrun(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=1",
        "-m",
        "bcr.train",
        "steps=1",
        f"output={tmp_path}",
        *SMALL,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(read(tmp_path / "metrics.jsonl")) == 1
